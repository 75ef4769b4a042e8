"""A product in groups, as papers have it, in one Pallas kernel for TPUs.

Compiled for v5e, v5p and v6e, interpreted on CPU, not run on a TPU.

Inputs have a scale, and a zero point, for every token and group, computed in the kernel; weights too. A block
of rows is quantized once into VMEM, and packed codes become int8, less their zero points, there once per
call. A unit of 128 input channels is multiplied in int32, the zero points of the inputs are subtracted, and the
sums are scaled by token and output channel and added up in float32.

Dimensions: M rows (tokens), K input channels, N output channels, G groups along K, U units of 128 input
channels; J blocks of columns of a panel, L rows and C columns of a block (`tpu_blocks`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int, Int32, UInt8

from qdit_jax.kernels.group_reasons import is_in_groups
from qdit_jax.kernels.refs import Ref, Span
from qdit_jax.kernels.token_scales import INFINITY, LEAST_NORMAL, magnitude_bits
from qdit_jax.kernels.tpu_blocks import STRIP, TILE, groups_sizes
from qdit_jax.kernels.tpu_call import TPUOperands, fused_by
from qdit_jax.kernels.tpu_reasons import groups_reason, row
from qdit_jax.kernels.tpu_rows import TileFn, Tokens, Writer, span
from qdit_jax.kernels.tpu_words import EACH_BYTE, SIGNS, as_rows_of, code_words
from qdit_jax.kernels.units import of_units
from qdit_jax.quant import (
    ActSpec,
    QTensor,
    effective_group_size,
    rounded_quotients,
    scale_value,
)


def _operands(q: QTensor, spec: ActSpec | None) -> TPUOperands:
    assert spec is not None, "its row refuses it"
    scale = of_units(scale_value(q.scale), q.shape[0], q.group_size, TILE)
    size = effective_group_size(q.shape[0], spec.group_size)
    kernel = functools.partial(_kernel, act_spec=spec, tiles=-(-size // TILE))
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
    tiles: int,
) -> None:
    """Writes one block `[L, C]` of the result, and what later blocks share.

    Shared are the codes `[L, K]`, scales and zero points `[L, U]` of the rows, and the weights `[J, K, C]` of
    the panel with their sums `[J, U, C]`. Packed codes are `[R, C]`, or `[C, R]` where there is room to
    have them `turned`. A group of the inputs has `tiles` units.
    """
    block = pl.program_id(2)

    @pl.when(block == 0)
    def _() -> None:
        quantize_rows(tokens, x_codes, x_scale, x_zero, act_spec, tiles)

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        columns = turned[0] if turned else codes
        if turned:
            columns[...] = codes[...].T
        unpack_columns(columns, offset, weights.at[block], bits, groups)
        if not act_spec.symmetric:
            sum_weights(weights.at[block], sums_of_weights.at[block])

    total = jnp.zeros((x_codes.shape[0], scale.shape[1]), jnp.float32)
    for unit in range(scale.shape[0]):
        channels = pl.ds(unit * TILE, TILE)
        sums = int8_dot(x_codes[:, channels], weights[block, channels, :])
        if not act_spec.symmetric:
            sums = sums - x_zero[:, unit : unit + 1] * sums_of_weights[block, unit : unit + 1, :]
        scaled = sums.astype(jnp.float32) * x_scale[:, unit : unit + 1]
        total = total + scaled * scale[unit : unit + 1, :]
    writer.write(total)


def int8_dot(left: Array, right: Array) -> Int32[Array, "M N"]:
    """Returns the product of int8, summed in int32."""
    return jnp.dot(
        left, right, precision=jax.lax.Precision.DEFAULT, preferred_element_type=jnp.int32
    )


def quantize_rows(
    tokens: Tokens, x_codes: Ref, x_scale: Ref, x_zero: Ref, spec: ActSpec, tiles: int
) -> None:
    """Writes codes, scales and zero points of a block of tokens, as `ActSpec` has them; not finite: NaN.

    An int8 tile at a time, which is read three times: a strip of all K does not fit into registers.
    """
    count = tokens.num_tiles
    groups = [range(first, min(first + tiles, count)) for first in range(0, count, tiles)]

    def quantize_strip(rows: Span, tile_fn: TileFn) -> None:
        most = functools.reduce(
            jnp.maximum, (magnitude_bits(tile_fn(unit)) for unit in range(count))
        )
        is_finite = jnp.max(most, axis=1, keepdims=True) < INFINITY
        for group in groups:
            low = functools.reduce(jnp.minimum, (tile_fn(unit) for unit in group))
            high = functools.reduce(jnp.maximum, (tile_fn(unit) for unit in group))
            extremes = (
                jnp.min(low, axis=1, keepdims=True),
                jnp.max(high, axis=1, keepdims=True),
            )
            codes_fn, scale, zero = grid_of_rows(*extremes, is_finite, spec)
            for unit in group:
                x_codes[rows, span(unit)] = codes_fn(tile_fn(unit)).astype(jnp.int8)
                x_scale[rows, unit : unit + 1] = scale
                x_zero[rows, unit : unit + 1] = zero

    tokens.over_strips(quantize_strip)


def grid_of_rows(
    low: Float[Array, "L 1"], high: Float[Array, "L 1"], is_finite: Array, spec: ActSpec
) -> tuple[
    Callable[[Float[Array, "L K"]], Int[Array, "L K"]], Float[Array, "L 1"], Int32[Array, "L 1"]
]:
    """Returns what makes int8 elements of a group of each row, its scales and its zero points."""
    half = 2 ** (spec.bits - 1)
    low, high = spec.range_fn.limits_from_extremes(low, high, spec.bits, spec.symmetric)
    scale = spec.range_fn.scale(low, high, spec.bits, spec.symmetric)
    # What a TPU flushes to zero has no reciprocal.
    divisor = jnp.where(is_finite & (scale >= LEAST_NORMAL), scale, 1.0)
    scale = jnp.where(is_finite, divisor, jnp.nan)
    if spec.symmetric:
        return rounded_quotients(divisor, half - 1), scale, jnp.zeros(low.shape, jnp.int32)
    quotients_fn = rounded_quotients(divisor, 2 * half - 1)
    zero = jnp.clip(quotients_fn(jnp.where(is_finite, -low, 0.0)), 0, 2 * half - 1) - half

    def codes_fn(x: Float[Array, "L K"]) -> Int[Array, "L K"]:
        return jnp.clip(quotients_fn(x) + zero, -half, half - 1)

    return codes_fn, scale, zero


def unpack_columns(
    codes: Ref, offset: Ref, weights: Ref, bits: int, groups: tuple[int, ...]
) -> None:
    """Writes the int8 weights `[K, C]` of a block of columns, less their zero points."""
    offsets = offset[...].astype(jnp.int32) * EACH_BYTE
    for index, group in enumerate(groups):
        word = (code_words(codes, bits, index) + offsets[group : group + 1]) ^ SIGNS
        weights[pl.ds(index * STRIP, STRIP), :] = as_rows_of(word, jnp.int8)


def sum_weights(weights: Ref, sums: Ref) -> None:
    """Writes the sums `[U, C]` of the weights `[K, C]` of each unit."""
    ones = jnp.ones((STRIP, TILE), jnp.int8)
    for unit in range(sums.shape[0]):
        found = int8_dot(ones, weights[pl.ds(unit * TILE, TILE), :])
        sums[unit : unit + 1, :] = found[:1]


TPU_GROUPS = row(
    *("tpu_groups", groups_fused, ("weights", "sums", "codes"), groups_reason),
    meant_for=is_in_groups,
)
