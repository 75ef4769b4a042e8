"""A product in groups, as papers have it, in one Pallas Mosaic GPU kernel for NVIDIA's Hopper (sm_90a).

Compiled ahead of time for an H100, interpreted on CPU, not run on a GPU.

XLA quantizes the inputs, a scale (and a zero point) for every token and group. The kernel fetches blocks
of their codes and of packed weights, makes int8 of these in registers, multiplies a unit of input channels
in int32, scales its sums by token and output channel, and adds them up in float32. Zero points are exact:
those of 4-bit weights are subtracted before the product, all others from the int32 sums.

Dimensions: M rows (tokens), K input channels, N output channels, all padded to whole blocks; U units,
runs of input channels inside which both operands have one scale.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int8, Int32, Num, UInt8

from qdit_jax.kernels import gpu_group_rows, gpu_words
from qdit_jax.kernels.call import Call
from qdit_jax.kernels.gpu_call import (
    Writer,
    multiply,
    place_of,
    run_of,
    run_pipeline,
)
from qdit_jax.kernels.gpu_memory import loaded, loaded_words, of_columns, of_rows, word_layout
from qdit_jax.kernels.gpu_neighbors import fused_by
from qdit_jax.kernels.gpu_tiles import (
    HALF,
    RUN,
    Shape,
    Tiles,
    rounded_up,
)
from qdit_jax.kernels.operands import act_elements
from qdit_jax.kernels.prologue import Pending, plain
from qdit_jax.kernels.refs import Ref
from qdit_jax.kernels.units import of_units, unit_of, unit_sums
from qdit_jax.quant import ActQuant, ActSpec, QTensor, code_rows, scale_value


class Operands(NamedTuple):
    """What the kernel reads.

    Attributes:
        tokens: codes of the inputs.
        codes: packed weights, of R bytes an output channel.
        token_scale: of the units.
        channel_scale: of the units.
        zero: zero points of 4-bit weights; None where these are symmetric, or 8 bits wide.
        pairs: of each token and of each channel, whose products are subtracted from the sums of a unit.
    """

    tokens: Int8[Array, "M K"]
    codes: UInt8[Array, "N R"]
    token_scale: Float[Array, "U M"]
    channel_scale: Float[Array, "U N"]
    zero: UInt8[Array, "U N"] | None
    pairs: tuple[tuple[Int32[Array, "U M"], Int32[Array, "U N"]], ...]


def groups_shape(rows: int, q: QTensor, spec: ActSpec | None, itemsize: int) -> Shape:
    """Returns the product as the table of blocks knows it."""
    assert spec is not None, "its row refuses it"
    unit = unit_of(q.shape[0], spec.group_size, q.group_size)
    return Shape(rows, *q.shape, q.bits, itemsize, unit)


def _operands(
    x: Float[Array, "*lead K"] | Pending, q: QTensor, call: Call
) -> tuple[Callable[..., None], list[Array]]:
    assert call.spec is not None, "its row refuses it"
    unit = unit_of(q.shape[0], call.spec.group_size, q.group_size)
    operands = operands_of(quantized_tokens(x, call.spec, call.interpret), q, call.spec, unit)
    leaves, tree = jax.tree.flatten(padded_to_blocks(operands, call.tiles))
    return functools.partial(_kernel, tree=tree, bits=q.bits, unit=unit), leaves


# In integer numerics. Equal to `xla.integer_matmul` to float rounding, whose derivative it has; a token that
# holds NaN or infinity gives NaN.
groups_fused = fused_by("gpu_groups", _operands, groups_shape)


def quantized_tokens(
    x: Float[Array, "*lead K"] | Pending, spec: ActSpec, interpret: Any
) -> gpu_group_rows.Groups:
    """Returns tokens in groups, in one pass where `gpu_group_rows` takes them; else by XLA."""
    if gpu_group_rows.fits(x, spec):
        return gpu_group_rows.quantized_groups(x, spec, interpret=interpret)
    return quantized_by_xla(plain(x), spec)


def quantized_by_xla(x: Float[Array, "*lead K"], spec: ActSpec) -> gpu_group_rows.Groups:
    """Returns tokens in groups of any size."""
    wide = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    tokens, zero, scale = act_elements(wide, ActQuant(spec), jnp.dtype(jnp.int8))
    is_finite = jnp.all(jnp.isfinite(wide), axis=-1)
    scale = jnp.where(is_finite[:, None], jnp.asarray(scale), jnp.nan).T
    return gpu_group_rows.Groups(
        tokens, scale, None if zero is None else jnp.asarray(zero, jnp.int32).T
    )


def operands_of(groups: gpu_group_rows.Groups, q: QTensor, spec: ActSpec, unit: int) -> Operands:
    """Returns the operands, not padded; scales are NaN of a token that is not finite.

    `sum (cx - zx)(cw - zw) = sum cx cw - zx sum (cw - zw) - zw sum cx`, where of 4-bit weights `zw` is
    subtracted from the codes.
    """
    num_channels = q.shape[0]
    tokens, scale, zero = groups

    def of_tokens(values: Num[Array, "G M"]) -> Num[Array, "U M"]:
        return of_units(values, num_channels, spec.group_size, unit)

    def of_channels(values: Num[Array, "G N"]) -> Num[Array, "U N"]:
        return of_units(values, num_channels, q.group_size, unit)

    zero_point = None if (stored := q.zero_point) is None else of_channels(stored)
    code_zero = zero_point if q.bits == 4 else None  # what is subtracted from codes
    pairs = []
    if zero is not None:
        pairs.append((of_tokens(zero), sums_of_weights(q, zero_point, unit)))
    if zero_point is not None and code_zero is None:
        remaining = zero_point.astype(jnp.int32) - 2 ** (q.bits - 1)
        pairs.append((unit_sums(tokens.astype(jnp.int32), unit), remaining))
    channel_scale = of_channels(scale_value(q.scale))
    return Operands(
        tokens, jnp.asarray(q.codes), of_tokens(scale), channel_scale, code_zero, tuple(pairs)
    )


def sums_of_weights(
    q: QTensor, zero_point: UInt8[Array, "U N"] | None, unit: int
) -> Int32[Array, "U N"]:
    """Returns the sums over units of the codes less their zero points; those computed before where groups are units."""
    if q.ready is not None and q.ready.sums is not None and len(q.ready.sums) * unit == q.shape[0]:
        found: Int32[Array, "U N"] = q.ready.sums
        return found
    sums = unit_sums(code_rows(q).astype(jnp.int32), unit)
    return sums - unit * (2 ** (q.bits - 1) if zero_point is None else zero_point.astype(jnp.int32))


def padded_to_blocks(operands: Operands, tiles: Tiles) -> Operands:
    """Returns the operands of whole blocks: rows and output channels of zeros are added."""
    num_rows, width = len(operands.tokens), len(operands.codes)
    rows = rounded_up(num_rows, tiles.rows) - num_rows
    columns = rounded_up(width, tiles.block) - width

    def of_tokens(values: Num[Array, "U _"]) -> Num[Array, "U _"]:
        return jnp.pad(values, ((0, 0), (0, rows)))

    def of_channels(values: Num[Array, "U _"]) -> Num[Array, "U _"]:
        return jnp.pad(values, ((0, 0), (0, columns)))

    return Operands(
        jnp.pad(operands.tokens, ((0, rows), (0, 0))),
        jnp.pad(operands.codes, ((0, columns), (0, 0))),
        of_tokens(operands.token_scale),
        of_channels(operands.channel_scale),
        None if operands.zero is None else of_channels(operands.zero),
        tuple((of_tokens(token), of_channels(channel)) for token, channel in operands.pairs),
    )


def _kernel(
    *leaves: Ref,
    writer: Writer,
    left_block: Ref = None,
    tree: Any,
    bits: int,
    unit: int,
    tiles: Tiles,
) -> None:
    """Writes one block of the result; `leaves` are those of the operands."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    at, size = place_of(tiles), (tiles.columns, tiles.rows)

    def compute(pipeline: Any) -> None:
        zeros = plgpu.layout_cast(jnp.zeros(size, jnp.float32), plgpu.Layout.WGMMA)
        writer.write(pipeline(zeros), at)

    def step(_: Any, *blocks: Any) -> Any:
        *found, total = blocks
        one = jax.tree.unflatten(tree, found)
        packed: dict[int, Array] = {}  # by first byte; both halves of 4 bits are in the same

        def left_operand(index: int, half: int) -> Array:
            first = half * HALF if bits == 8 else 0
            if first not in packed:
                packed[first] = loaded_words(one.codes.at[at.own, pl.ds(first, HALF)], left_block)
            words = gpu_words.code_words(packed[first], bits, half)
            if one.zero is None:
                words = gpu_words.symmetric_level_words(words, bits)
            else:
                zero = of_words(one.zero.at[index, at.own], tiles.columns)
                words = gpu_words.centered_words(words, 128 - zero)
            return words if unit >= HALF else words & mask_words(index, unit, tiles.columns)

        def sums_of(sums: Ref, lefts: dict[int, Array]) -> Array:
            for half, left in lefts.items():
                multiply(sums, left, one.tokens, half, left_block)
            return sums[...]

        for index in range(RUN // unit):
            start, stop = index * unit, (index + 1) * unit
            halves = range(start // HALF, -(-stop // HALF))
            lefts = {half: left_operand(index, half) for half in halves}
            sums = pl.run_scoped(
                functools.partial(sums_of, lefts=lefts), plgpu.ACC(size, jnp.int32)
            )
            for token, channel in one.pairs:
                sums = sums - of_rows(token.at[index], size) * of_columns(
                    channel.at[index, at.own], size
                )
            scaled = sums.astype(jnp.float32) * of_rows(one.token_scale.at[index], size)
            total = total + scaled * of_columns(one.channel_scale.at[index, at.own], size)
        return total

    def units_of(width: int) -> Any:
        return plgpu.BlockSpec((RUN // unit, width), lambda k: (k, 0), memory_space=plgpu.SMEM)

    whole = jax.tree.unflatten(tree, leaves)
    of_tokens, of_channels = units_of(tiles.rows), units_of(tiles.block)
    specs = Operands(
        run_of(tiles.rows, RUN),
        run_of(tiles.block, RUN * bits // 8),
        of_tokens,
        of_channels,
        None if whole.zero is None else of_channels,
        tuple((of_tokens, of_channels) for _ in whole.pairs),
    )
    blocks = Operands(
        whole.tokens.at[at.rows, :],
        whole.codes.at[at.block, :],
        whole.token_scale.at[:, at.rows],
        whole.channel_scale.at[:, at.block],
        None if whole.zero is None else whole.zero.at[:, at.block],
        tuple((token.at[:, at.rows], channel.at[:, at.block]) for token, channel in whole.pairs),
    )
    in_specs = jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, plgpu.BlockSpec))
    pipeline = run_pipeline(writer, step, compute, whole.tokens.shape[1] // RUN, tiles, in_specs)
    pipeline(*jax.tree.leaves(blocks))


def of_words(values: Ref, num_columns: int) -> Int32[Array, "N W"]:
    """Returns values of columns for each word of half a run, in int32."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    layout = word_layout()
    found = loaded(values, layout.reduce(1), optimized=False).astype(jnp.int32)
    wide = lax.broadcast_in_dim(found, (num_columns, HALF // 4), [0])
    return plgpu.layout_cast(wide, layout)


def mask_words(index: int, unit: int, num_columns: int) -> Int32[Array, "N W"]:
    """Returns a mask of a unit's words in the half of a run that holds it."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    layout, shape = word_layout(), (num_columns, unit // 4)
    parts = [
        plgpu.layout_cast(jnp.full(shape, -1 if own else 0, jnp.int32), layout)
        for own in (number == index % (HALF // unit) for number in range(HALF // unit))
    ]
    return lax.concatenate(parts, 1)
