"""Number formats of inputs with calibrated scales: the definition, saturation, tables, both numerics."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import qdit_jax as qdit
from qdit_jax.quant import (
    ActQuant,
    ActSpec,
    WeightSpec,
    fake_quantize,
    formats,
    quantize,
    static_act_quant,
)
from qdit_jax.quant.leaves import LEAVES

DTYPES = {"fp8_e4m3": ml_dtypes.float8_e4m3fn, "fp8_e5m2": ml_dtypes.float8_e5m2}
STATIC = [name for name, fmt in formats.FORMATS.items() if fmt.has_calibrated_scale]


def tokens(seed=0, channels=64):
    return np.random.default_rng(seed).standard_normal((3, 5, channels)).astype(np.float32)


def static(name, scale, group_size=0):
    spec = ActSpec(group_size=group_size, fmt=formats.by_name(name), mode="static")
    return ActQuant(spec, jnp.asarray(scale, jnp.float32))


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("scale", [0.0031, 0.5, 1.0])
def test_fp8_is_the_definition_and_saturates(name, scale):
    x = tokens()
    x[0, 0, :2] = 9e5, -9e5
    top = float(ml_dtypes.finfo(DTYPES[name]).max)
    steps = np.clip(x / np.float32(scale), -top, top)
    expected = steps.astype(DTYPES[name]).astype(np.float64) * np.float64(np.float32(scale))
    found = jax.jit(lambda x: static(name, [scale])(x))(x)
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("group_size", [0, 32])
@pytest.mark.parametrize("name", STATIC)
def test_the_range_of_one_token_gives_what_is_dynamic_for_it(name, group_size):
    fmt, x = formats.by_name(name), jnp.asarray(tokens()[:1, :1])
    spec = ActSpec(group_size=group_size, fmt=fmt, mode="static")
    groups = np.asarray(x).reshape(-1, spec.static_group_size or 64)
    quantizer = static_act_quant(groups.min(axis=1), groups.max(axis=1), spec)
    assert quantizer.scale.shape == (1 if fmt.has_tensor_scale else 64 // (group_size or 64),)
    dynamic = fake_quantize(x, ActSpec(group_size=group_size, fmt=fmt))
    np.testing.assert_array_equal(quantizer(x), dynamic)


@pytest.mark.parametrize("name", ["fp8_e4m3", "nvfp4"])
def test_a_table_gives_each_sample_its_row(name):
    x, table = jnp.asarray(tokens()), static(name, [[0.01], [0.02], [0.05]])
    assert table.is_table
    rows = [static(name, [scale])(x) for scale in (0.01, 0.02, 0.05)]
    per_sample = table.at(jnp.array([2, 0, 1]))(x)
    np.testing.assert_array_equal(per_sample, [rows[2][0], rows[0][1], rows[1][2]])
    with pytest.raises(ValueError, match="table of 3 rows; pick one"):
        table(x)


@pytest.mark.parametrize("weights", ["fp8_e4m3", "nvfp4", "int8"])
@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "fp4_e2m1", "nvfp4"])
def test_both_numerics_multiply_what_was_rounded(name, weights):
    fmt = None if weights == "int8" else formats.by_name(weights)
    w = np.random.default_rng(1).standard_normal((64, 24)).astype(np.float32)
    q = quantize(w, WeightSpec(bits=8, group_size=0, symmetric=True, fmt=fmt))
    x, act = jnp.asarray(tokens()), static(name, [0.02 if "fp8" in name else 0.6])
    rounded = np.asarray(act(x), np.float64)
    expected = rounded @ np.asarray(qdit.dequantize(q), np.float64)
    for numerics in ("simulated", "integer"):
        found = qdit.quantized_matmul(x, q, act, numerics=numerics)
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
    per_sample = static(name, [[0.02], [0.1], [0.3]]).at(jnp.array([0, 1, 2]))
    by_integers = qdit.quantized_matmul(x, q, per_sample, numerics="integer")
    np.testing.assert_allclose(by_integers, qdit.quantized_matmul(x, q, per_sample), atol=2e-5)


@pytest.mark.parametrize("name", ["fp8_e4m3", "nvfp4"])
def test_values_that_are_not_finite_show(name):
    x = tokens()
    x[0, 0, 0], x[1, 1, 1] = np.inf, np.nan
    q = quantize(np.ones((64, 4), np.float32), WeightSpec(group_size=0, fmt=formats.fp8_e4m3))
    act = static(name, [0.02])
    shown = np.isnan(np.asarray(act(x)))
    assert shown[0, 0, 0]
    assert shown[1, 1, 1]
    assert shown.sum() <= 2 * (act.spec.fmt.block_size or 1)  # a block's scale spreads NaN in it
    for numerics in ("simulated", "integer"):
        found = np.asarray(qdit.quantized_matmul(x, q, act, numerics=numerics))
        assert np.isnan(found[0, 0]).all()
        assert np.isnan(found[1, 1]).all()
        assert np.isfinite(found[2]).all()


def test_what_does_not_fit_is_refused():
    spec = ActSpec(group_size=32, fmt=formats.fp8_e4m3, mode="static")
    assert ActSpec.from_json(spec.to_json()) == spec
    assert LEAVES["ActQuant"].statics["spec"](spec.to_json()) == spec
    with pytest.raises(ValueError, match="scale has 1 groups, but 64 channels make 2 groups of 32"):
        ActQuant(spec, jnp.ones(1))(tokens())
    with pytest.raises(ValueError, match="has no scales; calibrate it first"):
        ActQuant(spec)(tokens())
    factor = ActSpec(fmt=formats.nvfp4, mode="static")
    with pytest.raises(ValueError, match="scale has 4 groups, but 64 channels make 1 groups of 64"):
        ActQuant(factor, jnp.ones(4))(tokens())
