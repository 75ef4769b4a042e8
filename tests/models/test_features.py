"""The packaged digit features: sizes, what they tell apart, errors."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdit_jax.metrics import frechet_distance, moments, read_reference
from qdit_jax.models import (
    DEMO_SIZE,
    DEMO_STATISTICS,
    DEMO_WEIGHTS,
    DigitFeatures,
    asset,
    demo_features_fn,
)
from qdit_jax.models.features import load_params


@pytest.fixture(scope="module")
def features_fn():
    return demo_features_fn()


@pytest.fixture(scope="module")
def digits():
    """Returns scikit-learn's own digits enlarged to the demo's size: none of the training images."""
    if importlib.util.find_spec("sklearn") is None:
        pytest.skip("scikit-learn is absent")
    from PIL import Image
    from sklearn.datasets import load_digits

    data = load_digits()
    box = Image.Resampling.BICUBIC
    scaled = [
        np.asarray(Image.fromarray(np.uint8(i * 255 / 16)).resize((DEMO_SIZE, DEMO_SIZE), box))
        for i in data.images[:600]
    ]
    return np.stack(scaled)[..., None], data.target[:600]


def distance_to_reference(features: np.ndarray) -> float:
    reference = read_reference(str(asset(DEMO_STATISTICS))).pool
    found = moments(features)
    return frechet_distance(reference.mean, reference.covariance, found.mean, found.covariance)


def test_packaged_files_fit_together(features_fn):
    reference = read_reference(str(asset(DEMO_STATISTICS)))
    assert asset(DEMO_WEIGHTS).stat().st_size < 500_000
    assert reference.features == "demo"
    assert reference.num_images >= 1000
    found = features_fn(np.zeros((2, DEMO_SIZE, DEMO_SIZE, 1), np.uint8))
    assert found["pool"].shape == (2, reference.pool.mean.size)
    np.testing.assert_allclose(found["probabilities"].sum(-1), 1, rtol=1e-5)


def test_packaged_weights_are_those_of_the_network():
    stored = load_params(asset(DEMO_WEIGHTS).read_bytes())
    x = jnp.zeros((1, DEMO_SIZE, DEMO_SIZE, 1))
    fresh = jax.eval_shape(DigitFeatures().init, jax.random.key(0), x)["params"]
    shapes = [jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (stored, fresh)]
    assert shapes[0] == shapes[1]


def test_weights_of_other_digits_are_recognized(features_fn, digits):
    images, labels = digits
    guesses = np.asarray(features_fn(images)["probabilities"]).argmax(1)
    assert (guesses == labels).mean() > 0.7


def test_distance_grows_with_damage(features_fn, digits):
    images, _ = digits
    rng = np.random.default_rng(0)
    distances = [
        distance_to_reference(
            features_fn(
                np.clip(images + rng.normal(0, sigma, images.shape), 0, 255).astype(np.uint8)
            )["pool"]
        )
        for sigma in (0, 40, 90, 180)
    ]
    assert distances == sorted(distances)
    noise = rng.integers(0, 256, images.shape).astype(np.uint8)
    assert distance_to_reference(features_fn(noise)["pool"]) > distances[0]


def test_gray_copies_equal_one_channel(features_fn):
    images = np.random.default_rng(1).integers(0, 256, (3, DEMO_SIZE, DEMO_SIZE, 1), np.uint8)
    one, three = features_fn(images), features_fn(images.repeat(3, -1))
    np.testing.assert_allclose(one["pool"], three["pool"], rtol=1e-6)


def test_other_pictures_are_refused(features_fn):
    with pytest.raises(
        ValueError, match="images are 28x28; the demo features take digits of 16x16"
    ):
        features_fn(np.zeros((1, 28, 28, 1), np.uint8))
    color = np.random.default_rng(1).integers(0, 256, (1, DEMO_SIZE, DEMO_SIZE, 3), np.uint8)
    with pytest.raises(ValueError, match="in color"):
        features_fn(color)
