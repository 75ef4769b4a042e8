"""Generation from a checkpoint: what a sample depends on, and what it does not."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CONFIG, tiny_checkpoint, tiny_vae
from told import Told

from qdit_jax import Recipe, diffusion, ptq, sampling
from qdit_jax.calibration import calibrate, default_sampler
from qdit_jax.checkpoint import Checkpoint
from qdit_jax.diffusion.loop import _sample_loop
from qdit_jax.models import DiT


@pytest.fixture(scope="module")
def checkpoint():
    return tiny_checkpoint()


LABELS = [0, 3, 1, 4, 2]


def test_a_sample_does_not_depend_on_its_batch(checkpoint):
    sampler = diffusion.ddim(4, eta=1.0)
    together = sampling.generate(checkpoint, sampler, LABELS, batch_size=5)
    told = Told()
    by_two = sampling.generate(checkpoint, sampler, LABELS, batch_size=2, progress_fn=told.tell)
    assert told.counts == [2, 2, 1]
    assert together.shape == (5, 4, 4, 4)
    np.testing.assert_allclose(together, by_two, atol=1e-6 * np.abs(together).max())
    other_seed = sampling.generate(checkpoint, sampler, LABELS, seed=1)
    assert np.abs(together - other_seed).max() > 0.1


def test_noise_of_a_sample_follows_from_its_number_alone():
    key = jax.random.key(7)
    noise, keys = sampling.initial_noise(key, jnp.arange(5), (4, 4, 4))
    again, keys_again = sampling.initial_noise(key, jnp.array([4, 4, 0, 1, 2]), (4, 4, 4))
    np.testing.assert_array_equal(noise[4], again[0])
    assert (keys[4] == keys_again[0]).all()
    assert abs(float(noise.std()) - 1) < 0.2


def test_generation_is_the_public_call(checkpoint):
    sampler = diffusion.ddim(4)
    ours = sampling.generate(checkpoint, sampler, LABELS, guidance=2.0, batch_size=5)
    noise, _ = sampling.initial_noise(jax.random.key(0), jnp.arange(5), (4, 4, 4))
    denoise_fn = sampling.denoiser(checkpoint.model, checkpoint.params, 2.0)
    direct = diffusion.sample(denoise_fn, sampler, noise, jnp.array(LABELS))
    np.testing.assert_allclose(ours, direct, atol=1e-5)


def test_params_guidance_and_labels_are_data(checkpoint):
    noise = jnp.ones((5, 4, 4, 4))

    def run(params, guidance, label):
        denoise_fn = sampling.denoiser(checkpoint.model, params, guidance)
        return diffusion.sample(denoise_fn, diffusion.ddim(4), noise, jnp.array(label))

    first = run(checkpoint.params, 1.5, LABELS)
    before = _sample_loop._cache_size()
    second = run(jax.tree.map(lambda leaf: 2 * leaf, checkpoint.params), 4.0, LABELS[::-1])
    assert _sample_loop._cache_size() == before
    assert jnp.abs(first - second).max() > 1e-2


def test_no_guidance_calls_the_network_once(checkpoint):
    for guidance in (None, 1, 1.0):
        plain = sampling.denoiser(checkpoint.model, checkpoint.params, guidance)
        assert isinstance(plain, sampling.Denoiser)
    guided = sampling.denoiser(checkpoint.model, checkpoint.params, jnp.float32(1.0))
    x, timestep = jnp.ones((2, 4, 4, 4)), jnp.array([5, 5])
    label = jnp.array([0, 1])
    call = jax.jit(lambda denoise_fn, *arguments: denoise_fn(*arguments))
    np.testing.assert_allclose(
        call(guided, x, timestep, label), call(plain, x, timestep, label), atol=1e-5
    )


def test_guided_channels_are_at_most_the_latents():
    model = DiT(**{**CONFIG, "in_channels": 1})
    assert sampling.denoiser(model, {}, 1.5).channels == 1
    assert sampling.denoiser(model, {}, 1.5, None).channels is None


@pytest.mark.parametrize("numerics", ["simulated", pytest.param("integer", marks=pytest.mark.slow)])
def test_quantized_parameters_take_the_same_call(checkpoint, numerics):
    recipe = Recipe.preset("w8a8", checkpoint.params, group_size=32)
    params = ptq.quantize_params(checkpoint.params, recipe=recipe)
    quantized = Checkpoint(checkpoint.model, params, recipe)
    sampler = diffusion.ddim(4)
    reference = sampling.generate(checkpoint, sampler, LABELS)
    ours = sampling.generate(quantized, sampler, LABELS, numerics=numerics)
    error = np.linalg.norm(ours - reference) / np.linalg.norm(reference)
    assert 0 < error < 0.05


def test_the_autoencoder_decodes_latents(checkpoint):
    vae = tiny_vae()
    with_vae = Checkpoint(checkpoint.model, checkpoint.params, vae=vae)
    images = sampling.generate(with_vae, diffusion.ddim(4), LABELS)
    latents = sampling.generate(with_vae, diffusion.ddim(4), LABELS, decode_fn=None)
    assert images.shape == (5, 8, 8, 3)
    decode = jax.jit(lambda params, z: vae.model.apply({"params": params}, z, method="decode"))
    decoded = decode(vae.params, latents / vae.model.scaling_factor)
    np.testing.assert_allclose(images, decoded, atol=1e-3)


FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


def with_scheduler(checkpoint, config):
    return dataclasses.replace(checkpoint, metadata={"scheduler": config})


def same_sampler(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_checkpoint_without_a_scheduler_is_sampled_as_published(checkpoint):
    same_sampler(sampling.checkpoint_sampler(checkpoint, 10), diffusion.ddim(10))
    same_sampler(
        sampling.checkpoint_sampler(checkpoint, "ddim25", eta=0.5, clip=2.0),
        diffusion.ddim("ddim25", 0.5, clip=2.0),
    )
    same_sampler(sampling.checkpoint_sampler(checkpoint, 10, sampler="ddpm"), diffusion.ddpm(10))
    model = checkpoint.model.clone(velocity=True)
    velocities = dataclasses.replace(checkpoint, model=model)
    same_sampler(sampling.checkpoint_sampler(velocities, 10), diffusion.flow(10))
    assert sampling.sampler_text(checkpoint) is None


@pytest.mark.parametrize(
    ("config", "kind", "words"),
    [
        (
            {"prediction_type": "v_prediction", "clip_sample": False},
            diffusion.DDIM,
            "predicts v_prediction; sampler: DDIM, leading spacing",
        ),
        (
            {"_class_name": "DDPMScheduler", "steps_offset": 1, "clip_sample_range": 2.0},
            diffusion.DDPM,
            r"DDPM, leading spacing \+ 1, data clipped to 2, variance fixed_small",
        ),
        (
            {"_class_name": "UniPCMultistepScheduler", "thresholding": True},
            diffusion.DDIM,
            "in place of UniPCMultistepScheduler's own., steps evenly spaced from first to last, data "
            "thresholded at quantile 0.995, at most 1",
        ),
    ],
)
def test_everything_that_samples_takes_the_schedulers_sampler(checkpoint, config, kind, words):
    own = with_scheduler(checkpoint, config)
    sampler = default_sampler(own, 5)
    assert isinstance(sampler, kind)
    same_sampler(sampler, diffusion.scheduler_sampler(diffusion.read_scheduler(config), 5))
    assert re.search(words, sampling.sampler_text(own))
    plain = sampling.generate(checkpoint, diffusion.ddim(5), [1, 2])
    assert np.abs(sampling.generate(own, sampler, [1, 2]) - plain).max() > 1e-2
    assert len(calibrate(own, jax.random.key(0), 1, sampler=sampler).timesteps) == 5


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, diffusion.linear_betas()),
        (
            {"beta_schedule": "scaled_linear", "beta_start": 0.001, "beta_end": 0.01},
            diffusion.scaled_linear_betas(1000, 0.001, 0.01),
        ),
        (
            {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 100},
            diffusion.cosine_betas(100),
        ),
        ({"trained_betas": [0.1, 0.2]}, [0.1, 0.2]),
        (
            {"rescale_betas_zero_snr": True},
            diffusion.zero_snr_betas(diffusion.linear_betas()),
        ),
    ],
)
def test_the_schedule_is_the_schedulers(config, expected):
    schedule = diffusion.scheduler_process(diffusion.read_scheduler(config))
    np.testing.assert_array_equal(schedule.betas, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: sampling.generate(c, diffusion.ddim(2), [0, 6]), "label 6 is out of range"),
        (lambda c: sampling.generate(c, diffusion.ddim(2), [-1]), "0 to 5 .5 is the null class"),
        (lambda c: sampling.generate(c, diffusion.ddim(2), []), "is not a list of class numbers"),
        (
            lambda c: sampling.generate(c, diffusion.ddim(2), [0], batch_size=0),
            "batch_size=0 is not supported",
        ),
        (
            lambda c: sampling.denoiser(c.model.clone(null_class=False), c.params, 1.5),
            "needs a null class",
        ),
        (
            lambda c: diffusion.scheduler_process(
                diffusion.read_scheduler({"beta_schedule": "laplace"})
            ),
            "scheduler_config.json says beta_schedule='laplace'; only 'linear' or",
        ),
        (
            lambda c: diffusion.scheduler_process(diffusion.read_scheduler(FLOW)),
            "describes a flow, which has no schedule of betas",
        ),
        (
            lambda c: sampling.checkpoint_sampler(with_scheduler(c, FLOW)),
            "the network predicts noise, but a FlowMatchEulerDiscreteScheduler reads a velocity",
        ),
        (
            lambda c: sampling.checkpoint_sampler(
                with_scheduler(
                    dataclasses.replace(c, model=c.model.clone(learn_sigma=False)),
                    {"_class_name": "DDPMScheduler", "variance_type": "learned_range"},
                )
            ),
            "variance_type='learned_range', but the network returns no variance",
        ),
        (
            lambda c: sampling.checkpoint_sampler(c, sampler="flow"),
            "predicts noise; use ddim or ddpm",
        ),
        (
            lambda c: sampling.checkpoint_sampler(c, sampler="ddpm", eta=1),
            "eta=1 is an option of ddim",
        ),
    ],
)
def test_errors_name_the_argument_and_the_remedy(checkpoint, call, message):
    with pytest.raises(ValueError, match=message):
        call(checkpoint)


@pytest.mark.slow
def test_many_devices_make_the_same_samples(tmp_path, checkpoint):
    script = (
        "import sys, numpy as np; sys.path.insert(0, sys.argv[1])\n"
        "import jax, test_sampling as t\n"
        "from qdit_jax import diffusion, sampling\n"
        "assert jax.device_count() == 4\n"
        "out = sampling.generate(t.tiny_checkpoint(), diffusion.ddim(4, 1.0), t.LABELS)\n"
        "np.save(sys.argv[2], out)\n"
    )
    env = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    here = Path(__file__).resolve().parent
    out = tmp_path / "out.npy"
    subprocess.run([sys.executable, "-c", script, str(here), str(out)], check=True, env=env)
    ours = sampling.generate(checkpoint, diffusion.ddim(4, 1.0), LABELS)
    np.testing.assert_allclose(np.load(out), ours, atol=1e-5)
