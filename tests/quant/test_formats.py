"""Number formats, bit for bit against ml_dtypes."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qdit_jax.quant import (
    ActSpec,
    WeightSpec,
    dequantize,
    fake_quantize,
    formats,
    integer_codes,
    quantize,
    scale_values,
)

DTYPES = {
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
}

# Those with one table of values for all kernels.
TABLED = [name for name, fmt in formats.FORMATS.items() if not fmt.has_codebook]


def hard_values(fmt):
    """Returns every value, every midpoint, their neighbors, and values of all magnitudes."""
    values = fmt.values()
    values = np.unique(values[np.isfinite(values)])
    middles = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)
    rng = np.random.default_rng(0)
    spread = rng.normal(size=5000) * 10 ** rng.uniform(-8, 3, 5000)
    parts = [values, middles, np.nextafter(middles, 9e9), np.nextafter(middles, -9e9), spread]
    x = np.concatenate([*parts, [0.0, -0.0]]).astype(np.float32)
    return np.clip(x, values[0], values[-1])


@pytest.mark.parametrize("name", DTYPES)
def test_codes_and_values_equal_ml_dtypes(name):
    fmt = formats.by_name(name)
    x = hard_values(fmt)
    expected = x.astype(DTYPES[name])
    codes = jax.jit(fmt.code)(jnp.asarray(x))
    np.testing.assert_array_equal(codes, expected.view(np.uint8))
    np.testing.assert_array_equal(fmt.value(codes), expected.astype(np.float32))


@pytest.mark.parametrize("name", TABLED)
def test_what_a_dot_multiplies_is_the_value_of_every_code(name):
    fmt = formats.by_name(name)
    codes = jnp.arange(2**fmt.bits, dtype=jnp.uint8)
    operand = fmt.operand(codes)
    assert operand.dtype == fmt.operand_dtype
    np.testing.assert_array_equal(np.asarray(operand, np.float32) * fmt.unit, fmt.values())
    np.testing.assert_array_equal(fmt.value(codes), fmt.values())


@pytest.mark.parametrize("name", TABLED)
def test_elements_saturate(name):
    fmt = formats.by_name(name)
    values = fmt.value(fmt.code(jnp.array([1e9, -1e9, fmt.max_value() * 1.01])))
    np.testing.assert_array_equal(values, fmt.max_value() * np.array([1, -1, 1]))


def test_nf4_takes_the_nearest_value():
    x = np.linspace(-1.2, 1.2, 1001, dtype=np.float32)
    table = formats.nf4.values()
    nearest = table[np.abs(x[:, None].astype(np.float64) - table).argmin(1)]
    np.testing.assert_array_equal(formats.nf4.value(formats.nf4.code(jnp.asarray(x))), nearest)


def kernel(rows=80, width=4):
    rng = np.random.default_rng(1)
    w = rng.normal(size=(rows, width)) * 10 ** rng.uniform(-3, 1, (rows, 1))
    w[32:64, width // 2] = 0
    return w.astype(np.float32)


def blocks(w, size):
    pad = -len(w) % size
    return np.pad(w, ((0, pad), (0, 0))).reshape(-1, size, w.shape[1]).astype(np.float64)


@pytest.mark.parametrize(
    ("name", "dtype", "power"),
    [("mxfp4", ml_dtypes.float4_e2m1fn, 2), ("mxfp8", ml_dtypes.float8_e4m3fn, 8)],
)
def test_mx_blocks_equal_the_definition(name, dtype, power):
    w = kernel()
    members = blocks(w, 32)
    absmax = np.abs(members).max(1, keepdims=True)
    scale = np.where(absmax > 0, 2.0 ** (np.floor(np.log2(absmax + 1e-300)) - power), 1)
    top = float(ml_dtypes.finfo(dtype).max)
    elements = np.clip(members / scale, -top, top).astype(np.float32).astype(dtype)
    expected = (elements.astype(np.float64) * scale).reshape(-1, 4)[:80]
    q = quantize(w, WeightSpec(fmt=formats.by_name(name)))
    np.testing.assert_array_equal(dequantize(q), expected.astype(np.float32))
    assert q.scale.dtype == jnp.uint8
    exponents = np.asarray(q.scale, int) - 127
    np.testing.assert_array_equal(2.0**exponents.T, scale[:, 0])


def test_nvfp4_equals_the_definition():
    w = kernel()
    members = blocks(w, 16).astype(np.float32)
    absmax = np.abs(members).max(1, keepdims=True)
    tensor_scale = np.float32(np.abs(w).max() / np.float32(6 * 448))
    block_scale = (absmax / np.float32(6) / tensor_scale).astype(ml_dtypes.float8_e4m3fn)
    scale = block_scale.astype(np.float32) * tensor_scale
    ratio = np.divide(members, scale, out=np.zeros_like(members), where=scale > 0)
    elements = np.clip(ratio, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    q = quantize(w, WeightSpec(fmt=formats.nvfp4))
    np.testing.assert_array_equal(q.scale.T, block_scale[:, 0].view(np.uint8))
    np.testing.assert_allclose(dequantize(q), (elements * scale).reshape(-1, 4)[:80], rtol=1e-6)


@pytest.mark.parametrize("name", TABLED)
def test_activations_of_one_token_are_a_kernel_of_one_column(name):
    fmt, w = formats.by_name(name), kernel(80, 1)
    spec = WeightSpec(fmt=fmt, group_size=32)
    x = fake_quantize(w.T, ActSpec(fmt=fmt, group_size=32))
    q = quantize(w, spec)
    np.testing.assert_allclose(x.T, dequantize(q), rtol=1e-6)
    codes, scale = fmt.quantize_blocks(jnp.asarray(w.T), 32)
    np.testing.assert_array_equal(codes.T, integer_codes(q))
    np.testing.assert_allclose(scale, scale_values(q), rtol=1e-6)
