"""The Pallas kernel for TPUs, interpreted on CPU: the product of `xla`, by the same numbers."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdit_jax.kernels import IMPLEMENTATIONS, Product, quantized_matmul, tpu_reasons
from qdit_jax.kernels.tpu_blocks import VMEM_LIMIT, Blocks, Sizes, chosen_blocks, vmem_bytes
from qdit_jax.kernels.tpu_levels import levels_matmul, token_codes
from qdit_jax.quant import (
    ActQuant,
    ActSpec,
    WeightSpec,
    codes_of,
    dequantize,
    formats,
    quantize,
    ranges,
)

TOKEN = ActSpec(8, 0, symmetric=True)
LEVELS = {"scale_levels": 2}
W = WeightSpec

# Weights, (M, K, N), the inputs' dtype and quantizer.
CASES = [
    (W(4, 32, **LEVELS), (40, 128, 130), "float32", TOKEN),
    (W(4, 64, symmetric=True, **LEVELS), (9, 96, 8), "bfloat16", TOKEN),
    (W(4, 96, **LEVELS), (8, 200, 128), "float32", ActSpec(4, 0, symmetric=True)),
    (W(2, 0, **LEVELS), (7, 77, 1), "float32", TOKEN),
    (W(3, 32, symmetric=True, **LEVELS), (33, 128, 20), "bfloat16", TOKEN),
    (W(5, 160, **LEVELS), (8, 256, 20), "float32", TOKEN),
    (W(6, 32, **LEVELS), (8, 100, 20), "float32", dataclasses.replace(TOKEN, group_size=1000)),
    (W(8, 0, symmetric=True), (8, 130, 9), "bfloat16", TOKEN),
    (W(7, 0, symmetric=True, scale_dtype="float16"), (8, 64, 9), "float32", TOKEN),
    (
        W(8, 0, symmetric=True),
        (8, 128, 9),
        "float32",
        dataclasses.replace(TOKEN, range_fn=ranges.minmax(clip=0.6)),
    ),
]


def compiled(fn):
    """Returns `fn` compiled without LLVM's optimizations, which take most of the time here."""
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})


def interpreted(x, q, act):
    return compiled(lambda x, q: levels_matmul(x, q, ActQuant(act), "integer", interpret=True))(
        x, q
    )


def operands(sizes, seed=0):
    """Returns tokens with outliers, zeros, extremes and halves of steps, and a kernel with outliers."""
    rng = np.random.default_rng(seed)
    num_rows, num_channels, width = sizes
    x = rng.normal(size=(num_rows, num_channels))
    x[:, ::17] *= rng.choice([1, 10, 50], (num_rows, 1))
    x[0] = 0
    x[1] *= 1e-20
    x[2] *= 1e25
    x[3] = np.abs(x[3]) + 1
    x[4] = 3
    x[5] = np.round(x[5] * 20) / 2  # ties, with steps of 1
    x[5, 0] = 127
    w = rng.normal(size=(num_channels, width))
    w[::13] *= 10
    w[:, 0] = 0.7
    return x, w.astype(np.float32)


@pytest.mark.parametrize(("weight", "sizes", "dtype", "act"), CASES, ids=str)
def test_the_kernel_is_the_product_of_the_rounded_operands(weight, sizes, dtype, act):
    x, w = operands(sizes)
    x = jnp.asarray(x, dtype)

    def products(x, w):
        q, quantizer = quantize(w, weight), ActQuant(act)
        found = levels_matmul(x, q, quantizer, "integer", interpret=True)
        by_xla = quantized_matmul(x, q, act, "integer", "xla")
        return found, by_xla, quantizer(x.astype(jnp.float32)), dequantize(q)

    found, *others = compiled(products)(x, w)
    assert (found.shape, found.dtype) == ((sizes[0], sizes[2]), dtype)
    found, by_xla, wide, weights = (np.asarray(a, np.float64) for a in (found, *others))
    unit = np.abs(wide) @ np.abs(weights) + np.finfo(np.float32).tiny
    ulp = {"float32": 2**-23, "bfloat16": 2**-8}[dtype]
    assert np.max(np.abs(found - by_xla) / unit) <= 2 * ulp
    assert np.max(np.abs(found - wide @ weights) / unit) < 4 * ulp


