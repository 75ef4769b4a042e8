"""Frames that are given stay as they are, and the network is told which ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import output, random_params

import qdit_jax as qdit
from qdit_jax import diffusion, sampling
from qdit_jax.cli import main
from qdit_jax.cli.first_frames_option import read_clips
from qdit_jax.models import FAMILIES, build_model
from qdit_jax.sampling.first_frames import SeenBy, kept_rows

SAMPLERS = {
    "ddim": qdit.ddim(3),
    "ddpm": qdit.ddpm(3),
    "dpm-solver++": diffusion.dpm_solver_pp(4),
    "unipc": diffusion.unipc(4),
    "flow": diffusion.flow(3),
    "heun": diffusion.flow(3, solve_fn=diffusion.heun),
}
SHAPE = (2, 5, 3, 4, 2)


@jax.tree_util.Partial
def smooth(x, timestep, condition):
    """Stands for a network: elementwise, so that what clean frames do to the others is known."""
    time = timestep.reshape(len(timestep), *(1,) * (x.ndim - 1))
    out = jnp.cos(x + 0.001 * time) + 0.1 * x.mean(axis=1, keepdims=True)
    return jnp.concatenate([out, out], axis=-1) if condition == 2 else out


def not_told(x, timestep, condition, mask):
    return timestep, condition


def given(seed=0):
    rng = np.random.default_rng(seed)
    noise, clean = (jnp.asarray(rng.standard_normal(SHAPE), jnp.float32) for _ in range(2))
    return noise, clean, jax.random.split(jax.random.key(1), 2)


@pytest.mark.parametrize("name", SAMPLERS)
def test_given_frames_come_out_bit_equal(name):
    noise, clean, keys = given()
    mask = jnp.arange(5) >= jnp.array([[2], [1]])
    learned = 2 if name == "ddpm" else None
    fn = jax.tree_util.Partial(lambda x, t, c: smooth(x, t, learned))
    keeps = diffusion.keeping_frames(SAMPLERS[name], clean, mask, not_told)
    assert isinstance(keeps, diffusion.Sampler)
    out, steps = diffusion.sample_trajectory(fn, keeps, noise, None, keys)
    for i, count in enumerate((2, 1)):
        np.testing.assert_array_equal(out[i, :count], clean[i, :count])
        seen = np.asarray(steps.x)[:, i, :count]
        np.testing.assert_array_equal(seen, np.broadcast_to(clean[i, :count], seen.shape))
    # The others depend on the given ones, and on their own noise.
    other = diffusion.keeping_frames(SAMPLERS[name], clean + 1, mask, not_told)
    changed = diffusion.sample(fn, other, noise, None, keys)
    assert np.abs(changed - out)[:, 2:].max() > 1e-3


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_mask_of_true_everywhere_is_the_plain_loop(name):
    noise, clean, keys = given()
    learned = 2 if name == "ddpm" else None
    fn = jax.tree_util.Partial(lambda x, t, c: smooth(x, t, learned))
    keeps = diffusion.keeping_frames(SAMPLERS[name], clean, jnp.ones((2, 5), bool), not_told)
    plain = diffusion.sample(fn, SAMPLERS[name], noise, None, keys)
    np.testing.assert_array_equal(diffusion.sample(fn, keeps, noise, None, keys), plain)


def conditions(model, count=2):
    rng = np.random.default_rng(4)
    found = {}
    for key, leaf in model.example_condition(count).items():
        found[key] = np.full(leaf.shape, 24, np.float32)
        if key == "text":
            found[key] = rng.standard_normal(leaf.shape).astype(np.float32)
        elif key == "text_mask":
            found[key] = np.ones(leaf.shape, bool)
    if "wan" in type(model).__name__.lower():
        found["null_text"] = np.zeros_like(found["text"][:1])
    return found


def small(name, **config):
    model = build_model(name, {**FAMILIES[name].examples[0], **config})
    return qdit.Checkpoint(model, random_params(model))


CASES = {
    "stdit3": {"sample_size": [5, 3, 4]},
    "wan": {"sample_size": [3, 4, 4]},
}


@pytest.fixture(scope="module", params=CASES)
def checkpoint(request):
    return small(request.param, **CASES[request.param])


def call(params, *args, model):
    return output(model, params, *args)


def test_a_network_sees_given_frames_at_timestep_0(checkpoint):
    """What a network is told is what its own arguments say; no clean frame: what it is told changes nothing."""
    model, frames = checkpoint.model, checkpoint.model.sample_shape()[0]
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, *model.sample_shape())))
    x = x.astype(jnp.float32)
    timestep = jnp.array([700.0, 700.0])
    condition = {k: v for k, v in conditions(model).items() if not k.startswith("null")}
    told = SeenBy(model)
    assert told == SeenBy(model.clone())
    plain = call(checkpoint.params, x, timestep, condition, model=model)
    whole = told(x, timestep, condition, jnp.ones((2, frames), bool))
    np.testing.assert_allclose(
        call(checkpoint.params, x, *whole, model=model), plain, atol=1e-5 * abs(plain).max()
    )
    mask = jnp.broadcast_to(jnp.arange(frames) >= 1, (2, frames))
    times, entries = told(x, timestep, condition, mask)
    if "frame_mask" in entries:
        np.testing.assert_array_equal(entries["frame_mask"], mask)
        np.testing.assert_array_equal(times, timestep)
    else:
        per_frame = np.asarray(times).reshape(2, frames, -1)
        assert (per_frame[:, 0] == 0).all()
        assert (per_frame[:, 1:] == 700).all()
    out = call(checkpoint.params, x, times, entries, model=model)
    assert np.abs(out - plain).max() > 1e-3


def test_generated_videos_begin_with_what_is_given(checkpoint):
    model = checkpoint.model
    sampler = sampling.checkpoint_sampler(checkpoint, 2)
    rng = np.random.default_rng(1)
    first = rng.standard_normal((1, 2, *model.sample_shape()[1:])).astype(np.float32)
    made = [
        sampling.generate(
            checkpoint, sampler, conditions(model), batch_size=size, first_frames=frames
        )
        for size, frames in ((2, first), (1, first), (2, first + 1))
    ]
    np.testing.assert_array_equal(made[0][:, :2], np.broadcast_to(first, made[0][:, :2].shape))
    np.testing.assert_allclose(made[1], made[0], atol=1e-4 * np.abs(made[0]).max())
    assert np.abs(made[2] - made[0])[:, 2:].max() > 1e-3


def test_each_expert_keeps_frames_too():
    """The step's timestep chooses the expert and its guidance, though given tokens are at 0."""
    full = small("wan", depth=1, boundary=600.0, sample_size=[3, 4, 4])
    first = np.ones((1, 1, 4, 4, 4), np.float32)
    sampler = sampling.checkpoint_sampler(full, 3)
    made = sampling.generate(
        full, sampler, conditions(full.model), batch_size=2, first_frames=first
    )
    np.testing.assert_array_equal(made[:, 0], np.ones((2, 4, 4, 4)))
    low_alone = full.model.clone(expert="low")
    other = qdit.Checkpoint(low_alone, {"low": full.params["low"]})
    differs = sampling.generate(
        other, sampler, conditions(full.model), batch_size=2, first_frames=first
    )
    assert np.abs(differs - made).max() > 1e-3


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            (1, 3, 4, 4, 4),
            r"first_frames are float32 \[1, 3, 4, 4, 4\]; samples are \[3, 4, 4, 4\]",
        ),
        ((1, 1, 4, 4, 3), r"give latents \[N, F, 4, 4, 4\] of F = 1 to 2 frames"),
        ((1, 4, 4, 4), "give latents"),
    ],
)
def test_frames_that_do_not_fit_are_refused(shape, message):
    full = small("wan", sample_size=[3, 4, 4])
    with pytest.raises(ValueError, match=message):
        sampling.checked_first_frames(full.model, np.zeros(shape, np.float32), (3, 4, 4, 4))


