"""Objectives on features of samples: FID's way for images and videos, against a loop by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from search_models import batches_of_noise, search, small_model, small_rollout, small_space

import qdit_jax as qdit
from qdit_jax import metrics
from qdit_jax.allocation import frechet_objective
from qdit_jax.allocation.rollouts import as_images
from qdit_jax.models import AutoencoderKL


def features_fn(images):
    """Returns moments of pictures or videos as `pool [N, 3]`."""
    assert images.dtype == np.uint8
    flat = np.asarray(images, np.float64).reshape(len(images), -1) / 255
    return {"pool": np.stack([flat.mean(1), flat.std(1), np.abs(np.diff(flat)).mean(1)], axis=1)}


def statistics(features):
    return metrics.statistics(metrics.moments(features))


def distance(features, reference):
    own = statistics(features)
    return metrics.frechet_distance(reference.mean, reference.covariance, own.mean, own.covariance)


@pytest.fixture(scope="module")
def network():
    return small_model()


@pytest.fixture(scope="module")
def reference():
    return statistics(np.random.default_rng(0).random((50, 3)))


def small_vae(channels):
    model = AutoencoderKL(
        latent_channels=channels, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4
    )
    image = jnp.zeros((1, 8, 8, 3))
    return qdit.Checkpoint(model, model.init(jax.random.key(1), image)["params"])


@pytest.mark.parametrize("has_vae", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_fitness_is_the_distance_of_the_quantized_networks_samples(network, reference, has_vae):
    model, params = network
    vae = small_vae(model.in_channels) if has_vae else None
    rollout, data = small_rollout(model, 2), batches_of_noise(model, 2, 4)
    objective = frechet_objective(
        qdit.Checkpoint(model, params, vae=vae), rollout, data, features_fn, reference
    )
    space = small_space(params)
    evaluator = search.Evaluator(space, params, objective)
    assignments = np.array([[0] * len(space.layers), [3] * len(space.layers)])
    found = evaluator(assignments)
    assert evaluator.num_compilations == 1
    for assignment, fitness in zip(assignments, found, strict=True):
        quantized = qdit.quantize_params(params, recipe=search.recipe_of(space, assignment))
        final = jnp.concatenate([rollout(quantized, *batch) for batch in zip(*data, strict=True)])
        if vae is not None:
            latents = final / vae.model.scaling_factor + vae.model.shift_factor
            final = vae.model.apply({"params": vae.params}, latents, method="decode")
        expected = distance(features_fn(np.asarray(as_images(final)))["pool"], reference)
        # A pixel at a rounding edge may differ by one level.
        assert fitness == pytest.approx(expected, rel=1e-3)
    assert found[0] != found[1]


@pytest.mark.slow
def test_videos_are_measured_alike(network, reference):
    model, params = network
    rollout = small_rollout(model, 2)
    noise, label, keys = batches_of_noise(model, 1, 6)
    videos = noise.reshape(1, 2, 3, *noise.shape[2:])

    def sample_videos(params, noise, label, key):
        frames = noise.reshape(-1, *noise.shape[2:])
        final = rollout(params, frames, label.repeat(3), jnp.repeat(key, 3))
        return final.reshape(noise.shape)

    data = videos, label[:, :2], keys[:, :2]
    objective = frechet_objective(
        qdit.Checkpoint(model, params), sample_videos, data, features_fn, reference
    )
    space = small_space(params)
    found = search.Evaluator(space, params, objective)([1] * len(space.layers))
    recipe = search.recipe_of(space, [1] * len(space.layers))
    final = sample_videos(
        qdit.quantize_params(params, recipe=recipe), videos[0], label[0, :2], keys[0, :2]
    )
    assert final.ndim == 5
    expected = distance(features_fn(np.asarray(as_images(final)))["pool"], reference)
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_autoencoders_decode_videos_frame_by_frame():
    from qdit_jax.allocation.rollouts import decoded_images

    vae = small_vae(2)
    latents = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 2))
    found = decoded_images(vae.model, vae.params, latents)
    assert found.shape[:2] == (2, 3)
    assert found.dtype == jnp.uint8
    alone = decoded_images(vae.model, vae.params, latents[1])
    gap = np.abs(np.asarray(found[1], np.int32) - np.asarray(alone, np.int32))
    assert gap.max() <= 1