def test_a_token_that_is_not_finite_is_nan_and_touches_no_other():
    x, w = operands((12, 128, 24))
    q = quantize(w, W(4, 32, **LEVELS))
    clean = interpreted(jnp.asarray(x, jnp.float32), q, TOKEN)
    x[6, 3], x[7, 100], x[8, 0], x[0, 5] = np.nan, np.inf, -np.inf, np.nan
    found = np.asarray(interpreted(jnp.asarray(x, jnp.float32), q, TOKEN))
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

    def both(x, spec):
        scale = ActQuant(spec).grid(x)[0]
        return token_codes(x, spec), (codes_of(x, scale, None, spec), scale)

    for spec in (TOKEN, dataclasses.replace(TOKEN, bits=5, range_fn=ranges.minmax(clip=0.6))):
        found, expected = jax.jit(both, static_argnums=1)(x, spec)
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_several_panels_rows_and_columns_share_what_they_hold(monkeypatch):
    x, w = operands((70, 64, 500))
    x, q = jnp.asarray(x, jnp.float32), quantize(w, W(4, 32, **LEVELS))
    blocks = Blocks(rows=32, columns=128, num_rows=3, panels=2, panel=2)
    monkeypatch.setattr("qdit_jax.kernels.tpu_levels.chosen_blocks", lambda sizes: blocks)
    by_xla = quantized_matmul(x, q, TOKEN, "integer", "xla")
    np.testing.assert_array_equal(interpreted(x, q, TOKEN), by_xla)


def test_works_under_vmap_and_scan():
    x, w = operands((8, 64, 8))
    x = jnp.asarray(x, jnp.float32)
    q = jax.vmap(lambda w: quantize(w, W(4, 32, **LEVELS)))(jnp.stack([w, w[::-1]]))

    def product(q):
        return levels_matmul(x[None], q, ActQuant(TOKEN), "integer", interpret=True)

    mapped = compiled(jax.vmap(product))(q)
    scanned = compiled(lambda q: jax.lax.scan(lambda c, q: (c, product(q)), 0, q)[1])(q)
    for index in range(2):
        one = jax.tree.map(lambda leaf, index=index: leaf[index], q)
        by_xla = quantized_matmul(x[None], one, TOKEN, "integer", "xla")
        np.testing.assert_array_equal(mapped[index], by_xla)
        np.testing.assert_array_equal(scanned[index], by_xla)


