"""Tokens quantized in one pass, interpreted on CPU: codes, scales and zero points of the quantizer, norm included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreted_gpu import needs_interpreter
from level_products import TOKEN, tokens

from qdit_jax.kernels import Mapped, Modulated, gpu_group_rows, gpu_rows
from qdit_jax.kernels.gpu_levels import levels_fused
from qdit_jax.quant import ActQuant, ActSpec, InputMap, codes_of, formats, ranges

pytestmark = needs_interpreter
CLIPPED = ActSpec(4, 0, symmetric=True, range_fn=ranges.minmax(clip=0.7))


def interpreter():
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu.InterpretGPUParams()


def in_one_pass(x, spec, num_rows=None):
    count = int(np.prod(x.shape[:-1]))
    codes, scale = gpu_rows.quantized_rows(x, spec, num_rows or count, interpret=interpreter())
    return np.asarray(codes[:count]), np.asarray(scale[:count])


def expected(x, spec):
    """Returns codes and scales of the quantizer, not compiled: XLA would divide by another rule."""
    wide = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    scale, _ = ActQuant(spec).grid(wide)
    return np.asarray(codes_of(wide, scale, None, spec)), np.asarray(scale)[:, 0]


@pytest.mark.parametrize("spec", [TOKEN, CLIPPED], ids=["8 bits", "4 bits, clipped"])
@pytest.mark.parametrize(("shape", "dtype"), [((12, 256), "float32"), ((2, 5, 384), "bfloat16")])
def test_codes_and_scales_are_those_of_the_quantizer(shape, dtype, spec):
    x = jnp.asarray(tokens(int(np.prod(shape[:-1])), shape[-1]).reshape(shape), dtype)
    codes, scale = in_one_pass(x, spec, 16)
    own_codes, own = expected(x, spec)
    np.testing.assert_array_equal(scale, own)
    np.testing.assert_array_equal(codes, own_codes)


@pytest.mark.parametrize("fmt", [formats.fp8_e4m3, formats.fp8_e5m2], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize(("shape", "dtype"), [((12, 256), "float32"), ((2, 5, 384), "bfloat16")])
def test_fp8_elements_and_scales_are_those_of_the_quantizer(shape, dtype, fmt):
    spec = ActSpec(fmt=fmt, group_size=0)
    x = tokens(int(np.prod(shape[:-1])), shape[-1])
    x[5] = fmt.values()[: shape[-1]].repeat(-(-shape[-1] // 256))[: shape[-1]]
    x[5] = np.where(np.isfinite(x[5]), x[5], 0) * 1.0625  # ties, and their scale is no power of two
    x = jnp.asarray(x.reshape(shape), dtype)
    elements, scale = in_one_pass(x, spec, 16)
    codes, own = ActQuant(spec).blocks(x.reshape(-1, shape[-1]).astype(jnp.float32))
    assert elements.dtype == fmt.float8_dtype
    np.testing.assert_array_equal(scale, np.asarray(own)[:, 0])
    # As numbers: a zero that was negative is positive here.
    np.testing.assert_array_equal(elements.astype(np.float32), fmt.value(codes))


def modulated(seed=0, rows=(3, 4), width=256, dtype="float32"):
    rng = np.random.default_rng(seed)
    count = int(np.prod(rows))
    x = tokens(max(6, count), width, seed)[:count]
    x[2:3] *= 1e-20  # squares of greater ones are infinite
    x = x.reshape(*rows, width)
    modulation = rng.normal(size=(rows[0], 6 * width)) * 2
    modulation[:, ::31] *= 20
    return Modulated(jnp.asarray(x, dtype), jnp.asarray(modulation, jnp.float32), 3, 4, 1e-5)


@pytest.mark.parametrize(
    ("rows", "dtype"), [((3, 4), "float32"), ((2, 3, 5), "bfloat16"), ((1, 1), "float32")]
)
def test_a_norm_and_its_modulation_come_first(rows, dtype):
    x = modulated(rows=rows, dtype=dtype)
    codes, scale = in_one_pass(x, TOKEN)
    wide = np.asarray(x.x, np.float64)
    parts = np.asarray(x.modulation, np.float64).reshape(rows[0], *(1,) * (len(rows) - 1), 6, -1)
    normed = wide - wide.mean(-1, keepdims=True)
    normed /= np.sqrt(np.square(normed).mean(-1, keepdims=True) + 1e-5)
    exact = (normed * (1 + parts[..., 4, :]) + parts[..., 3, :]).reshape(-1, wide.shape[-1])
    own = np.abs(exact).max(-1) / 127
    np.testing.assert_allclose(scale, own, rtol=1e-5)
    # Nothing but what lies at the middle of a step goes the other way.
    assert np.abs(codes - exact / own[:, None]).max() < 0.5 + 1e-2
    np.testing.assert_allclose(x.array().reshape(exact.shape), exact, atol=1e-4 * own.max() * 127)


def input_map(width, has_shift):
    rng = np.random.default_rng(9)
    inverse_scale = np.exp(rng.normal(size=width)).astype(np.float32)
    shift = rng.normal(size=width).astype(np.float32) if has_shift else None
    return InputMap(jnp.asarray(inverse_scale), None if shift is None else jnp.asarray(shift))


def mapped(x, input_map):
    """Returns what a map makes of `x`, in float64."""
    shift = 0 if input_map.shift is None else np.asarray(input_map.shift, np.float64)
    return (np.asarray(x, np.float64) - shift) * np.asarray(input_map.inverse_scale, np.float64)


@pytest.mark.parametrize("has_shift", [False, True])
@pytest.mark.parametrize(("shape", "dtype"), [((12, 256), "float32"), ((2, 5, 384), "bfloat16")])
def test_channels_are_scaled_before_their_token_is(shape, dtype, has_shift):
    x = jnp.asarray(tokens(int(np.prod(shape[:-1])), shape[-1]).reshape(shape), dtype)
    known = input_map(shape[-1], has_shift)
    codes, scale = in_one_pass(Mapped(x, known), TOKEN)
    exact = mapped(x, known).reshape(codes.shape)
    own = np.abs(exact).max(-1) / 127
    own[own == 0] = 1
    np.testing.assert_allclose(scale, own, rtol=1e-6)
    assert np.abs(codes - exact / own[:, None]).max() < 0.5 + 1e-4


def test_a_norm_comes_before_a_map():
    x, known = modulated(), input_map(256, True)
    codes, scale = in_one_pass(Mapped(x, known), TOKEN)
    exact = mapped(x.array(), known).reshape(codes.shape)
    np.testing.assert_allclose(scale, np.abs(exact).max(-1) / 127, rtol=1e-5)
    assert np.abs(codes - exact / scale[:, None]).max() < 0.5 + 1e-2


def test_a_token_that_is_not_finite_has_no_scale():
    x = tokens(8, 128)
    x[4, 3], x[5, 60], x[6, 0] = np.nan, np.inf, -np.inf
    codes, scale = in_one_pass(jnp.asarray(x, jnp.float32), TOKEN)
    assert np.isnan(scale[[4, 5, 6]]).all()
    assert np.isfinite(np.delete(scale, [4, 5, 6])).all()
    assert (scale[0], np.abs(codes[0]).max()) == (1, 0)  # zeros


def test_a_product_takes_it_and_has_the_derivative_of_xla():
    from level_products import LEVELS, W

    from qdit_jax.kernels import fused_matmul
    from qdit_jax.kernels.gpu_tiles import Tiles
    from qdit_jax.quant import quantize

    rng, modulation = np.random.default_rng(0), modulated(rows=(2, 3), width=128).modulation
    x = Modulated(jnp.asarray(rng.normal(size=(2, 3, 128)), jnp.float32), modulation, 3, 4)
    q = quantize(jnp.asarray(rng.normal(size=(128, 20)), jnp.float32), W(4, 32, **LEVELS))
    settings = {"tiles": Tiles(64, 64, 2), "interpret": interpreter()}

    def ours(x):
        return levels_fused(x, q, ActQuant(TOKEN), "float32", **settings)[0]

    def by_xla(x):
        return fused_matmul(x, q, TOKEN, "integer", "xla")[0]

    found, other = jax.jit(ours)(x), jax.jit(by_xla)(x)
    assert found.shape == (2, 3, 20)
    np.testing.assert_allclose(found, other, atol=2e-2 * np.abs(other).max())
    slopes = (jax.grad(lambda x, fn=fn: fn(x).sum())(x) for fn in (ours, by_xla))
    one, two = map(jax.tree.leaves, slopes)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


def test_wide_tokens_are_left_to_xla():
    assert gpu_rows.fits(jnp.zeros((2, 12288)))
    assert not gpu_rows.fits(jnp.zeros((2, 12416)))
    assert not gpu_rows.fits(jnp.zeros((2, 130)))
    wide = Modulated(jnp.zeros((1, 2, 6272)), jnp.zeros((1, 6272 * 2)), 0, 1)
    assert not gpu_rows.fits(wide)


GROUPED = {
    "zero points": ActSpec(8, 128),
    "symmetric": ActSpec(8, 128, symmetric=True),
    "4 bits": ActSpec(4, 128),
    "of the release": ActSpec(8, 128, range_fn=ranges.qdit_release()),
    "of 32": ActSpec(8, 32),
    "of 64": ActSpec(8, 64, symmetric=True),
}


def in_groups(x, spec):
    found = gpu_group_rows.quantized_groups(x, spec, interpret=interpreter())
    return [None if a is None else np.asarray(a) for a in found]


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize(("shape", "dtype"), [((16, 384), "float32"), ((2, 8, 256), "bfloat16")])
def test_groups_have_the_codes_of_the_quantizer(shape, dtype, name):
    spec = GROUPED[name]
    x = tokens(int(np.prod(shape[:-1])), shape[-1])
    x[6, :128] = -np.abs(x[6, :128]) - 2  # on one side
    x = jnp.asarray(x.reshape(shape), dtype)
    codes, scale, zero = in_groups(x, spec)
    wide = x.reshape(-1, shape[-1]).astype(jnp.float32)
    own_scale, own_zero = ActQuant(spec).grid(wide)
    own = np.asarray(codes_of(wide, own_scale, own_zero, spec))
    half = 0 if spec.symmetric else 2 ** (spec.bits - 1)
    np.testing.assert_array_equal(scale.T, own_scale)
    np.testing.assert_array_equal(codes, own - half)
    assert (zero is None) == spec.symmetric
    if zero is not None:
        np.testing.assert_array_equal(zero.T, np.asarray(own_zero) - half)


@pytest.mark.parametrize("size", [32, 128, 256])
@pytest.mark.parametrize(("rows", "dtype"), [((3, 16), "float32"), ((2, 4, 4), "bfloat16")])
def test_a_norm_comes_before_groups(rows, dtype, size):
    x = modulated(rows=rows, dtype=dtype)
    codes, scale, zero = in_groups(x, ActSpec(8, size))
    spread = np.repeat(scale.T, size, axis=1)
    values = (codes - np.repeat(zero.T, size, axis=1)) * spread
    exact = np.asarray(x.array(), np.float64).reshape(values.shape)
    # The ends are codes of their own, rounded with the zero point: up to half a step beside.
    assert np.abs((values - exact) / spread).max() < 1 + 1e-2
    assert np.abs((values - exact) / spread).mean() < 0.27


@pytest.mark.parametrize("has_norm", [False, True])
def test_channels_are_scaled_before_their_group_is(has_norm):
    x = modulated(rows=(3, 8))
    x, known = x if has_norm else x.x, input_map(256, True)
    codes, scale, zero = in_groups(Mapped(x, known), ActSpec(8, 128))
    spread = np.repeat(scale.T, 128, axis=1)
    values = (codes - np.repeat(zero.T, 128, axis=1)) * spread
    exact = mapped(x.array() if has_norm else x, known).reshape(values.shape)
    assert np.abs((values - exact) / spread).max() < 1 + 1e-2
    assert np.abs((values - exact) / spread).mean() < 0.27


def test_a_group_that_is_not_finite_has_no_scale():
    x = tokens(8, 256)
    x[4, 3], x[5, 160], x[6, 0] = np.nan, np.inf, -np.inf
    _, scale, _ = in_groups(jnp.asarray(x, jnp.float32), ActSpec(8, 128))
    broken = np.zeros_like(scale, bool)
    broken[0, 4] = broken[1, 5] = broken[0, 6] = True
    np.testing.assert_array_equal(np.isnan(scale), broken)


def test_other_groups_are_left_to_xla():
    x, spec = jnp.zeros((2, 8, 256)), ActSpec(8, 128)
    assert gpu_group_rows.fits(x, spec)
    for other in (ActSpec(8, 96), ActSpec(8, 0), ActSpec(8, 128, range_fn=ranges.mse())):
        assert not gpu_group_rows.fits(x, other)
    assert not gpu_group_rows.fits(jnp.zeros((2, 9, 256)), spec)
    assert gpu_group_rows.fits(jnp.zeros((2, 8, 256)), ActSpec(8, 32))
    assert not gpu_group_rows.fits(jnp.zeros((1, 8, 256)), ActSpec(8, 32))
    assert not gpu_group_rows.fits(
        Modulated(jnp.zeros((2, 4, 256)), jnp.zeros((2, 512)), 0, 1), spec
    )
