"""What comes before and after a product, by the kernels for TPUs, interpreted on CPU.

Weights are arguments: of constants, XLA of jax 0.10 computes a kernel's words of bytes in advance, and wrongly.
"""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from epilogues import KINDS
from level_products import TOKEN, W, compiled, tokens
from quantized_block import block_facts

from qdit_jax.kernels import (
    GELU,
    Gated,
    Mapped,
    Modulated,
    activated,
    fused_matmul,
    tpu_call,
)
from qdit_jax.kernels.tpu_blocks import VMEM_LIMIT, Sizes, chosen_blocks, row_blocks, vmem_bytes
from qdit_jax.kernels.tpu_groups import groups_fused
from qdit_jax.kernels.tpu_levels import levels_fused
from qdit_jax.kernels.tpu_weights import weights_fused
from qdit_jax.quant import ActQuant, ActSpec, InputMap, quantize

FUSED = {"levels": levels_fused, "groups": groups_fused, "weights": weights_fused}
EPS = 1e-5


def fused(kind, x, q, act, dtype="float32", *neighbors, **settings):
    quantizer = None if act is None else ActQuant(act)
    return FUSED[kind](x, q, quantizer, dtype, *neighbors, interpret=True, **settings)


@pytest.fixture
def inside(monkeypatch):
    """Fails where the kernel leaves to XLA what comes before or after."""

    def plain(x):
        assert not isinstance(x, Modulated | Mapped), "computed by XLA"
        return x

    def followed(y, gated, parts):
        assert (gated, parts) == (None, 1), "computed by XLA"
        return (y,)

    monkeypatch.setattr(tpu_call, "plain", plain)
    monkeypatch.setattr(tpu_call, "followed", followed)


def modulated(rows, width, dtype="float32", seed=0):
    """Returns the norm of tokens with outliers, zeros and one that is not finite, the last."""
    rng, count = np.random.default_rng(seed), int(np.prod(rows))
    x = tokens(count, width, seed)
    x[2] *= 1e-20  # squares of greater ones are infinite
    x[-1, 5] = np.nan
    modulation = rng.normal(size=(rows[0], 6 * width)) * 2
    modulation[:, ::31] *= 20
    x = jnp.asarray(x.reshape(*rows, width), dtype)
    return Modulated(x, jnp.asarray(modulation, jnp.float32), 3, 4, EPS)


def exact(x):
    """Returns what stands before the quantizer `[M, K]`, in float64."""
    if isinstance(x, Mapped):
        shift = 0 if x.map.shift is None else np.asarray(x.map.shift, np.float64)
        return (exact(x.x) - shift) * np.asarray(x.map.inverse_scale, np.float64)
    if not isinstance(x, Modulated):
        return np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    rows, width = np.asarray(x.x, np.float64), x.shape[-1]
    rows = rows.reshape(len(x.modulation), -1, width)
    parts = np.asarray(x.modulation, np.float64).reshape(len(rows), 1, 6, width)
    normed = rows - rows.mean(-1, keepdims=True)
    normed /= np.sqrt(np.square(normed).mean(-1, keepdims=True) + EPS)
    return (normed * (1 + parts[..., 4, :]) + parts[..., 3, :]).reshape(-1, width)


def mapped(x, has_shift):
    rng, width = np.random.default_rng(9), x.shape[-1]
    shift = jnp.asarray(rng.normal(size=width), jnp.float32) if has_shift else None
    return Mapped(x, InputMap(jnp.asarray(np.exp(rng.normal(size=width)), jnp.float32), shift))


def steps_off(kind, x):
    """Returns how far the inputs that a kernel multiplies lie from the exact ones, in steps `[M, K]`.

    They are seen by multiplying with the identity.
    """
    width = x.shape[-1]
    weight = {"levels": W(8, 0, symmetric=True), "groups": W(8, 128, symmetric=True)}[kind]
    act = {"levels": TOKEN, "groups": ActSpec(8, 128)}[kind]
    q = quantize(jnp.eye(width, dtype=jnp.float32), weight)
    (found,) = compiled(lambda x, q: fused(kind, x, q, act))(x, q)
    assert (found.shape, found.dtype) == (x.shape, jnp.float32)
    found, wide = np.asarray(found, np.float64).reshape(-1, width), exact(x)
    if kind == "levels":
        step = np.abs(wide).max(1, keepdims=True) / 127
    else:
        more = -width % 128
        groups = np.pad(wide, ((0, 0), (0, more))).reshape(len(wide), -1, 128)
        spread = groups.max(-1).clip(0) - groups.min(-1).clip(None, 0)
        step = np.repeat(spread / 255, 128, axis=1)[:, :width]
    return (found - wide) / np.where(step == 0, 1, step)


