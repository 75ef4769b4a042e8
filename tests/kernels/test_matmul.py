"""The product of quantized operands: two numerics, one meaning."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdit_jax.kernels import NUMERICS, quantized_matmul, segments, unsupported_reason, xla
from qdit_jax.quant import (
    ActQuant,
    ActSpec,
    WeightSpec,
    dequantize,
    fake_quantize,
    formats,
    quantize,
)

N = 8


def operands(channels):
    rng = np.random.default_rng(channels)
    x = rng.normal(size=(2, 3, channels))
    x[..., ::17] *= 20
    x[..., 5] *= 50
    x[0, 0] = 0
    x[0, 1] = np.abs(x[0, 1]) + 1
    x[1, 0] = 3
    x[1, 1, :32] = 0
    w = rng.normal(size=(channels, N))
    w[:, 1] = 0
    w[:, 2] = np.abs(w[:, 2])
    w[:, 3] = 0.7
    w[:32, 4] = 0
    return jnp.asarray(x, jnp.float32), w.astype(np.float32)


@pytest.mark.parametrize("numerics", NUMERICS)
def test_any_leading_axes_will_do(numerics):
    x, w = operands(96)
    q, act = quantize(w, WeightSpec(4, 32)), ActSpec()
    whole = quantized_matmul(x, q, act, numerics)
    assert whole.shape == (2, 3, N)
    np.testing.assert_allclose(quantized_matmul(x[0, 1], q, act, numerics), whole[0, 1], rtol=1e-5)


def test_works_inside_jit_scan_and_vmap():
    x, w = operands(96)
    spec, act = WeightSpec(4, 32), ActSpec(group_size=32)
    stack = jnp.stack([w, 2 * w])
    q = jax.vmap(lambda w: quantize(w, spec))(stack)
    for numerics in NUMERICS:

        def product(q, numerics=numerics):
            return quantized_matmul(x, q, act, numerics=numerics)

        scanned = jax.jit(lambda q, f=product: jax.lax.scan(lambda c, q: (c, f(q)), 0, q)[1])(q)
        mapped = jax.vmap(product)(q)
        expected = product(quantize(stack[1], spec))
        np.testing.assert_allclose(scanned[1], expected, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(mapped[1], expected, rtol=1e-5, atol=1e-4)


def test_segments_refine_both_groupings():
    cuts = segments(100, 32, 48)
    np.testing.assert_array_equal(cuts.starts, [0, 32, 48, 64, 96])
    np.testing.assert_array_equal(cuts.members, [32, 16, 16, 32, 4])
    np.testing.assert_array_equal(cuts.group(48), [0, 0, 1, 1, 2])
    assert sorted(cuts.rows[cuts.rows < 100]) == list(range(100))
    assert len(segments(20000, 0, 0).starts) == 3  # an int32 accumulator has its limit


def test_long_whole_channels_do_not_overflow():
    x = jnp.ones((1, 40000)).at[0, 0].set(0)
    q = quantize(np.ones((40000, 2), np.float32), WeightSpec(8, 0))
    y = quantized_matmul(x, q, ActSpec(8, 0), numerics="integer")
    np.testing.assert_allclose(y, 39999, rtol=1e-5)


def dots(jaxpr):
    """Yields dtypes and shapes of operands and result of every dot, as often as a program runs it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield [(v.aval.dtype.name, v.aval.shape) for v in (*equation.invars, *equation.outvars)]
        for inner in equation.params.values():
            if hasattr(inner, "jaxpr"):
                yield from [*dots(inner.jaxpr)] * equation.params.get("length", 1)


@pytest.mark.parametrize(
    "weight",
    [WeightSpec(4, 32, scale_levels=2), WeightSpec(fmt=formats.lut4, group_size=16)],
    ids=["two levels", "lut4"],
)
def test_a_symmetric_token_times_levels_is_one_int8_dot(weight):
    x, w = operands(96)
    q, act = quantize(w, weight), ActSpec(8, 0, symmetric=True)
    program = jax.make_jaxpr(lambda x, q: xla.integer_matmul(x, q, ActQuant(act)))(x, q)
    assert [*dots(program.jaxpr)] == [[("int8", (6, 96)), ("int8", (N, 96)), ("int32", (6, N))]]
    exact = np.asarray(fake_quantize(x, act), np.float64) @ np.asarray(dequantize(q), np.float64)
    found = quantized_matmul(x, q, act, numerics="integer")
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())


def test_long_channels_of_levels_do_not_overflow():
    x = jnp.ones((1, 40000)).at[0, 0].set(0)
    q = quantize(np.ones((40000, 2), np.float32), WeightSpec(4, 32, scale_levels=2))
    y = quantized_matmul(x, q, ActSpec(8, 0), numerics="integer")
    np.testing.assert_allclose(y, 39999, rtol=1e-4)


def test_reasons_come_from_shapes_and_settings_alone():
    weight, act = WeightSpec(4, 32), ActSpec()
    reason_of = functools.partial(unsupported_reason, dtype="float32")
    q = jax.eval_shape(lambda w: quantize(w, weight), jnp.ones((96, N)))
    assert reason_of((2, 96), q, act, numerics="integer") is None
    assert "x has 95 channels" in reason_of((2, 95), q)
    assert "pass act" in reason_of((2, 96), weight, numerics="integer")
    for fmt in formats.FORMATS.values():
        of_format = (WeightSpec(fmt=fmt), ActSpec() if fmt.has_codebook else ActSpec(fmt=fmt))
        assert reason_of((2, 96), *of_format, numerics="integer") is None
    assert "use one of simulated, integer" in reason_of((2, 96), q, numerics="fast")
    static = ActSpec(mode="static")
    assert "calibrated scales" in reason_of((2, 96), q, static)
    table = ActQuant(static, jnp.ones((3, 1)), jnp.ones((3, 1)))
    assert "pick one" in reason_of((2, 96), q, table)


