"""Two levels of scales and the learned codebook, against float64."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdit_jax.quant import (
    WeightSpec,
    adaround,
    dequantize,
    fake_quantize_kernel_traced,
    formats,
    gptq,
    integer_codes,
    level_rows,
    output_error,
    qdit_release_gptq,
    quantize,
    ranges,
)

K, N = 100, 10  # three groups of 32 and a shorter one
LUT4 = WeightSpec(fmt=formats.lut4, group_size=16)
SPECS = {
    "4 bits": WeightSpec(4, 32, scale_levels=2),
    "2 bits": WeightSpec(2, 32, scale_levels=2),
    "3 bits symmetric": WeightSpec(3, 32, symmetric=True, scale_levels=2),
    "5 bits channel": WeightSpec(5, 0, scale_levels=2),
    "6 bits mse": WeightSpec(6, 48, range_fn=ranges.mse(9), scale_levels=2),
    "channel groups": WeightSpec(4, 32, channel_group=5, scale_levels=2),
    "lut4": LUT4,
}
every_spec = pytest.mark.parametrize("name", SPECS)


def kernel(seed=0, std=1.0):
    """Returns a kernel with outliers, and with channels and groups of every awkward kind."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(K, N))
    w[[3, 40, 77]] *= np.array([[10.0], [20.0], [50.0]])
    w[:, 0] = 0
    w[:, 1] = -0.3
    w[:, 2] = np.abs(w[:, 2]) + 0.1
    w[:32, 3] = 0
    w[32:64, 3] = 0.7
    w[:, 4] *= 1e-12
    w[:, 5] *= 1e12
    w[:, 6] = rng.standard_t(3, size=K)
    w[50, 7] = 1e4
    return (w * std).astype(np.float32)


