"""Scores of features that lie far out and close together, and of what is no feature at all."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from qdit_jax.metrics import (
    cosine,
    frechet_distance,
    frechet_infinity,
    inception_score,
    kid,
    kid_of_subsets,
    manifold_radii,
    moments,
    precision_and_recall,
    psnr,
    signal_to_noise_db,
    ssim,
)


def brute_force(reference, samples, k):
    def distances(a, b):
        return np.square(a[:, None] - b[None]).sum(-1)

    def share(points, centers):
        radii = np.sort(distances(centers, centers), axis=1)[:, k]
        return (distances(points, centers) <= radii).any(1).mean()

    return share(samples, reference), share(reference, samples)


def clusters(seed: int, spread: float, distance: float, count: int = 60, width: int = 16):
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(3, width))
    centers *= distance / np.linalg.norm(centers, axis=1, keepdims=True)
    one = lambda scale: (  # noqa: E731
        centers[rng.integers(0, 3, count)] + scale * rng.normal(size=(count, width))
    )
    return one(spread), one(1.1 * spread)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(("spread", "distance"), [(1e-3, 11), (1e-4, 11), (1e-3, 300)])
def test_precision_and_recall_of_tight_clusters_are_those_of_direct_differences(
    spread, distance, dtype
):
    reference, samples = (x.astype(dtype) for x in clusters(1, spread, distance))
    wanted = brute_force(reference.astype(np.float64), samples.astype(np.float64), 3)
    assert min(wanted) > 0.05
    assert max(wanted) < 0.95
    for block_rows in (7, 4096):
        found = precision_and_recall(reference, samples, block_rows=block_rows)
        assert found == pytest.approx(wanted)
    radii = np.sort(np.square(reference[:, None] - reference[None]).sum(-1), axis=1)[:, 3]
    tolerance = 1e-4 if dtype == np.float64 else 1e-3
    np.testing.assert_allclose(manifold_radii(reference, k=3), radii, rtol=tolerance)


def test_copies_lie_on_the_boundary_and_inside():
    x = np.random.default_rng(0).normal(size=(20, 6)) + 1000
    copies = np.repeat(x, 5, axis=0)
    assert precision_and_recall(copies, x) == (1, 1)
    assert (manifold_radii(copies) == 0).all()


def test_the_settings_of_the_caller_stay_as_they_are():
    x = np.random.default_rng(0).normal(size=(20, 6))
    before = jax.config.jax_enable_x64
    precision_and_recall(x, x)
    assert jax.config.jax_enable_x64 == before


def test_covariances_and_kernels_of_far_features_are_float64s():
    x, y = clusters(2, 1e-3, 1e3)
    a, b = moments(x), moments(y)
    np.testing.assert_allclose(a.covariance, np.cov((x - x.mean(0)).T), rtol=1e-6, atol=1e-9)
    shifted = [moments(z - x.mean(0)) for z in (x, y)]
    far = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    near = frechet_distance(
        shifted[0].mean, shifted[0].covariance, shifted[1].mean, shifted[1].covariance
    )
    assert far == pytest.approx(near, rel=1e-3)
    value, _ = kid(x.astype(np.float32), x.astype(np.float32) * np.float32(1 + 1e-6))
    assert np.isfinite(value)


X = np.random.default_rng(3).normal(size=(9, 4))
NAN = np.where(np.arange(36).reshape(9, 4) == 5, np.nan, X)
INF = np.where(np.arange(36).reshape(9, 4) == 5, np.inf, X)
MEAN, EYE = np.zeros(4), np.eye(4)
IMAGES = np.zeros((2, 16, 16, 3))
ONE_NAN = np.where(np.arange(IMAGES.size).reshape(IMAGES.shape) == 7, np.nan, IMAGES)
REFUSED = {
    "precision nan": (lambda: precision_and_recall(X, NAN), "samples: 1 of 36 values are NaN"),
    "precision inf": (lambda: precision_and_recall(INF, X), "reference: 1 of 36"),
    "precision axis": (lambda: precision_and_recall(X[:, 0], X), r"reference has shape \(9,\)"),
    "precision empty": (lambda: precision_and_recall(X, X[:0]), "samples has 0 samples"),
    "precision dims": (lambda: precision_and_recall(X, X[:, :2]), "4 and 2 values"),
    "radii nan": (lambda: manifold_radii(NAN), "features: 1 of 36"),
    "kid nan": (lambda: kid(NAN, X), "reference: 1 of 36"),
    "kid axis": (lambda: kid(X, X[0]), r"samples has shape \(4,\); features are \[N, D\]"),
    "kid one": (lambda: kid(X, X[:1]), "samples has 1 samples, which is too few"),
    "kid empty": (lambda: kid(X[:0], X), "reference has 0 samples"),
    "kid no width": (lambda: kid(X[:, :0], X[:, :0]), r"reference has shape \(9, 0\)"),
    "kid dims": (lambda: kid(X, X[:, :3]), "4 and 3 values"),
    "subsets nan": (lambda: kid_of_subsets(X, INF, subset_size=5), "samples: 1 of 36"),
    "subsets none": (lambda: kid_of_subsets(X, X, subset_size=5, num_subsets=0), "num_subsets=0"),
    "frechet mean": (
        lambda: frechet_distance(EYE, EYE, MEAN, EYE),
        r"mean_a has shape \(4, 4\); a mean is \[D\]",
    ),
    "frechet covariance": (
        lambda: frechet_distance(MEAN, EYE, MEAN, np.eye(3)),
        r"covariance_b has shape \(3, 3\); with mean_b of 4 features it is \[4, 4\]",
    ),
    "frechet flat": (
        lambda: frechet_distance(MEAN, np.ones(4), MEAN, EYE),
        r"covariance_a has shape \(4,\)",
    ),
    "frechet empty": (
        lambda: frechet_distance(np.ones(0), np.ones((0, 0)), np.ones(0), np.ones((0, 0))),
        r"mean_a has shape \(0,\)",
    ),
    "frechet nan": (lambda: frechet_distance(MEAN * np.nan, EYE, MEAN, EYE), "mean_a: 4 of 4"),
    "frechet inf": (
        lambda: frechet_distance(MEAN, EYE, MEAN, np.full((4, 4), np.inf)),
        "covariance_b: ",
    ),
    "infinity axis": (lambda: frechet_infinity(MEAN, EYE, X[0]), r"features has shape \(4,\)"),
    "infinity nan": (lambda: frechet_infinity(MEAN, EYE, NAN), "features: 1 of 36"),
    "moments axis": (lambda: moments(X[0]), r"features have shape \(4,\)"),
    "inception nan": (lambda: inception_score(np.full((3, 4), np.nan)), "12 of 12"),
    "inception axis": (lambda: inception_score(np.ones(4) / 4), r"probabilities has shape \(4,\)"),
    "snr nan": (lambda: signal_to_noise_db(IMAGES, ONE_NAN), "other: 1 of"),
    "cosine nan": (lambda: cosine(ONE_NAN, IMAGES), "reference: 1 of"),
    "psnr nan": (lambda: psnr(IMAGES, ONE_NAN), "other: 1 of"),
    "ssim nan": (lambda: ssim(ONE_NAN, IMAGES), "reference: 1 of"),
    "psnr empty": (lambda: psnr(IMAGES[:0], IMAGES[:0]), "there is no sample in it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_set_of_features_is_refused_by_the_arguments_name(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()