def test_what_cannot_run_raises_its_reason():
    x, w = operands(96)
    with pytest.raises(ValueError, match="x has 96 channels, but the kernel has 95"):
        quantized_matmul(x, quantize(w[:95], WeightSpec()))


INT8_PAIRS = [
    (ActSpec(group_size=32), WeightSpec(4, 32)),
    (ActSpec(group_size=0), WeightSpec(4, 0)),
    (ActSpec(group_size=32), WeightSpec(fmt=formats.mxfp4)),
    (ActSpec(fmt=formats.nvfp4), WeightSpec(fmt=formats.fp4_e2m1, group_size=32)),
]
WIDER_PAIRS = [
    ("bf16", ActSpec(fmt=formats.fp8_e4m3), WeightSpec(fmt=formats.fp8_e5m2)),
    ("bf16", ActSpec(group_size=32), WeightSpec(fmt=formats.mxfp8)),
    ("f32", ActSpec(group_size=32), WeightSpec(fmt=formats.nf4)),
]


@pytest.mark.parametrize(
    ("dtype", "act", "weight"), [*(("i8", *pair) for pair in INT8_PAIRS), *WIDER_PAIRS], ids=str
)
def test_dots_take_the_narrowest_exact_dtype_and_contract_last_axes(dtype, act, weight):
    """XLA:CPU has int8 dots of two matrices alone, and GPUs want both operands a row per channel."""
    x, w = operands(96)

    def product(x, q):
        return quantized_matmul(x, q, act, numerics="integer")

    text = jax.jit(product).lower(x, quantize(w, weight)).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert dots
    for line in dots:
        assert "contracting_dims = [1] x [1]" in line, line
        assert line.count(f"x{dtype}>") >= 2, line


@pytest.mark.parametrize("numerics", NUMERICS)
def test_only_the_cpu_program_holds_a_product_back_until_its_input(numerics):
    x, w = operands(96)

    def product(x, q):
        return quantized_matmul(x, q, ActSpec(group_size=32), numerics=numerics)

    traced = jax.jit(product).trace(x, quantize(w, WeightSpec(4, 32)))
    for platform, held_back in (("cpu", True), ("cuda", False), ("tpu", False)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        waits = [line for line in text.splitlines() if re.search(r"\.or .*tensor<i32>", line)]
        assert len(waits) == held_back, platform


ONE_DOT = [
    (ActSpec(8, 0), WeightSpec(4, 0)),
    (ActSpec(8, 0, symmetric=True), WeightSpec(4, 32, scale_levels=2)),
    (ActSpec(fmt=formats.fp8_e4m3, group_size=0), WeightSpec(fmt=formats.fp8_e4m3, group_size=0)),
]


@pytest.mark.parametrize(("platform", "held"), [("cuda", 1), ("rocm", 1), ("tpu", 0), ("cpu", 0)])
@pytest.mark.parametrize(("act", "weight"), ONE_DOT, ids=["zero points", "two levels", "fp8"])
def test_on_gpus_the_operands_of_a_single_dot_are_made_before_it(platform, held, act, weight):
    x, w = operands(96)

    def product(x, q):
        return quantized_matmul(x, q, act, "integer", "xla")

    traced = jax.jit(product).trace(x, quantize(w, weight))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    codes = re.compile(r"optimization_barrier .*tensor<6x96x(i8|bf16)>.*tensor<8x96x(i8|bf16)>")
    assert len(codes.findall(text)) == held
    assert "stablehlo.while" not in text


@pytest.mark.parametrize(("act", "weight"), ONE_DOT, ids=["zero points", "two levels", "fp8"])
def test_a_barrier_changes_no_product_and_no_derivative(monkeypatch, act, weight):
    x, w = operands(96)
    q = quantize(w, weight)

    def results():
        def product(x, q):
            return xla.integer_matmul(x, q, ActQuant(act))

        def loss(x):
            return jnp.sum(jnp.sin(product(x, q)))

        stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), q)
        mapped = jax.jit(jax.vmap(product, (None, 0)))(x, stack)
        return jax.jit(product)(x, q), jax.jit(jax.grad(loss))(x), mapped

    plain = results()
    monkeypatch.setattr(xla, "made_before", jax.lax.optimization_barrier)
    jax.tree.map(np.testing.assert_array_equal, results(), plain)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of XLA:CPU's order of work")
@pytest.mark.parametrize("spec", [WeightSpec(4, 32), WeightSpec(fmt=formats.nf4, group_size=0)])
def test_weights_of_a_network_are_unpacked_a_layer_at_a_time(spec):
    q = jax.eval_shape(lambda w: quantize(w, spec), jnp.ones((256, 256)))
    x, act = jax.ShapeDtypeStruct((4, 256), jnp.float32), ActSpec(8, 32)

    def network(x, kernels):
        for kernel in kernels:
            x = quantized_matmul(x, kernel, act, numerics="integer")
        return x

    memory = jax.jit(network).lower(x, [q] * 8).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 * 256 * 256 * 4  # of 8 layers


@pytest.mark.parametrize("numerics", NUMERICS)
def test_no_rows_give_no_rows(numerics):
    x, w = operands(96)
    q = quantize(w, WeightSpec(4, 32))
    found = quantized_matmul(x[:0], q, ActSpec(group_size=32), numerics=numerics)
    assert found.shape == (0, 3, N)
