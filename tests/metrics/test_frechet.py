"""Fréchet distance and streamed moments: goldens, closed forms, rank deficiency, extrapolation."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import scipy.linalg

from qdit_jax.metrics import frechet_distance, frechet_infinity, merge, moments
from qdit_jax.metrics.streaming import merge_all


def distance_of(a, b) -> float:
    a, b = moments(a), moments(b)
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def distance_from_features(a, b) -> float:
    """Returns the distance without forming a covariance: singular values of the samples' products."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    u, v = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b))
    overlap = np.linalg.svd(u @ v.T, compute_uv=False).sum()
    return np.square(a.mean(0) - b.mean(0)).sum() + (u**2).sum() + (v**2).sum() - 2 * overlap


def test_distances_equal_the_published_evaluator(golden):
    g = np.load(golden("fid_metrics.npz"))
    ref, sample = g["feats_ref"], g["feats_sample"]
    given = frechet_distance(g["mu_ref"], g["sigma_ref"], g["mu_sample"], g["sigma_sample"])
    assert given == pytest.approx(g["fid_sample_vs_ref"], rel=1e-6)
    assert distance_of(sample, ref) == pytest.approx(g["fid_eig_f64"], rel=1e-9)
    assert distance_of(ref, ref) == pytest.approx(0, abs=1e-9)
    few = ref[: int(g["rankdef_num_samples"])]
    # The reference's eigenvalues of A B carry the roots of rounding noise, about 7e-7 in all.
    assert distance_of(few, sample) == pytest.approx(g["fid_rankdef_eig_f64"], rel=1e-7)
    assert distance_of(few, sample) == pytest.approx(distance_from_features(few, sample), rel=1e-12)
    assert distance_of(few, sample) == pytest.approx(g["fid_rankdef"], rel=1e-6)


def test_moments_equal_the_golden_statistics(golden):
    g = np.load(golden("fid_metrics.npz"))
    m = moments(g["feats_ref"])
    np.testing.assert_allclose(m.mean, g["mu_ref"], rtol=1e-6)
    np.testing.assert_allclose(m.covariance, g["sigma_ref"], atol=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_merged_parts_equal_the_whole(offset):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, 7)) @ rng.normal(size=(7, 7)) + offset
    parts = [moments(p) for p in np.split(x, [1, 2, 400])]
    total = merge(merge(parts[0], parts[1]), merge(parts[3], parts[2]))
    np.testing.assert_allclose(total.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(total.covariance, np.cov(x, rowvar=False), rtol=1e-8, atol=1e-8)
    assert total.count == 1000


def test_streaming_holds_one_block_in_memory():
    rng = np.random.default_rng(5)
    batches = (rng.normal(size=(500, 128)) for _ in range(100))  # 51 MB in all
    tracemalloc.start()
    total = merge_all(moments(batch) for batch in batches)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total.count == 50_000
    assert peak < 5e6
    np.testing.assert_allclose(total.covariance, np.eye(128), atol=0.03)


def test_distance_equals_the_matrix_square_root():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(200, 20)) ** 2, rng.normal(size=(300, 20)) @ rng.normal(size=(20, 20))
    sa, sb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(sa @ sb).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(sa + sb - 2 * root)
    assert distance_of(a, b) == pytest.approx(expected, rel=1e-9)


def test_distance_of_commuting_gaussians_has_its_closed_form():
    rng = np.random.default_rng(2)
    q = np.linalg.qr(rng.normal(size=(9, 9)))[0]
    s, t = rng.uniform(0, 3, 9), rng.uniform(0, 3, 9)
    s[:3] = 0  # singular
    mean = rng.normal(size=9)
    found = frechet_distance(mean, q * s**2 @ q.T, np.zeros(9), q * t**2 @ q.T)
    assert found == pytest.approx(np.square(mean).sum() + np.square(s - t).sum(), rel=1e-9)


def test_distance_is_symmetric_and_zero_for_equal_rank_deficient_statistics():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(6, 40)), 1 + rng.normal(size=(9, 40))
    assert distance_of(a, b) == pytest.approx(distance_of(b, a), rel=1e-10)
    assert distance_of(a, a) == pytest.approx(0, abs=1e-10)


def test_distance_survives_statistics_rounded_to_float32():
    rng = np.random.default_rng(8)
    a, b = (moments(rng.normal(size=(n, 64)) + shift) for n, shift in ((40, 0), (500, 1)))
    exact = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    rounded = [np.float32(x) for x in (a.mean, a.covariance, b.mean, b.covariance)]
    assert frechet_distance(*rounded) == pytest.approx(exact, rel=1e-4)


def test_extrapolation_removes_most_of_the_bias():
    rng = np.random.default_rng(4)
    features = rng.normal(size=(1500, 30))
    mean, covariance = np.full(30, 0.1), np.eye(30)
    truth = 0.3
    limit = frechet_infinity(mean, covariance, features)
    raw = limit.distances[-1]
    assert limit.sizes[0] == 150
    assert limit.sizes[-1] == 1500
    assert raw - truth > 0.1
    assert abs(limit.value - truth) < 0.35 * (raw - truth)
    assert 0 < limit.standard_error < 0.1
    assert limit == frechet_infinity(mean, covariance, features)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: moments(np.zeros((0, 3))), "empty"),
        (lambda: moments(np.array([[1.0, np.nan]])), "1 of 1 features are NaN"),
        (lambda: moments(np.ones((1, 3))).covariance, "at least 2 samples"),
        (lambda: merge(moments(np.ones((2, 3))), moments(np.ones((2, 4)))), "3 and 4 features"),
        (
            lambda: frechet_distance(np.ones(2), np.eye(2), np.ones(3), np.eye(3)),
            "2 and 3 features",
        ),
        (lambda: frechet_distance(np.ones(2), -np.eye(2), np.ones(2), np.eye(2)), "negative var"),
        (
            lambda: frechet_distance(np.ones(2), 2 - np.eye(2), np.ones(2), np.eye(2)),
            "negative eig",
        ),
        (
            lambda: frechet_distance(np.ones(2), np.triu(np.ones((2, 2))), np.ones(2), np.eye(2)),
            "not symm",
        ),
        (lambda: frechet_distance(np.ones(2), np.nan * np.eye(2), np.ones(2), np.eye(2)), "NaN"),
        (lambda: frechet_infinity(np.ones(2), np.eye(2), np.ones((5, 2))), "too few"),
    ],
)
def test_bad_input_gets_a_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()
