"""The Pallas kernel for products in groups on TPUs, interpreted on CPU, against float64 and `xla`."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from level_products import LEVELS, W, compiled, reason, relative_errors, stack_of_kernels, tokens

from qdit_jax.kernels import implementation_of, passed_over, quantized_matmul
from qdit_jax.kernels.tpu_blocks import VMEM_LIMIT, Blocks, chosen_blocks, groups_sizes, vmem_bytes
from qdit_jax.kernels.tpu_group_rows import grid_of_rows
from qdit_jax.kernels.tpu_groups import TPU_GROUPS
from qdit_jax.quant import ActQuant, ActSpec, codes_of, dequantize, formats, quantize, ranges

GROUP = ActSpec(8, 128)
# Weights, (M, K, N), the inputs' dtype and quantizer.
CASES = [
    (W(4, 128), (40, 256, 130), "float32", GROUP),
    (W(4, 128, symmetric=True), (9, 384, 8), "bfloat16", ActSpec(8, 0, symmetric=True)),
    (W(3, 0), (8, 256, 20), "float32", ActSpec(8, 256)),
    (W(6, 256), (33, 640, 20), "bfloat16", ActSpec(4, 128)),  # a shorter last group
    (W(4, 0), (7, 200, 1), "float32", ActSpec(8, 0)),  # K is no whole number of units
    (W(7, 128, scale_dtype="float16"), (8, 300, 9), "float32", GROUP),
    (W(8, 128, symmetric=True), (8, 128, 9), "float32", ActSpec(8, 128, symmetric=True)),
    # Units of less than a tile.
    (W(4, 32), (40, 256, 130), "float32", ActSpec(8, 32)),
    (W(4, 32), (9, 100, 8), "bfloat16", ActSpec(8, 0)),
    (W(3, 0), (33, 256, 20), "float32", ActSpec(8, 64)),
    (W(7, 96, symmetric=True), (8, 320, 9), "float32", ActSpec(8, 96)),
    (W(4, 288), (40, 1152, 20), "bfloat16", ActSpec(8, 288)),
    (W(2, 64), (7, 200, 5), "float32", ActSpec(8, 160)),
    pytest.param(  # more scales than a tile has lanes
        *(W(4, 0), (8, 4224, 8), "float32", ActSpec(8, 32)), marks=pytest.mark.slow
    ),
    (W(8, 64, symmetric=True), (8, 192, 9), "float32", ActSpec(8, 64, symmetric=True)),
    (
        W(4, 384),
        (8, 384, 9),
        "float32",
        ActSpec(8, 128, range_fn=ranges.minmax(clip=0.5)),
    ),
]


def product(x, q, act=GROUP):
    return TPU_GROUPS.run(x, q, ActQuant(act), "integer", interpret=True)


interpreted = compiled(product)


def kernel(num_channels, width, weight):
    """Returns weights with outlier channels, a constant column, one-sided and zero groups."""
    w = np.random.default_rng(width).normal(size=(num_channels, width))
    w[::13] *= 30
    w[:, 0] = 0.7
    w[:128, -1] = 0
    w[:128, width // 2] = np.abs(w[:128, width // 2]) + 5
    return quantize(jnp.asarray(w, jnp.float32), weight)


@pytest.mark.parametrize(("weight", "sizes", "dtype", "act"), CASES, ids=str)
def test_the_kernel_is_the_product_of_the_rounded_operands(weight, sizes, dtype, act):
    x, q = jnp.asarray(tokens(*sizes[:2]), dtype), kernel(*sizes[1:], weight)

    def products(x, q):
        by_xla = quantized_matmul(x, q, act, "integer", "xla")
        return product(x, q, act), by_xla, ActQuant(act)(x.astype(jnp.float32)), dequantize(q)

    found, by_xla, wide, weights = compiled(products)(x, q)
    assert (found.shape, found.dtype) == ((sizes[0], sizes[2]), dtype)
    ulp = {"float32": 2**-23, "bfloat16": 2**-8}[dtype]
    against_exact, against_xla = relative_errors(found, by_xla, wide, weights)
    # Sums of many units are rounded more often.
    assert against_exact < (4 if sizes[1] <= 1152 else 16) * ulp
    assert against_xla <= 4 * ulp


def test_a_token_that_is_not_finite_is_nan_and_touches_no_other():
    x, q = tokens(12, 256), kernel(256, 24, W(4, 128))
    clean = interpreted(jnp.asarray(x, jnp.float32), q)
    x[6, 3], x[7, 200], x[8, 0], x[0, 5] = np.nan, np.inf, -np.inf, np.nan
    found = np.asarray(interpreted(jnp.asarray(x, jnp.float32), q))
    broken = [0, 6, 7, 8]
    assert np.isnan(found[broken]).all()
    np.testing.assert_array_equal(np.delete(found, broken, 0), np.delete(clean, broken, 0))


def test_codes_scales_and_zero_points_are_those_of_the_quantizer():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(96, 128)) * np.exp(rng.normal(size=(96, 1)) * 20)
    x[:32] = np.abs(x[:32])
    x[32:64] -= 3 * np.abs(x[32:64]).max(axis=1, keepdims=True)
    # Exact halves of a step, and their neighbors among the numbers of float32.
    scale = np.float32(1.7) / 255
    halves = (np.arange(0, 126) + 0.5).astype(np.float32) * scale
    beside = [halves, np.nextafter(halves, np.float32(9)), np.nextafter(halves, np.float32(-9))]
    ties = np.pad(np.stack(beside), ((0, 0), (0, 2)), constant_values=1.7)
    x = jnp.asarray(np.concatenate([x, ties, ties - 0.8]), jnp.float32)

    def grid(x, spec):
        low, high = (fn(x, axis=1, keepdims=True) for fn in (jnp.min, jnp.max))
        codes_fn, scale, zero = grid_of_rows(low, high, jnp.isfinite(low), spec)
        return codes_fn(x), scale, zero

    for spec in (GROUP, ActSpec(5, 128)):
        half = 2 ** (spec.bits - 1)
        codes, scale, zero = jax.jit(grid, static_argnums=1)(x, spec)
        # Not compiled together: XLA would divide by multiplying with the reciprocal, see `division`.
        expected_scale, expected_zero = ActQuant(spec).grid(x)
        np.testing.assert_array_equal(scale, expected_scale)
        np.testing.assert_array_equal(zero, expected_zero - half)
        expected = codes_of(x, expected_scale, expected_zero, spec) - half
        np.testing.assert_array_equal(codes, expected)


def test_several_panels_rows_and_columns_share_what_they_hold(monkeypatch):
    x, q = jnp.asarray(tokens(70, 256), jnp.float32), kernel(256, 500, W(4, 128))
    blocks = Blocks(rows=32, columns=128, num_rows=3, panels=2, panel=2)
    monkeypatch.setattr("qdit_jax.kernels.tpu_call.chosen_blocks", lambda sizes: blocks)
    by_xla = np.asarray(quantized_matmul(x, q, GROUP, "integer", "xla"))
    found = np.asarray(jax.jit(product)(x, q))
    np.testing.assert_allclose(found, by_xla, rtol=0, atol=2e-6 * np.abs(by_xla).max(1).max())


def test_works_under_vmap_inside_of_scan():
    x = jnp.asarray(np.stack([tokens(8, 128), tokens(8, 128, 1)]), jnp.float32)[:, 3:]
    w = np.random.default_rng(0).normal(size=(2, 128, 8)).astype(np.float32)
    q = jax.vmap(lambda w: quantize(w, W(4, 128)))(jnp.asarray(w))
    found = compiled(
        lambda q: jax.lax.scan(lambda _, q: (_, jax.vmap(lambda x: product(x, q))(x)), 0, q)[1]
    )(q)
    for index in range(2):
        one = jax.tree.map(lambda leaf, index=index: leaf[index], q)
        by_xla = quantized_matmul(x, one, GROUP, "integer", "xla")
        np.testing.assert_allclose(found[index], by_xla, rtol=1e-5, atol=1e-5)


def test_the_derivative_is_that_of_xla():
    x, q = jnp.asarray(tokens(6, 128), jnp.float32), kernel(128, 8, W(4, 128))

    def derivatives(x):
        ours = jax.grad(lambda x: product(x, q).sum())(x)
        return ours, jax.grad(lambda x: quantized_matmul(x, q, GROUP, "integer", "xla").sum())(x)

    np.testing.assert_array_equal(*compiled(derivatives)(x))


def refused(weight=W(4, 128), act=GROUP, **changes):  # noqa: B008
    """Returns the sentence of the kernel, which takes the product without changes."""
    settings = {"platform": "tpu", "weight": weight, "act": act, **changes}
    return reason(row="tpu_groups", **settings)


@pytest.fixture
def anywhere(monkeypatch):
    """What is refused by its shapes and settings, as if this machine were right."""
    monkeypatch.setattr("qdit_jax.kernels.tpu_reasons.machine_reason", lambda: None)


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"platform": "cuda"}, "it runs on TPUs only."),
        ({"numerics": "simulated"}, "integer numerics, not simulated."),
        ({"act": ActSpec(fmt=formats.fp8_e4m3, group_size=0)}, "integers as inputs, not fp8_e4m3"),
        ({"act": replace(GROUP, mode="static")}, "calibrated ones."),
        ({"act": replace(GROUP, range_fn=ranges.mse())}, "minmax for inputs, not mse"),
        ({"act": ActSpec(8, 48)}, "inputs in groups that are multiples of 32, not of 48."),
        ({"dtype": "float16"}, "float32 or bfloat16, not in float16."),
        ({"weight": W(4, 128, **LEVELS)}, "it takes one level of scales"),
        ({"weight": W(4, 16)}, "weights in groups that are multiples of 32, not of 16."),
        ({"weight": W(8, 128)}, "zero points of at most 7 bits, and the weights have 8."),
        ({"weight": stack_of_kernels}, "it takes one level of scales"),
        ({"x_shape": (8, 1 << 20)}, "MiB of VMEM."),
    ],
)
def test_what_it_cannot_compute_is_refused_by_name(changes, sentence):
    if callable(changes.get("weight")):
        changes = {"weight": changes["weight"]()}
    assert sentence in refused(**changes)


@pytest.mark.usefixtures("anywhere")
def test_the_published_form_is_taken_where_groups_are_whole_units():
    assert refused() is None
    assert refused(W(8, 0, symmetric=True), ActSpec(8, 0)) is None
    settings = {"platform": "tpu", "dtype": "bfloat16"}
    for size, name in ((128, "tpu_groups"), (288, "tpu_groups"), (32, "tpu_groups"), (48, "xla")):
        weight = W(4, size)
        assert implementation_of((4096, 1152), weight, GROUP, "integer", **settings) == name
    told = "tpu_groups: it takes weights in groups that are multiples of 32, not of 48."
    assert passed_over((4096, 1152), W(4, 48), GROUP, "integer", **settings) == told
    assert passed_over((4096, 1152), W(4, 128), GROUP, "integer", **settings) is None


@pytest.mark.parametrize("channels", [1152, 4608, 8960])
@pytest.mark.parametrize("size", [128, 32])
def test_blocks_fit(channels, size):
    sizes = groups_sizes((4096, channels), W(4, 128), 2, ActSpec(8, size))
    blocks = chosen_blocks(sizes)
    assert blocks is not None
    assert vmem_bytes(sizes, blocks) <= VMEM_LIMIT
    assert vmem_bytes(sizes, blocks) > vmem_bytes(replace(sizes, units=0), blocks)


def test_sums_are_written_in_16_bits_at_once():
    x, q = jnp.asarray(tokens(12, 256), jnp.float32), kernel(256, 24, W(4, 128))

    def products(x, q):
        found = TPU_GROUPS.run(x, q, ActQuant(GROUP), "integer", "bfloat16", interpret=True)
        return found, product(x, q)

    found, wide = compiled(products)(x, q)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, wide.astype(jnp.bfloat16))