@pytest.mark.parametrize("num_channels", [64, 384, 1152, 4608, 16384])
@pytest.mark.parametrize("width", [1, 32, 1152, 3456, 4608, 49152])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_blocks_cover_the_product_and_fit(num_channels, width, bits):
    for num_rows in (1, 16, 600, 4096):
        sizes = Sizes(num_rows, num_channels, width, bits, -(-num_channels // 32), 4)
        blocks = chosen_blocks(sizes)
        assert blocks is not None
        assert blocks.rows % 32 == 0
        assert blocks.rows * blocks.num_rows >= num_rows
        assert blocks.rows * (blocks.num_rows - 1) < num_rows  # no grid is empty, no block idle
        assert blocks.columns * blocks.panel * blocks.panels == sizes.column_tiles * 128
        assert vmem_bytes(sizes, blocks) <= VMEM_LIMIT


def test_the_layers_of_dit_xl_hold_all_their_weights_at_once():
    for num_channels, width in ((1152, 3456), (1152, 1152), (1152, 4608), (4608, 1152)):
        blocks = chosen_blocks(Sizes(4096, num_channels, width, 4, num_channels // 32, 2))
        assert (blocks.panels, blocks.num_rows, blocks.rows) == (1, 8, 512)


@pytest.fixture
def anywhere(monkeypatch):
    """What is refused by its shapes and settings, as if a TPU's compiler were installed."""
    monkeypatch.setattr(tpu_reasons, "find_spec", lambda name: object())
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")


def reason(weight=None, act=TOKEN, x_shape=(4096, 1152), **changes):
    """Returns the sentence of the row, which takes the product without changes."""
    weight = weight or W(4, 32, **LEVELS)
    settings = {"numerics": "integer", "platform": "tpu", "dtype": "bfloat16"} | changes
    product = Product(x_shape, weight, act, **settings)
    return IMPLEMENTATIONS["tpu_levels"].unsupported_reason(product)


@pytest.mark.usefixtures("anywhere")
def test_what_the_presets_make_is_taken():
    assert reason() is None
    assert reason(W(8, 0, symmetric=True)) is None
    assert reason(W(6, 32, symmetric=True, **LEVELS), dtype="float32") is None


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"platform": "cuda"}, "it runs on TPUs only."),
        ({"numerics": "simulated"}, "integer numerics, not simulated."),
        ({"dtype": "float16"}, "float32 or bfloat16, not in float16."),
        ({"act": None}, "it computes integer numerics"),
        ({"act": ActSpec(8, 0)}, "symmetric signed inputs without a shift."),
        ({"act": dataclasses.replace(TOKEN, unsigned=True)}, "symmetric signed inputs"),
        ({"act": dataclasses.replace(TOKEN, shift=0.17)}, "without a shift"),
        ({"act": ActSpec(8, 128, symmetric=True)}, "the inputs have groups of 128."),
        ({"act": dataclasses.replace(TOKEN, mode="static")}, "calibrated ones."),
        ({"act": dataclasses.replace(TOKEN, range_fn=ranges.mse())}, "minmax for inputs, not mse"),
        ({"act": ActSpec(fmt=formats.fp8_e4m3, group_size=0)}, "integers as inputs, not fp8_e4m3"),
        ({"weight": W(fmt=formats.lut4, group_size=32)}, "a step times a code, which lut4 has not"),
        ({"weight": W(4, 32)}, "two levels of scales, or symmetric weights"),
        ({"weight": W(8, 0)}, "two levels of scales, or symmetric weights"),
        ({"weight": W(4, 48, **LEVELS)}, "groups that are multiples of 32, not of 48"),
        ({"weight": W(4, 32, channel_group=2, **LEVELS)}, "channel_group is 2."),
        ({"x_shape": (8, 131072)}, "an int32 sum holds 131071 products of bytes, and K is 131072."),
        ({"x_shape": (8, 120000)}, "K = 120000 needs more than 48 MiB of VMEM."),
    ],
)
def test_what_it_cannot_compute_is_refused_by_name(changes, sentence):
    assert sentence in reason(**changes)


@pytest.mark.usefixtures("anywhere")
def test_a_stack_of_kernels_is_refused():
    make = jax.vmap(lambda w: quantize(w, W(4, 32, **LEVELS)))
    stack = jax.eval_shape(make, jnp.ones((3, 1152, 8)))
    assert "this is a stack" in reason(stack)


def test_the_machine_is_asked_before_anything_is_traced(monkeypatch):
    monkeypatch.setattr(tpu_reasons, "find_spec", lambda name: None)
    assert reason() == "libtpu is not installed."
    monkeypatch.setattr(tpu_reasons, "find_spec", lambda name: object())
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 3))
    assert re.match(r"it needs JAX 0\.12 or newer, and this is ", reason())
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert reason() == f"it was compiled for TPU v5e, v5p and v6e, and this is {kind()}."
    monkeypatch.setattr(tpu_reasons, "KINDS", (kind(),))
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert "several devices" in reason()
    found = []

    def one_device(x):
        found.append(reason())
        return x

    mesh = jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.P("batch")
    jax.jit(jax.shard_map(one_device, mesh=mesh, in_specs=split, out_specs=split))(jnp.ones(1))
    assert found == [None]


def kind():
    return jax.devices()[0].device_kind