def test_networks_that_cannot_be_told_are_refused():
    model = build_model("latte", FAMILIES["latte"].examples[0])
    with pytest.raises(ValueError, match="a Latte cannot be told which frames are clean; STDiT3"):
        sampling.checked_first_frames(model, np.zeros((1, 1, 4, 4, 4)), model.sample_shape())
    full = small("wan", sample_size=[3, 4, 4])
    nan = np.full((1, 1, 4, 4, 4), np.nan, np.float32)
    with pytest.raises(ValueError, match="first_frames"):
        sampling.checked_first_frames(full.model, nan, (3, 4, 4, 4))


def test_rows_are_cycled_over_the_samples():
    frames = np.arange(2.0)[:, None, None, None, None] * np.ones((2, 1, 2, 2, 1))
    clean, mask = kept_rows(frames.astype(np.float32), np.array([0, 1, 2]), 3)
    assert clean.shape == (3, 3, 2, 2, 1)
    np.testing.assert_array_equal(clean[:, 0, 0, 0, 0], [0, 1, 0])
    np.testing.assert_array_equal(mask, [[False, True, True]] * 3)


def test_the_verb_continues_its_own_latents(tmp_path, capsys):
    full = small("wan", sample_size=[3, 4, 4])
    qdit.save(tmp_path / "wan", full)
    np.savez(tmp_path / "prompts.npz", **conditions(full.model))
    common = ["--embeds", str(tmp_path / "prompts.npz"), "--steps", "2", "--json"]

    def sampled(name, *options):
        out = str(tmp_path / name)
        status = main(["sample", str(tmp_path / "wan"), *common, "--out", out, *options])
        assert status == 0, capsys.readouterr().err
        return np.load(out)["latents"]

    before = sampled("a.npz")
    given = ("--first-frames", str(tmp_path / "a.npz"))
    after = sampled("b.npz", *given, "--num-first-frames", "1")
    np.testing.assert_array_equal(after[:, 0], before[:, -1])
    too_many = [*common, "--out", str(tmp_path / "c.npz"), *given]
    assert main(["sample", str(tmp_path / "wan"), *too_many]) == 2
    assert "F = 1 to 2 frames" in capsys.readouterr().err
    assert main(["sample", str(tmp_path / "wan"), *too_many, "--num-first-frames", "9"]) == 2
    assert "has clips of 3 frames" in capsys.readouterr().err
    alone = [*common, "--out", str(tmp_path / "c.npz"), "--num-first-frames", "1"]
    assert main(["sample", str(tmp_path / "wan"), *alone]) == 2
    assert "it counts frames of --first-frames" in capsys.readouterr().err