BEFORE = {
    "norm": lambda x: x,
    "norm and scale": lambda x: mapped(x, False),
    "norm, shift and scale": lambda x: mapped(x, True),
    "shift and scale": lambda x: mapped(x.x, True),
}
# Rows of tokens, channels, dtype.
TOKENS = {
    "samples": ((2, 128), 256, "float32"),
    "frames": ((2, 2, 64), 128, "bfloat16"),
    "padded channels": ((2, 128), 200, "float32"),
    "blocks of a sample": ((2, 3, 96), 128, "float32"),
    "more samples than a tile has rows": ((9, 128), 128, "float32"),
}


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize("kind", ["levels", "groups"])
@pytest.mark.parametrize(
    ("before", "name"),
    [*((before, "padded channels") for before in BEFORE), *(("norm", name) for name in TOKENS)],
)
def test_a_norm_and_a_map_come_before_the_quantizer(kind, before, name):
    rows, width, dtype = TOKENS[name]
    off = steps_off(kind, BEFORE[before](modulated(rows, width, dtype)))
    assert np.isnan(off[-1]).all()
    # Zero points are rounded too, and the ends are codes of their own: up to half a step more.
    limit = 0.5 + 1e-2 if kind == "levels" else 1 + 1e-2
    assert np.abs(off[:-1]).max() < limit
    assert np.abs(off[:-1]).mean() < 0.27


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize("kind", ["levels", "groups"])
def test_padding_is_no_channel_of_a_norm(kind):
    x, rng = modulated((1, 128), 72), np.random.default_rng(0)
    weight, act = KINDS[kind]
    q = quantize(jnp.asarray(rng.normal(size=(72, 20)), jnp.float32), weight)
    (found,) = compiled(lambda x, q: fused(kind, x, q, act))(x, q)
    (by_xla,) = compiled(lambda x, q: fused_matmul(x, q, act, "integer", "xla"))(x, q)
    rows = slice(0, 127)
    scale = np.abs(by_xla[0, rows]).max(-1, keepdims=True)
    # A code of a token may be rounded the other way.
    np.testing.assert_array_less(np.abs(found - by_xla)[0, rows] / scale, 2e-2)
    assert np.isnan(found[0, 127]).all()


def gated_operands(kind, rows, dtype, width=256):
    rng, (weight, act) = np.random.default_rng(0), KINDS[kind]
    q = quantize(jnp.asarray(rng.normal(size=(128, width)) / 16, jnp.float32), weight)
    bias = jnp.asarray(rng.normal(size=width), jnp.float32)
    x_dtype = "float32" if act else "bfloat16"
    x = jnp.asarray(rng.normal(size=(*rows, 128)), x_dtype)
    before = jnp.asarray(rng.normal(size=(*rows, width)) * 10, dtype)
    modulation = jnp.asarray(rng.normal(size=(rows[0], 3 * width)) * 3, jnp.float32)
    return x, q, act, bias, Gated(before, modulation, 1)


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "dtype"),
    [((2, 128), "float32"), ((2, 2, 128), "bfloat16"), ((9, 128), "float32")],
    ids=str,
)
def test_a_result_is_added_times_its_gate(kind, rows, dtype):
    x, q, act, bias, gated = gated_operands(kind, rows, dtype)

    def products(x, q, gated):
        (alone,) = fused(kind, x, q, act)
        return fused(kind, x, q, act, "bfloat16", bias, GELU, gated)[0], alone

    found, alone = compiled(products)(x, q, gated)
    assert (found.shape, found.dtype) == ((*rows, 256), jnp.float32)
    gate = gated.modulation[:, 256:512].reshape(rows[0], *(1,) * (len(rows) - 1), 256)
    expected = gated.x.astype(jnp.float32) + gate * activated(alone + bias, GELU)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize("kind", ["levels", "groups"])
def test_what_a_block_reads_is_what_a_tpu_fetches_for_it(kind):
    """Where blocks of modulations end beyond the samples, and what is not written yet is NaN."""
    from jax.experimental.pallas import tpu as pltpu

    _, q, act, bias, gated = gated_operands(kind, (9, 128), "float32")
    x = mapped(modulated((9, 128), 128), True)

    def product(interpret):
        given = (ActQuant(act), "float32", bias, None, gated)
        return jax.jit(lambda x, q: FUSED[kind](x, q, *given, interpret=interpret)[0])(x, q)

    found = product(pltpu.InterpretParams(uninitialized_memory="nan"))
    np.testing.assert_array_equal(found, product(True))


