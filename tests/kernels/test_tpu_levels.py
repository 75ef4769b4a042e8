"""The Pallas kernel for TPUs, interpreted on CPU: the product of `xla`, by the same numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from level_products import LEVELS, TOKEN, W, compiled, random_kernel, relative_errors, tokens

from qdit_jax.kernels import quantized_matmul
from qdit_jax.kernels.tpu_blocks import Blocks
from qdit_jax.kernels.tpu_levels import TPU_LEVELS, magnitude_bits, token_scale
from qdit_jax.quant import (
    ActQuant,
    ActSpec,
    codes_of,
    dequantize,
    quantize,
    ranges,
    rounded_quotients,
    with_codes,
)

# Weights, (M, K, N), the inputs' dtype and quantizer.
CASES = [
    (W(4, 32, **LEVELS), (40, 64, 130), "float32", TOKEN),
    (W(4, 64, symmetric=True, **LEVELS), (9, 96, 8), "bfloat16", TOKEN),
    (W(4, 64, **LEVELS), (8, 256, 20), "float32", TOKEN),  # transposed in the kernel
    (W(4, 96, **LEVELS), (8, 160, 128), "float32", ActSpec(4, 0, symmetric=True)),
    (W(2, 0, **LEVELS), (7, 77, 1), "float32", TOKEN),
    (W(3, 32, symmetric=True, **LEVELS), (33, 64, 20), "bfloat16", TOKEN),
    (W(5, 96, **LEVELS), (8, 128, 20), "float32", TOKEN),
    (W(6, 32, **LEVELS), (8, 100, 20), "float32", dataclasses.replace(TOKEN, group_size=1000)),
    (W(8, 0, symmetric=True), (8, 60, 9), "bfloat16", TOKEN),
    (W(7, 0, symmetric=True, scale_dtype="float16"), (8, 64, 9), "float32", TOKEN),
    (
        W(8, 0, symmetric=True),
        (8, 64, 9),
        "float32",
        dataclasses.replace(TOKEN, range_fn=ranges.minmax(clip=0.5)),
    ),
]


def product(x, q, act=TOKEN):
    return TPU_LEVELS.run(x, q, ActQuant(act), "integer", interpret=True)


interpreted = compiled(product)


def operands(sizes, seed=0):
    """Returns tokens, and a kernel with outliers and a constant column."""
    num_rows, num_channels, width = sizes
    w = np.random.default_rng(seed + 1).normal(size=(num_channels, width))
    w[::13] *= 10
    w[:, 0] = 0.7
    return tokens(num_rows, num_channels, seed), w.astype(np.float32)


@pytest.mark.parametrize(("weight", "sizes", "dtype", "act"), CASES, ids=str)
def test_the_kernel_is_the_product_of_the_rounded_operands(weight, sizes, dtype, act):
    x = jnp.asarray(operands(sizes)[0], dtype)

    def products(x, grid, codes):
        q, quantizer = with_codes(grid, codes), ActQuant(act)
        found = product(x, q, act)
        by_xla = quantized_matmul(x, q, act, "integer", "xla")
        return found, by_xla, quantizer(x.astype(jnp.float32)), dequantize(q)

    found, *others = compiled(products)(x, *random_kernel(weight, *sizes[1:]))
    assert (found.shape, found.dtype) == ((sizes[0], sizes[2]), dtype)
    ulp = {"float32": 2**-23, "bfloat16": 2**-8}[dtype]
    against_exact, against_xla = relative_errors(found, *others)
    assert against_exact < 4 * ulp
    assert against_xla <= 2 * ulp


def test_a_token_that_is_not_finite_is_nan_and_touches_no_other():
    x, w = operands((12, 64, 24))
    q = quantize(w, W(4, 32, **LEVELS))
    clean = interpreted(jnp.asarray(x, jnp.float32), q)
    x[6, 3], x[7, 60], x[8, 0], x[0, 5] = np.nan, np.inf, -np.inf, np.nan
    found = np.asarray(interpreted(jnp.asarray(x, jnp.float32), q))
    broken = [0, 6, 7, 8]
    assert np.isnan(found[broken]).all()
    np.testing.assert_array_equal(np.delete(found, broken, 0), np.delete(clean, broken, 0))


def test_codes_and_scales_are_those_of_the_quantizer():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(64, 512)) * np.exp(rng.normal(size=(64, 1)) * 20)
    x = jnp.asarray(np.where(rng.random(x.shape) < 0.01, x * 50, x), jnp.float32)
    # Exact halves of a step, and their neighbors among the numbers of float32.
    scale = np.float32(1.7) / 127
    halves = (np.arange(-127, 127) + 0.5).astype(np.float32) * scale
    beside = [halves, np.nextafter(halves, np.float32(9)), np.nextafter(halves, np.float32(-9))]
    ties = np.pad(np.stack(beside), ((0, 0), (0, 512 - 254)), constant_values=1.7)
    x = jnp.concatenate([x, ties])

    def codes_and_scales(x, spec):
        most = jnp.max(magnitude_bits(x), axis=1, keepdims=True)
        divisor, scale = token_scale(most, spec)
        return rounded_quotients(divisor, 2 ** (spec.bits - 1) - 1)(x), scale

    for spec in (TOKEN, dataclasses.replace(TOKEN, bits=5, range_fn=ranges.minmax(clip=0.6))):
        found = jax.jit(codes_and_scales, static_argnums=1)(x, spec)
        # Not compiled together: XLA would divide by multiplying with the reciprocal, see `division`.
        scale = ActQuant(spec).grid(x)[0]
        expected = codes_of(x, scale, None, spec), scale
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_several_panels_rows_and_columns_share_what_they_hold(monkeypatch):
    x, w = operands((70, 32, 500))
    x, q = jnp.asarray(x, jnp.float32), quantize(w, W(4, 32, **LEVELS))
    blocks = Blocks(rows=32, columns=128, num_rows=3, panels=2, panel=2)
    monkeypatch.setattr("qdit_jax.kernels.tpu_call.chosen_blocks", lambda sizes: blocks)
    by_xla = quantized_matmul(x, q, TOKEN, "integer", "xla")
    np.testing.assert_array_equal(interpreted(x, q), by_xla)


def test_works_under_vmap_inside_of_scan():
    x, w = operands((8, 32, 8))
    x = jnp.asarray(np.stack([x, x[::-1]]), jnp.float32)
    q = jax.vmap(lambda w: quantize(w, W(4, 32, **LEVELS)))(jnp.stack([w, w[::-1]]))
    found = compiled(
        lambda q: jax.lax.scan(lambda _, q: (_, jax.vmap(lambda x: product(x, q))(x)), 0, q)[1]
    )(q)
    for index in range(2):
        one = jax.tree.map(lambda leaf, index=index: leaf[index], q)
        by_xla = quantized_matmul(x, one, TOKEN, "integer", "xla")
        np.testing.assert_array_equal(found[index], by_xla)


def test_the_derivative_is_that_of_xla():
    x, w = operands((6, 32, 8))
    x, q = jnp.asarray(x, jnp.float32), quantize(w, W(4, 32, **LEVELS))

    def derivatives(x):
        ours = jax.grad(lambda x: product(x, q).sum())(x)
        return ours, jax.grad(lambda x: quantized_matmul(x, q, TOKEN, "integer", "xla").sum())(x)

    np.testing.assert_array_equal(*compiled(derivatives)(x))


def test_sums_are_written_in_16_bits_at_once():
    x, q = (
        jnp.asarray(tokens(12, 64), jnp.float32),
        quantize(operands((12, 64, 24))[1], W(4, 32, **LEVELS)),
    )

    def products(x, q):
        found = TPU_LEVELS.run(x, q, ActQuant(TOKEN), "integer", "bfloat16", interpret=True)
        return found, product(x, q)

    found, wide = compiled(products)(x, q)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, wide.astype(jnp.bfloat16))