def test_pixels_are_encoded():
    """What a picture's autoencoder decodes again is the picture it encoded."""
    model = build_model("wan-vae", FAMILIES["wan-vae"].examples[0])
    vae = qdit.Checkpoint(model, random_params(model, scale=0.1))
    rng = np.random.default_rng(0)
    clip = rng.uniform(-1, 1, (1, 1 + model.frames_per_latent, 8, 8, 3)).astype(np.float32)
    found = sampling.encode(vae, clip)
    mean, _ = model.apply({"params": vae.params}, clip, method="encode")
    scaled = (np.asarray(mean) - model.shift_factor) * model.scaling_factor
    np.testing.assert_allclose(found, scaled, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        sampling.decode(vae, found),
        model.apply({"params": vae.params}, mean, method="decode"),
        atol=1e-4,
    )


def test_files_are_read_by_what_they_hold(tmp_path):
    np.savez(tmp_path / "images.npz", np.zeros((2, 8, 8, 3), np.uint8))
    assert read_clips(tmp_path / "images.npz").shape == (2, 1, 8, 8, 3)
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    with pytest.raises(ValueError, match="holds mu; give latents, or arr_0"):
        read_clips(tmp_path / "other.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ValueError, match="cannot be read"):
        read_clips(tmp_path / "text.npz")
