"""Networks for videos against recorded runs of the originals, from the file to the output."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qdit_jax as qdit
from qdit_convert import convert
from qdit_jax import diffusion

SOURCES = {
    "latte/class_pt": ("ucf101.pt", {"num_heads": 4}),
    "latte/t2v_diffusers": ("", {}),
    "latte/t2v_small_diffusers": ("", {}),
    "stdit/v10": (
        "OpenSora-v1-16x256x256.pth",
        {"num_heads": 4, "space_scale": 0.5, "input_size": (5, 6, 8)},
    ),
    "stdit/v12_stdit3": ("", {"input_size": (5, 7, 10)}),
    "eps_probe/stdit3": ("", {"input_size": (5, 7, 10)}),
}
T2V = ("latte/t2v_diffusers", "latte/t2v_small_diffusers")
STDIT3 = ("stdit/v12_stdit3", "eps_probe/stdit3")
DDIM = {
    "_class_name": "DDIMScheduler",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 0,
}


def channels_last(x, axis=-4):
    return jnp.asarray(np.moveaxis(x, axis, -1))


def assert_close(ours, reference, tolerance=3e-5):
    assert ours.shape == reference.shape
    error = np.abs(np.asarray(ours) - reference).max()
    assert error <= tolerance * (1 + np.abs(reference).max())


@pytest.fixture(scope="module")
def converted(golden):
    found = {}

    def read(case):
        if case not in found:
            file, options = SOURCES[case]
            folder = golden(f"families/{case}")
            found[case] = convert(folder / file if file else folder, **options), folder
        return found[case]

    return read


def call(checkpoint, x, timestep, condition):
    checkpoint.model.check_condition(condition)
    apply = jax.jit(lambda params, *given: checkpoint.model.apply({"params": params}, *given))
    return apply(checkpoint.params, x, jnp.asarray(timestep), condition)


def condition_of(arrays):
    """Returns the condition of a recorded call of Open-Sora's networks under the names of ours."""
    found = {"text": jnp.asarray(arrays["y"][:, 0]), "text_mask": jnp.asarray(arrays["mask"] == 1)}
    return found | {k: jnp.asarray(arrays[k]) for k in ("fps", "height", "width") if k in arrays}


def test_latte_gives_the_authors_output(converted):
    checkpoint, folder = converted("latte/class_pt")
    arrays = np.load(folder / "io.npz")
    out = call(checkpoint, channels_last(arrays["x"], 2), arrays["t"], jnp.asarray(arrays["y"]))
    assert_close(out, channels_last(arrays["out"], 2))


@pytest.mark.parametrize("case", T2V)
def test_latte_for_text_gives_the_output_of_diffusers(converted, case):
    checkpoint, folder = converted(case)
    arrays = np.load(folder / "io.npz")
    x, text = channels_last(arrays["x"]), jnp.asarray(arrays["text"])
    out = call(checkpoint, x, arrays["t"], {"text": text})
    assert_close(out, channels_last(arrays["out"]))
    padded = jnp.concatenate([text, jnp.full_like(text[:, :2], 7.0)], axis=1)
    mask = jnp.broadcast_to(jnp.arange(padded.shape[1]) < text.shape[1], padded.shape[:2])
    masked = call(checkpoint, x, arrays["t"], {"text": padded, "text_mask": mask})
    np.testing.assert_allclose(masked, out, atol=1e-4)
    out = call(checkpoint, x[:, :1], arrays["t"], {"text": text})
    assert_close(out, channels_last(arrays["out_one_frame"]))


def test_stdit_gives_the_authors_output(converted):
    checkpoint, folder = converted("stdit/v10")
    arrays, condition = np.load(folder / "io.npz"), condition_of(np.load(folder / "io.npz"))
    x = channels_last(arrays["x"])
    assert_close(call(checkpoint, x, arrays["t"], condition), channels_last(arrays["out"]))
    null = checkpoint.model.null_condition(condition, checkpoint.params)
    assert_close(call(checkpoint, x, arrays["t"], null), channels_last(arrays["out_null"]))
    every = condition | {"text_mask": jnp.ones_like(condition["text_mask"])}
    assert_close(call(checkpoint, x, arrays["t"], every), channels_last(arrays["out_nomask"]))


