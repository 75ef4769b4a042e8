"""A product in groups, as papers have it, in one Pallas kernel for TPUs.

Compiled for v5e, v5p and v6e, interpreted on CPU, not run on a TPU.

Inputs have a scale, and a zero point, for every token and group, computed in the kernel; weights too. A block
of rows is quantized once into VMEM, and packed codes become int8, less their zero points, there once per
call. A unit of 32, 64 or 128 input channels is multiplied in int32, the zero points of the inputs are subtracted,
and the sums are scaled by token and output channel and added up in float32. A product always has 128 channels: of
a smaller unit, the others are zeros in the rows.

Dimensions: M rows (tokens), K input channels, N output channels, G groups along K, U units of input
channels; J blocks of columns of a panel, L rows and C columns of a block (`tpu_blocks`).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int8, Int32, Num, UInt8

from qdit_jax.kernels.group_reasons import is_in_groups
from qdit_jax.kernels.refs import Ref, Span
from qdit_jax.kernels.tpu_blocks import STRIP, TILE, groups_sizes, rounded_up
from qdit_jax.kernels.tpu_call import TPUOperands, fused_by
from qdit_jax.kernels.tpu_group_rows import Cut, lanes_of, quantize_rows
from qdit_jax.kernels.tpu_reasons import groups_reason, row
from qdit_jax.kernels.tpu_rows import Tokens, Writer, span
from qdit_jax.kernels.tpu_words import EACH_BYTE, SIGNS, as_rows_of, code_words
from qdit_jax.kernels.units import of_units, unit_of
from qdit_jax.quant import (
    ActSpec,
    QTensor,
    scale_value,
)

EIGHT = 8  # units of a step, whose rows of float32 fill a tile


def _operands(q: QTensor, spec: ActSpec | None) -> TPUOperands:
    assert spec is not None, "its row refuses it"
    unit = unit_of(q.shape[0], spec.group_size, q.group_size)
    scale = of_units(scale_value(q.scale), q.shape[0], q.group_size, unit)
    # Of all channels: those of padding too.
    size = spec.group_size if 0 < spec.group_size < q.shape[0] else rounded_up(q.shape[0], TILE)
    kernel = functools.partial(_kernel, act_spec=spec, cut=Cut(size, unit))
    return TPUOperands(kernel, [offsets_of(q)], [scale])


# In integer numerics. Equal to `xla.integer_matmul` to float rounding, whose derivative it has; a token that
# holds NaN or infinity gives NaN.
groups_fused = fused_by("tpu_groups", _operands, groups_sizes)


def offsets_of(q: QTensor) -> UInt8[Array, "G N"]:
    """Returns 128 less the zero points: `(code + offset) ^ 128` is int8, less the zero point."""
    zero_point = q.zero_point
    if zero_point is None:
        return jnp.full(q.scale.shape, 128 - 2 ** (q.bits - 1), jnp.uint8)
    return (128 - zero_point.astype(jnp.int32)).astype(jnp.uint8)


def _kernel(
    tokens: Tokens,
    codes: Ref,
    offset: Ref,
    scale: Ref,
    x_codes: Ref,
    x_scale: Ref,
    x_zero: Ref,
    weights: Ref,
    sums_of_weights: Ref,
    *turned: Ref,
    writer: Writer,
    bits: int,
    groups: tuple[int, ...],
    act_spec: ActSpec,
    cut: Cut,
) -> None:
    """Writes one block `[L, C]` of the result, and what later blocks share.

    Shared are the codes `[L, K]`, scales and zero points `[_, L, 128]` of the rows, U lanes of them, and the
    weights `[J, K, C]` of the panel with their sums `[J, U, C]`. Packed codes are `[R, C]`, or `[C, R]` where there is room to
    have them `turned`.
    """
    block = pl.program_id(2)

    @pl.when(block == 0)
    def _() -> None:
        quantize_rows(tokens, x_codes, x_scale, x_zero, act_spec, cut)

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        columns = turned[0] if turned else codes
        if turned:
            columns[...] = codes[...].T
        unpack_columns(columns, offset, weights.at[block], bits, groups)
        if not act_spec.symmetric:
            sum_weights(weights.at[block], sums_of_weights.at[block], cut)

    def with_units(index: Array | int, total: Float[Array, "L C"], count: int) -> Array:
        """Returns `total` and the scaled sums of `count` units, the `index`-th eight."""
        x_scales, x_zeros = (eight_lanes(ref, index) for ref in (x_scale, x_zero))
        eight = run(index, EIGHT, count)
        w_scales, w_sums = scale[eight, :], sums_of_weights[block, eight, :]
        for i in range(count):
            tile, place = index * (EIGHT // cut.units) + i // cut.units, i % cut.units
            channels = run(tile, TILE, TILE)
            own = only_lanes(x_codes[:, channels], place, cut)
            sums = int8_dot(own, weights[block, channels, :])
            if not act_spec.symmetric:
                sums = sums - x_zeros[:, i : i + 1] * w_sums[i : i + 1, :]
            scaled = sums.astype(jnp.float32) * x_scales[:, i : i + 1]
            total = total + scaled * w_scales[i : i + 1, :]
        return total

    # A loop, for the compiler gives every unit room of its own otherwise.
    whole, rest = divmod(scale.shape[0], EIGHT)
    total = jnp.zeros((x_codes.shape[0], scale.shape[1]), jnp.float32)
    if whole:
        total = jax.lax.fori_loop(0, whole, lambda i, total: with_units(i, total, EIGHT), total)
    if rest:
        total = with_units(whole, total, rest)
    writer.write(total)


def eight_lanes(values: Ref, index: Array | int) -> Num[Array, "L 128"]:
    """Returns values `[_, L, 128]` with the `index`-th eight of all lanes first."""
    from jax.experimental.pallas import tpu as pltpu

    count = TILE // EIGHT  # of lanes
    if isinstance(index, int):
        return pltpu.roll(values[index // count], -index * EIGHT % TILE, 1)
    shift = jax.lax.rem(TILE - jax.lax.rem(index, count) * EIGHT, TILE)
    return pltpu.roll(values[jax.lax.div(index, count)], shift, 1)


def run(index: Array | int, size: int, count: int) -> Span:
    """Returns `count` places from the start of the `index`-th run of `size` on."""
    start = index * size
    return pl.ds(start if isinstance(start, int) else pl.multiple_of(start, size), count)


def int8_dot(left: Array, right: Array) -> Int32[Array, "M N"]:
    """Returns the product of int8, summed in int32."""
    return jnp.dot(
        left, right, precision=jax.lax.Precision.DEFAULT, preferred_element_type=jnp.int32
    )


def only_lanes(values: Int8[Array, "L 128"], place: int, cut: Cut) -> Int8[Array, "L 128"]:
    """Returns the values of one unit of a tile's, zeros elsewhere."""
    if cut.units == 1:
        return values
    words = as_rows_of(values, jnp.int32)  # four rows of a channel
    first = place * cut.unit
    return as_rows_of(jnp.where(lanes_of(words.shape, first, cut.unit), words, 0), jnp.int8)


def unpack_columns(
    codes: Ref, offset: Ref, weights: Ref, bits: int, groups: tuple[int, ...]
) -> None:
    """Writes the int8 weights `[K, C]` of a block of columns, less their zero points."""
    offsets = offset[...].astype(jnp.int32) * EACH_BYTE
    for index, group in enumerate(groups):
        word = (code_words(codes, bits, index) + offsets[group : group + 1]) ^ SIGNS
        weights[pl.ds(index * STRIP, STRIP), :] = as_rows_of(word, jnp.int8)


def sum_weights(weights: Ref, sums: Ref, cut: Cut) -> None:
    """Writes the sums `[U, C]` of the weights `[K, C]` of each unit."""
    ones = jnp.ones((STRIP, TILE), jnp.int8)
    own = [only_lanes(ones, place, cut) for place in range(cut.units)]
    for unit in range(sums.shape[0]):
        tile, place = divmod(unit, cut.units)
        sums[unit : unit + 1, :] = int8_dot(own[place], weights[span(tile), :])[:1]


TPU_GROUPS = row(
    *("tpu_groups", groups_fused, ("weights", "sums", "codes"), groups_reason),
    meant_for=is_in_groups,
)