@pytest.mark.skipif(
    "xla_backend_optimization_level=0" in os.environ.get("XLA_FLAGS", ""),
    reason="without LLVM's optimizations XLA's own slopes of a map are not all finite",
)
@pytest.mark.parametrize("kind", ["levels", "groups"])
def test_the_derivative_is_that_of_xla(kind):
    _, q, act, bias, gated = gated_operands(kind, (2, 128), "float32", 128)
    rng = np.random.default_rng(1)
    x = dataclasses.replace(modulated((2, 128), 128), x=jnp.asarray(rng.normal(size=(2, 128, 128))))
    x = mapped(x, True)

    def slopes(product, x, gated):
        total = lambda x, gated: product(x, gated)[0].sum()  # noqa: E731
        return jax.tree.leaves(jax.grad(total, (0, 1))(x, gated))

    def both(x, q, gated):
        ours = slopes(
            lambda x, gated: fused(kind, x, q, act, "float32", bias, GELU, gated), x, gated
        )
        settings = {"bias": bias, "activation": GELU}
        by_xla = slopes(
            lambda x, gated: fused_matmul(x, q, act, "integer", "xla", gated=gated, **settings),
            *(x, gated),
        )
        return ours, by_xla

    for one, other in zip(*jax.jit(both)(x, q, gated), strict=True):
        assert np.isfinite(other).all()
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 * np.abs(other).max())


# Rows of tokens, output channels, parts, the dtype of what is added to; what XLA then computes.
LEFT = [
    ((3, 100), 128, 1, "float32", ["norm", "sum"]),  # 32 does not divide a sample
    ((3, 96), 128, 1, "float32", ["norm", "sum"]),  # few rows
    ((2, 128), 130, 1, "float32", ["sum"]),
    ((2, 128), 128, 1, "bfloat16", ["sum"]),  # a sum that is not as wide as XLA's
    ((2, 128), 256, 2, "float32", ["2 parts"]),
    ((2, 128), 256, 1, "float32", []),
]


@pytest.mark.parametrize(("rows", "width", "parts", "dtype", "left"), LEFT, ids=str)
def test_what_cannot_be_cut_by_samples_is_left_to_xla(rows, width, parts, dtype, left, monkeypatch):
    _, q, act, bias, gated = gated_operands("levels", rows, dtype, width)
    gated = dataclasses.replace(gated, modulation=gated.modulation.astype(dtype))
    x, seen = modulated(rows, 128), []
    x = dataclasses.replace(x, x=jnp.nan_to_num(x.x))
    plain, followed = tpu_call.plain, tpu_call.followed
    monkeypatch.setattr(tpu_call, "plain", lambda x: seen.append("norm") or plain(x))

    def spied(y, gated, parts):
        seen.extend(["sum"] * (gated is not None) + [f"{parts} parts"] * (parts > 1))
        return followed(y, gated, parts)

    monkeypatch.setattr(tpu_call, "followed", spied)
    found = compiled(
        lambda x, q, gated: fused("levels", x, q, act, "float32", bias, None, gated, parts)
    )(x, q, gated)
    assert seen == left
    by_xla = compiled(
        lambda x, q, gated: fused_matmul(
            *(x, q, act, "integer", "xla"), bias=bias, gated=gated, parts=parts
        )
    )(x, q, gated)
    assert [(a.shape, a.dtype) for a in found] == [(a.shape, a.dtype) for a in by_xla]
    found, by_xla = (np.concatenate(a, -1, dtype=np.float64) for a in (found, by_xla))
    # A code of a token may be rounded the other way.
    np.testing.assert_allclose(found, by_xla, rtol=0, atol=2e-2 * np.abs(by_xla).max())


def test_a_block_of_rows_lies_in_one_sample():
    for count in (1, 96, 100, 128, 160, 256, 300, 1024, 1184, 4096, 32760):
        sizes = Sizes(2 * count, 1152, 3456, 4, 36, 4, tokens_per_sample=count)
        found, dividing = list(row_blocks(sizes)), [32 * n for n in range(4, 17)]
        assert bool(found) == any(count % rows == 0 for rows in dividing)
        for rows, num_rows in found:
            assert (count % rows, rows % 32, rows * num_rows) == (0, 0, 2 * count)
            assert 128 <= rows <= 512


def test_what_stands_around_a_product_is_counted():
    alone = Sizes(4096, 1152, 3456, 4, 36, 4, result_itemsize=2)
    whole = dataclasses.replace(alone, channel_rows=4, added_itemsize=4, tokens_per_sample=256)
    blocks = chosen_blocks(whole)
    assert (blocks.rows, blocks.columns, blocks.panels) == (256, 384, 1)
    assert vmem_bytes(whole, blocks) <= VMEM_LIMIT
    more = (2 * 4 + 4) * 256 * 384 + 2 * 4 * 8 * 4 * 1152
    assert vmem_bytes(whole, blocks) - vmem_bytes(alone, blocks) == more


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_a_block_is_what_it_is_by_xla(dtype, tolerance):
    found = block_facts(functools.partial(levels_fused, interpret=True), dtype, 128)
    assert found["error"] < tolerance
    # fc2, proj, fc1 and qkv.
    around = {("Mapped", True, 1), ("Modulated", False, 1), ("Modulated", False, 3)}
    assert around < set(map(tuple, found["calls"]))
