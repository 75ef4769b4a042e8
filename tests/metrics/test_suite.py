"""All scores together, from a feature function given by the caller."""

from __future__ import annotations

import numpy as np
import pytest

from qdit_jax.metrics import (
    DEMO_FRECHET_DISTANCE,
    Reference,
    ScoreSettings,
    extract,
    frechet_distance,
    label,
    moments,
    scores,
    statistics,
)
from qdit_jax.metrics.names import LABELS

WIDTH = 6
PROJECTION = np.random.default_rng(9).normal(size=(4 * 4 * 3, WIDTH)) / 100


def toy_features(images: np.ndarray) -> dict[str, np.ndarray]:
    flat = images.reshape(len(images), -1) @ PROJECTION
    exponentials = np.exp(flat)
    probabilities = exponentials / exponentials.sum(1, keepdims=True)
    return {"pool": flat, "spatial": flat[:, :2], "probabilities": probabilities}


def toy_images(seed: int, count: int = 200, high: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, (count, 4, 4, 3), np.uint8)


def features_of(images: np.ndarray, batch_size: int = 64):
    return extract(
        toy_features, (images[i : i + batch_size] for i in range(0, len(images), batch_size))
    )


def test_features_do_not_depend_on_batches():
    images = toy_images(0)
    whole, parts = features_of(images, 200), features_of(images, 48)
    np.testing.assert_allclose(whole.pool, parts.pool, rtol=1e-6)
    np.testing.assert_allclose(whole.spatial.covariance, parts.spatial.covariance)
    np.testing.assert_allclose(whole.probabilities, parts.probabilities, rtol=1e-6)
    assert parts.spatial.count == len(images)


def test_spatial_moments_are_streamed(monkeypatch):
    monkeypatch.setattr("qdit_jax.metrics.suite.BLOCK_ROWS", 30)
    images = toy_images(3)
    expected = moments(toy_features(images)["spatial"].astype(np.float32))
    for batch_size in (7, 30, 64, 200):
        found = features_of(images, batch_size).spatial
        assert found.count == 200
        np.testing.assert_allclose(found.covariance, expected.covariance, rtol=1e-5)


def test_every_batch_has_one_shape():
    shapes = set()

    def spy(images):
        shapes.add(images.shape)
        return toy_features(images)

    extract(spy, (toy_images(0)[i : i + 48] for i in range(0, 200, 48)))
    assert shapes == {(48, 4, 4, 3)}


def test_all_scores_come_from_images():
    samples, real = features_of(toy_images(1, high=200)), features_of(toy_images(2))
    found = scores(samples, Reference(has_images=True), real)
    a, b = moments(real.pool), moments(samples.pool)
    expected = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    assert found["frechet_distance"] == pytest.approx(expected, rel=1e-9)
    assert set(LABELS) <= set(found)
    assert found["kernel_distance"] > 5 * found["kernel_distance_error"]
    assert found["num_samples"] == 200
    assert "inception_score_std" not in found
    split = scores(samples, Reference(has_images=True), real, ScoreSettings(split_size=60))
    assert split["inception_score_std"] > 0


def test_statistics_suffice_for_distances():
    samples, real = features_of(toy_images(1)), features_of(toy_images(2))
    reference = Reference(pool=statistics(moments(real.pool)), spatial=statistics(real.spatial))
    alone = scores(samples, reference)
    both = scores(samples, Reference(has_images=True), real)
    assert "precision" not in alone
    for name in ("frechet_distance", "spatial_frechet_distance", "inception_score"):
        assert alone[name] == pytest.approx(both[name], rel=1e-9)


def test_too_few_samples_get_a_sentence_and_a_way_out():
    few, real = features_of(toy_images(1, count=6)), features_of(toy_images(2))
    reference = Reference(pool=statistics(moments(real.pool)))
    with pytest.raises(ValueError, match="6 samples are too few: at least 7"):
        scores(few, reference)
    assert scores(few, reference, settings=ScoreSettings(min_samples=2))["frechet_distance"] > 0
    with pytest.raises(ValueError, match="neither statistics nor images"):
        scores(real, Reference())
    with pytest.raises(ValueError, match="no images"):
        extract(toy_features, [])


def test_only_inception_carries_the_published_names():
    assert label("frechet_distance", "inception") == "FID"
    assert label("frechet_distance", "demo") == DEMO_FRECHET_DISTANCE
    for score in LABELS:
        assert "FID" not in label(score, "demo")
        assert "demo features" in label(score, "demo")