@pytest.mark.parametrize("case", STDIT3)
def test_stdit3_gives_the_velocity_of_the_authors(converted, case):
    checkpoint, folder = converted(case)
    arrays, condition = np.load(folder / "io.npz"), condition_of(np.load(folder / "io.npz"))
    x = channels_last(arrays["x"])
    out = call(checkpoint, x, arrays["t"], condition)
    assert_close(out, channels_last(arrays["out"])[..., :4])
    if "x_mask" in arrays:
        masked = condition | {"frame_mask": jnp.asarray(arrays["x_mask"])}
        out = call(checkpoint, x, arrays["t"], masked)
        assert_close(out, channels_last(arrays["out_xmask"])[..., :4])


def sampled(checkpoint, sampler, noise, condition, guidance=7.0):
    denoise_fn = qdit.denoiser(checkpoint.model, checkpoint.params, guidance=guidance)
    return diffusion.sample(denoise_fn, sampler, noise, condition)


def test_the_loop_of_lattes_authors(converted):
    checkpoint, folder = converted("latte/class_pt")
    loop = np.load(folder / "loop.npz")
    sampler = qdit.ddim(5)
    visited = np.asarray(sampler.table.timestep)
    np.testing.assert_array_equal(visited[::-1], loop["timestep_map"])
    out = sampled(checkpoint, sampler, channels_last(loop["noise"], 2), jnp.array([2]))
    assert_close(out, channels_last(loop["latents"][-1], 2), 1e-4)


def test_the_loop_of_lattes_pipeline(converted):
    checkpoint, folder = converted("latte/t2v_diffusers")
    loop = np.load(folder / "loop.npz")
    sampler = diffusion.scheduler_sampler(diffusion.read_scheduler(DDIM), 5)
    np.testing.assert_array_equal(sampler.table.timestep, loop["timesteps"])
    condition = {name: jnp.asarray(loop[name]) for name in ("text", "null_text")}
    out = sampled(checkpoint, sampler, channels_last(loop["noise"]), condition, 7.5)
    assert_close(out, channels_last(loop["latents"][-1]), 1e-4)


def test_the_ancestral_loop_of_open_sora(converted):
    checkpoint, folder = converted("stdit/v10")
    loop = np.load(folder / "loop.npz")
    sampler = qdit.ddpm(5, variance_fn=diffusion.learned_range)
    np.testing.assert_array_equal(sampler.table.timestep, loop["model_t"][:, 0])
    denoise_fn = qdit.denoiser(checkpoint.model, checkpoint.params, guidance=7.0)
    condition, x = condition_of(loop), channels_last(loop["noise"])
    step_fn = jax.jit(sampler.step, static_argnums=())
    for i, noise in enumerate(loop["step_noise"]):
        row = jax.tree.map(lambda leaf, i=i: leaf[i], sampler.table)
        x = step_fn(denoise_fn, x, condition, row, channels_last(noise)).x_next
        assert_close(x, channels_last(loop["latents"][i]), 5e-4)


def test_the_rectified_flow_of_open_sora(converted):
    checkpoint, folder = converted("stdit/v12_stdit3")
    loop = np.load(folder / "loop.npz")
    model = checkpoint.model
    size = (float(loop["height"][0]), float(loop["width"][0]), int(loop["num_frames"][0]))
    sampler = diffusion.flow_euler(
        5,
        shift=diffusion.resolution_shift(*size),
        flow_times=model.flow_times,
        velocity_to=model.velocity_to,
    )
    np.testing.assert_allclose(sampler.table.timestep, loop["model_t"][:, 0], rtol=1e-5)
    out = sampled(checkpoint, sampler, channels_last(loop["noise"]), condition_of(loop))
    assert_close(out, channels_last(loop["latents"][-1]), 1e-4)
