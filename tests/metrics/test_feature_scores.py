"""Inception Score, precision and recall, KID: goldens, laws, float64 oracles."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from scipy.special import softmax

from qdit_jax.metrics import (
    inception_score,
    kid,
    kid_of_subsets,
    manifold_radii,
    precision_and_recall,
)
from qdit_jax.metrics.kernel_distance import kernel
from qdit_jax.metrics.manifold import nearest


def test_inception_score_equals_the_published_evaluator(golden):
    g = np.load(golden("fid_metrics.npz"))
    logits = g["feats_sample"].astype(np.float64) @ g["softmax_weight"].astype(np.float64)
    probabilities = softmax(logits, axis=1)
    for split_size in (5000, 128):
        expected = g[f"inception_score_split{split_size}"]
        assert inception_score(probabilities, split_size=split_size)[0] == pytest.approx(
            expected, rel=1e-5
        )


def test_inception_score_of_extremes():
    num_classes = 6
    assert inception_score(np.eye(num_classes))[0] == pytest.approx(num_classes)
    assert inception_score(np.full((10, num_classes), 1 / num_classes)) == pytest.approx((1, 0))
    assert inception_score(np.eye(num_classes)[[0] * 8])[0] == pytest.approx(1)


def test_precision_and_recall_equal_the_published_evaluator(golden):
    g = np.load(golden("fid_metrics.npz"))
    ref, sample = g["feats_ref"], g["feats_sample"]
    assert precision_and_recall(ref, sample, k=3) == (g["precision"], g["recall"])
    # `radii` of the goldens may be stored squared or not; ours are squared.
    for name, features in (("ref", ref), ("sample", sample)):
        np.testing.assert_allclose(
            manifold_radii(features, k=3), g[f"radii_{name}"][:, 0], rtol=1e-4
        )


def brute_force(reference: np.ndarray, samples: np.ndarray, k: int) -> tuple[float, float]:
    def distances(a, b):
        return np.square(a[:, None] - b[None]).sum(-1)

    def share(points, centers):
        radii = np.sort(distances(centers, centers), axis=1)[:, k]
        return (distances(points, centers) <= radii).any(1).mean()

    return share(samples, reference), share(reference, samples)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("block_rows", [16, 37, 4096])
def test_blocks_do_not_change_precision_and_recall(k, block_rows):
    rng = np.random.default_rng(k)
    reference, samples = rng.normal(size=(101, 8)), 0.8 * rng.normal(size=(75, 8)) + 0.5
    found = precision_and_recall(reference + 100, samples + 100, k=k, block_rows=block_rows)
    assert found == pytest.approx(brute_force(reference, samples, k))


def test_a_set_covers_itself_and_not_a_distant_one():
    x = np.random.default_rng(0).normal(size=(60, 5))
    assert precision_and_recall(x, x) == (1, 1)
    assert precision_and_recall(x, x + 100) == (0, 0)
    assert precision_and_recall(np.repeat(x, 5, axis=0), x) == (1, 1)


def test_blocks_compile_once():
    rng = np.random.default_rng(0)
    manifold_radii(rng.normal(size=(200, 3)), block_rows=32)
    before = nearest._cache_size()
    manifold_radii(rng.normal(size=(220, 3)), block_rows=32)
    assert nearest._cache_size() == before
    assert jax.devices()


def test_kid_equals_its_definition():
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(23, 6)), rng.normal(size=(17, 6)) + 0.3
    kx, ky, kxy = kernel(x, x), kernel(y, y), kernel(x, y)
    off = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (kx, ky)]
    value, error = kid(x, y)
    assert value == pytest.approx(off[0] + off[1] - 2 * kxy.mean(), rel=1e-9)
    leave_x = np.array([kid(np.delete(x, i, 0), y)[0] for i in range(23)])
    leave_y = np.array([kid(x, np.delete(y, i, 0))[0] for i in range(17)])
    assert error == pytest.approx(np.sqrt(22 * leave_x.var() + 16 * leave_y.var()), rel=1e-9)


def test_kid_is_unbiased_and_its_error_is_its_spread():
    rng = np.random.default_rng(6)
    draws = np.array(
        [kid(rng.normal(size=(80, 4)), 1.2 * rng.normal(size=(80, 4)) + 0.4) for _ in range(300)]
    )
    null = np.array(
        [kid(rng.normal(size=(80, 4)), rng.normal(size=(80, 4)))[0] for _ in range(300)]
    )
    assert abs(null.mean()) < 3 * null.std() / np.sqrt(300)
    assert draws[:, 1].mean() == pytest.approx(draws[:, 0].std(), rel=0.15)


def test_kid_of_subsets_agrees_with_all_pairs():
    rng = np.random.default_rng(7)
    x, y = rng.normal(size=(300, 5)), rng.normal(size=(280, 5)) + 0.5
    mean, spread = kid_of_subsets(x, y, num_subsets=60, subset_size=100)
    value, _ = kid(x, y)
    assert abs(mean - value) < 4 * spread / np.sqrt(60)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: inception_score(np.ones((3, 4))), "after the softmax"),
        (lambda: inception_score(np.eye(3), split_size=0), "split_size=0"),
        (lambda: precision_and_recall(np.ones((3, 2)), np.ones((9, 2))), "k=3; use more samples"),
        (
            lambda: precision_and_recall(np.ones((9, 2)), np.ones((9, 3))),
            "different feature networks",
        ),
        (lambda: kid(np.ones((2, 2)), np.ones((9, 2))), "too few"),
        (lambda: kid(np.ones((9, 2)), np.ones((9, 3))), "different feature networks"),
        (lambda: kid_of_subsets(np.ones((9, 2)), np.ones((9, 2))), "subset_size=1000"),
    ],
)
def test_bad_input_gets_a_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()