def wide(values, group_size):
    """Returns one value per weight from one per group and channel group, in float64."""
    size = min(group_size or K, K)
    rows = np.repeat(np.asarray(values, np.float64), size, axis=0)[:K]
    return np.repeat(rows, N // rows.shape[1], axis=1)


def entries(q):
    """Returns the level of every code `[2**bits, K, N]` from the stored fields, float64."""
    codes = np.arange(2**q.bits)[:, None, None]
    step = wide(q.scale, q.group_size)
    if q.codebook is not None:
        # The product is rounded to float32 before it is rounded to a whole number.
        products = np.float32(q.codebook)[:, None, None] * np.float32(step)
        return np.clip(np.rint(products), -127, 127).astype(np.float64)
    offset = 128 - 2 ** (q.bits - 1) * step if q.symmetric else wide(q.offset, q.group_size)
    return codes * step + offset - 128


def unit(q):
    return np.repeat(np.asarray(q.channel_scale, np.float64), q.channel_group)


def relative_error(w, q):
    w = np.asarray(w, np.float64)
    return np.linalg.norm(np.asarray(dequantize(q), np.float64) - w) / np.linalg.norm(w)


@every_spec
def test_values_are_levels_of_a_byte_times_the_scale_of_the_channel(name):
    q = quantize(kernel(), SPECS[name])
    table = entries(q)
    assert table.min() >= -128
    assert table.max() <= 127
    assert q.scale.dtype == jnp.uint8
    assert np.asarray(q.scale).min() >= 1
    level = np.take_along_axis(table, np.asarray(integer_codes(q), int)[None], axis=0)[0]
    np.testing.assert_array_equal(level_rows(q).T, level)
    np.testing.assert_array_equal(np.asarray(dequantize(q), np.float64), level * unit(q))


@every_spec
def test_every_weight_takes_the_nearest_level_of_its_group(name):
    w = kernel()
    q = quantize(w, SPECS[name])
    targets = w.astype(np.float64) / unit(q)
    least = np.abs(targets - entries(q)).min(axis=0)
    found = np.abs(targets - np.asarray(level_rows(q).T))
    # A tie may fall either way, a few units in the last place apart.
    np.testing.assert_allclose(found, least, rtol=1e-4, atol=1e-4)


def least_error(targets, codes, most):
    """Returns the least squared error of a group with any step and offset, by trying all."""
    found = np.inf
    for step in range(1, most + 1):
        for lowest in range(-127, 128 - codes * step):
            code = np.clip(np.rint((targets - lowest) / step), 0, codes)
            found = min(found, np.square(targets - (code * step + lowest)).sum())
    return found


def test_steps_and_offsets_are_nearly_the_best():
    w = np.random.default_rng(3).normal(size=(256, 4)).astype(np.float32)
    q = quantize(w, WeightSpec(4, 32, scale_levels=2))
    targets = w / np.asarray(q.channel_scale, np.float64)
    found = np.square(targets - np.asarray(level_rows(q).T)).reshape(8, 32, 4).sum(1)
    groups = targets.reshape(8, 32, 4)
    best = [[least_error(groups[g, :, n], 15, 16) for n in range(4)] for g in range(8)]
    assert (found >= np.array(best) - 1e-3).all()
    assert found.sum() < 1.15 * np.sum(best)


@pytest.mark.parametrize("bits", [4, 5, 6])
@pytest.mark.parametrize("group_size", [32, 33, 0])
def test_quantizing_again_changes_nothing(bits, group_size):
    spec = WeightSpec(bits, group_size, scale_levels=2)
    for seed, std in enumerate((1.0, 1e-20, 3e20)):
        once = dequantize(quantize(kernel(seed, std / 1e12), spec))
        np.testing.assert_array_equal(dequantize(quantize(once, spec)), once)


@every_spec
@pytest.mark.parametrize("std", [1e-30, 1e-10, 1e10, 1e30])
def test_small_and_large_kernels_keep_their_precision(name, std):
    w = np.random.default_rng(0).normal(size=(K, N)).astype(np.float32)
    exact = relative_error(w, quantize(w, SPECS[name]))
    assert relative_error(w * np.float32(std), quantize(w * np.float32(std), SPECS[name])) < (
        1.05 * exact
    )


@every_spec
def test_subnormal_and_greatest_weights_stay_finite(name):
    w = np.zeros((K, N), np.float32)
    w[:, 1] = 1e-40
    w[5, 2], w[6, 2] = 2.0**126, -(2.0**126)
    w[:, 3] = np.random.default_rng(0).normal(size=K) * 1e-38
    q = quantize(w, SPECS[name])
    found = np.asarray(dequantize(q), np.float64)
    assert np.isfinite(found).all()
    if q.channel_group == 1:
        assert (found[:, 0] == 0).all()
        assert np.abs(found[:, 1] - 1e-40).max() < 2.0**-126
    np.testing.assert_allclose(found[[5, 6], 2], w[[5, 6], 2], rtol=0.12)


@pytest.mark.parametrize(
    ("spec", "normal", "heavy"),
    [
        (WeightSpec(4, 32, scale_levels=2), 0.077, 0.091),
        (WeightSpec(4, 32, scale_dtype="float16"), 0.084, 0.098),
        (LUT4, 0.0715, 0.0795),
    ],
    ids=["two levels", "one level", "lut4"],
)
def test_relative_errors_of_4_bits(spec, normal, heavy):
    rng = np.random.default_rng(1)
    w = rng.normal(size=(512, 256))
    assert relative_error(w, quantize(np.float32(w), spec)) < normal
    w = rng.standard_t(5, size=(512, 256))
    assert relative_error(w, quantize(np.float32(w), spec)) < heavy


def test_a_codebook_is_learned_from_the_kernel_and_holds_0():
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(256, 64))
    for w in (normal, np.abs(normal), np.sign(normal), np.zeros((256, 64))):
        q = quantize(np.float32(w), LUT4)
        again = quantize(np.float32(w), LUT4)
        jax.tree.map(np.testing.assert_array_equal, q, again)
        codebook = np.asarray(q.codebook)
        assert (np.diff(codebook) >= 0).all()
        assert codebook[7] == 0
    w = np.float32(rng.uniform(-1, 1, size=(256, 64)))
    fixed = WeightSpec(fmt=formats.nf4, group_size=16)
    assert relative_error(w, quantize(w, LUT4)) < 0.8 * relative_error(w, quantize(w, fixed))


