"""Range rules against float64 NumPy, and what each is for."""

import jax.numpy as jnp
import numpy as np
import pytest

from qdit_jax.quant import WeightSpec, dequantize, grid_search, powers, quantize, ranges


def outlier_kernel(rows=128, width=6):
    rng = np.random.default_rng(0)
    w = rng.standard_t(3, size=(rows, width)).astype(np.float32)
    w[5] *= 10
    return w


def round_trip(w, low, high, bits):
    """Returns `w` quantized asymmetrically on `[low, high]` in float64."""
    scale = (high - low) / (2**bits - 1)
    zero_point = np.clip(np.round(-low / scale), 0, 2**bits - 1)
    codes = np.clip(np.round(w / scale) + zero_point, 0, 2**bits - 1)
    return (codes - zero_point) * scale


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_minmax_is_numpy_s(bits):
    w = outlier_kernel()
    low, high = w.min(0).astype(np.float64), w.max(0).astype(np.float64)
    restored = dequantize(quantize(w, WeightSpec(bits, 0)))
    np.testing.assert_allclose(restored, round_trip(w, low, high, bits), atol=2e-6)


def test_percentile_is_numpy_s():
    w = outlier_kernel()
    low, high = np.quantile(w.astype(np.float64), [0.05, 0.95], axis=0)
    restored = dequantize(quantize(w, WeightSpec(4, 0, range_fn=ranges.percentile(0.95))))
    expected = round_trip(w, low, high, 4)
    assert np.mean(np.abs(restored - expected) < 1e-5) > 0.995


@pytest.mark.parametrize(("rows", "norm"), [(128, 2.0), (37, 2.4), (37, 1.0)])
def test_mse_finds_the_best_ratio_of_its_grid(rows, norm):
    w = outlier_kernel(rows)
    rule = ranges.mse(num_points=40, max_shrink=0.8, norm=norm)
    low, high = w.min(0).astype(np.float64), w.max(0).astype(np.float64)
    scores = np.array(
        [
            (np.abs(round_trip(w, low * r, high * r, 3) - w) ** norm).mean(0)
            for r in grid_search.grid_of(rule)
        ]
    )
    restored = np.asarray(dequantize(quantize(w, WeightSpec(3, 0, range_fn=rule))), np.float64)
    chosen = (np.abs(restored - w) ** norm).mean(0)
    np.testing.assert_allclose(chosen, scores.min(0), rtol=2e-4)
    assert (chosen <= scores[0] * (1 + 1e-6)).all()
    assert (chosen < 0.95 * scores[0]).any()


def test_a_search_over_many_groups_is_that_of_each_alone(monkeypatch):
    monkeypatch.setattr(grid_search, "BLOCK", 7)
    rule = ranges.mse(num_points=11)
    w = np.random.default_rng(1).normal(size=(30, 13)).astype(np.float32)
    args = {"bits": 4, "symmetric": True}
    whole = grid_search.best_ratio(jnp.asarray(w), *rule_limits(w), rule, **args)
    for column in (0, 6, 12):
        part = w[:, column : column + 1]
        alone = grid_search.best_ratio(jnp.asarray(part), *rule_limits(part), rule, **args)
        assert alone[0] == whole[column]


def rule_limits(w):
    return ranges.minmax.limits(jnp.asarray(w), 4, True, 0)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0, 2.4, 3.0])
def test_power_is_close_and_harmless_at_zero(exponent):
    x = np.concatenate([[0.0], np.logspace(-12, 3, 2000)]).astype(np.float32)
    result = np.asarray(powers.power(jnp.asarray(x), exponent), np.float64)
    np.testing.assert_allclose(result, x.astype(np.float64) ** exponent, rtol=2e-5, atol=2**-60)


@pytest.mark.parametrize("exponent", [1.5, 2.4, 3.0])
def test_a_root_polynomial_is_close_up_to_its_limit(exponent):
    limit = grid_search.greatest_error(ranges.qdit_release_mse, 4)
    fit = powers.root_polynomial(exponent, limit)
    x = np.random.default_rng(0).uniform(0, limit, 4000).astype(np.float32)
    x[:3] = 0, 1e-9, limit
    found = np.asarray(powers.by_root(fit, jnp.asarray(x)), np.float64)
    wanted = x.astype(np.float64) ** exponent
    assert (np.abs(found - wanted) < 2e-6 * (wanted + 0.5**exponent / (1 + exponent))).all()


def test_a_power_without_a_near_polynomial_has_none():
    assert powers.root_polynomial(0.3, 3.0) is None


def test_the_released_grid_is_searched_right_for_groups_far_off_zero():
    w = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)
    w[:, 1] += 50  # the whole group lies off the grid, which begins at 0
    w[:, 2] -= 9
    w[0, 3] *= 40
    w[:, 4] = 2.5
    found = np.asarray(dequantize(quantize(w, WeightSpec(4, 32, range_fn=ranges.qdit_release_mse))))
    for column, chosen in zip(w.T.astype(np.float64), found.T, strict=True):
        scores = [released_score(column, r) for r in grid_search.grid_of(ranges.qdit_release_mse)]
        error = (np.abs(chosen - column) ** 2.4).sum()
        np.testing.assert_allclose(error, min(scores), rtol=1e-4, atol=1e-9)


def released_score(w, ratio):
    low, high = w.min() * ratio, w.max() * ratio
    scale = max(high - low, 1e-5) / 15
    zero = np.clip(np.round(-low / scale), 0, 15)
    return (np.abs((np.clip(np.round(w / scale) + zero, 0, 15) - zero) * scale - w) ** 2.4).sum()


def test_the_released_rule_loses_groups_away_from_zero_and_ours_does_not():
    w = 5 + np.random.default_rng(0).random((32, 1), np.float32)
    released = dequantize(quantize(w, WeightSpec(4, 32, range_fn=ranges.qdit_release)))
    ours = dequantize(quantize(w, WeightSpec(4, 32)))
    assert float(jnp.abs(released - 1).max()) < 0.05
    assert float(jnp.abs(ours - w).max()) < 0.21


def test_an_all_zero_group_has_scale_one():
    q = quantize(jnp.zeros((64, 2)), WeightSpec(4, 32))
    assert bool((q.scale == 1).all())
    assert bool((dequantize(q) == 0).all())


def test_absmax_is_centered():
    w = jnp.linspace(-1, 3, 64)[:, None]
    assert int(quantize(w, WeightSpec(4, 0, range_fn=ranges.absmax)).zero_point[0, 0]) == 8