def inputs(seed=0):
    x = np.random.default_rng(seed).normal(size=(400, K))
    x[:, ::9] *= 10
    x[:, 1::3] += x[:, ::3][:, : x[:, 1::3].shape[1]]
    return x


@pytest.mark.parametrize("name", ["4 bits", "3 bits symmetric", "channel groups"])
@pytest.mark.parametrize("round_fn", [gptq, adaround], ids=["gptq", "adaround"])
def test_learned_rounding_stays_on_the_grid_and_lowers_the_output_error(name, round_fn):
    w = np.random.default_rng(2).normal(size=(K, N)).astype(np.float32)
    hessian = np.float32(inputs().T @ inputs())
    nearest, learned = quantize(w, SPECS[name]), round_fn(w, hessian, SPECS[name])
    for field in ("scale", "offset", "channel_scale"):
        jax.tree.map(
            np.testing.assert_array_equal, getattr(learned, field), getattr(nearest, field)
        )
    assert output_error(w, learned, hessian) < 0.8 * output_error(w, nearest, hessian)


def test_gptq_is_the_algorithm_in_float64():
    w = np.random.default_rng(5).normal(size=(K, N))
    x = inputs(1)
    hessian, spec = x.T @ x, SPECS["4 bits"]
    q = gptq(np.float32(w), np.float32(hessian), spec)
    order = np.argsort(-np.diag(np.float32(hessian)), kind="stable")
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(K)
    inverse = np.linalg.inv(damped[order][:, order])
    factor = np.linalg.cholesky(inverse).T  # upper triangular, inverse = factor.T @ factor
    table, scale = entries(q), unit(q)
    left, codes = w[order].copy(), np.zeros((K, N), int)
    for i, channel in enumerate(order):
        values = table[:, channel] * scale  # [codes, N]
        codes[channel] = np.abs(values - left[i]).argmin(axis=0)
        error = (left[i] - np.take_along_axis(values, codes[channel][None], 0)[0]) / factor[i, i]
        left[i:] -= factor[i, i:][:, None] * error
    assert np.mean(codes == np.asarray(integer_codes(q))) > 0.99


def test_traced_weights_that_are_not_finite_spoil_their_channels_alone():
    w = kernel()
    w[70, 6] = np.nan
    for spec in (SPECS["4 bits"], LUT4):
        found = jax.jit(lambda w, s=spec: dequantize(quantize(w, s)))(w)
        assert np.isnan(found[:, 6]).all()
        assert np.isfinite(np.delete(np.asarray(found), 6, axis=1)).all()


def test_settings_are_read_back_and_absent_ones_mean_one_level():
    for spec in SPECS.values():
        assert WeightSpec.from_json(spec.to_json()) == spec
    assert "scale_levels" not in WeightSpec(4, 32).to_json()
    assert WeightSpec.from_json({"bits": 4}).scale_levels == 1
    assert hash(SPECS["4 bits"]) != hash(dataclasses.replace(SPECS["4 bits"], scale_levels=1))


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="scale_levels=3 is not supported; use 1 or 2"):
        WeightSpec(4, 32, scale_levels=3)
    with pytest.raises(ValueError, match="scale_levels=2 with bits=8 is not supported"):
        WeightSpec(8, 32, scale_levels=2)
    with pytest.raises(ValueError, match="not for the format 'nf4'"):
        WeightSpec(fmt=formats.nf4, scale_levels=2)
    with pytest.raises(ValueError, match="'lut4' has a table per kernel"):
        formats.lut4.values()
    w, hessian = kernel(), np.eye(K, dtype=np.float32)
    with pytest.raises(ValueError, match="not to the format 'lut4'"):
        gptq(w, hessian, LUT4)
    with pytest.raises(ValueError, match="scale_levels=2 is not in the release"):
        qdit_release_gptq(w, hessian, SPECS["4 bits"])
    with pytest.raises(ValueError, match="'scale_levels=2' has no form with a traced group size"):
        fake_quantize_kernel_traced(w, SPECS["4 bits"], 0, (32, 64))
