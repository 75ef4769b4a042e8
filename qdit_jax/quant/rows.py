"""What a `QTensor` holds, unpacked: `[N, K]` as products want it, a row per output channel, or `[K, N]`.

Every weight of a group has one scale, and a byte holds codes from several places of K. Where groups and
the fields of bytes nest, the arithmetic is done with K as several axes, `Axes`: then XLA:CPU computes
neither a place nor a scale anew for each weight, which takes up to three times as long.

Dimensions: K input channels, N output channels, G groups along K, B scales of a group.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8, Num, Shaped, UInt8

from qdit_jax.quant import codebooks, groups, levels, packing
from qdit_jax.quant.qtensor import QTensor, scale_values, step_and_offset, transposed


class Axes(NamedTuple):
    """K as several axes.

    Attributes:
        sizes: of the axes.
        num_outer: how many of them count groups.
        field: the axis that counts the fields of a byte; None if codes are unpacked before.
    """

    sizes: tuple[int, ...]
    num_outer: int
    field: int | None


def axes_of(q: QTensor) -> Axes | None:
    """Returns the axes in which groups and fields nest; None if one axis is all that there is.

    So it is where the last group is shorter, and faster where K is a single run.
    """
    num_channels = q.shape[0]
    size = groups.effective_group_size(num_channels, q.group_size)
    run, fields = packing.run_length(num_channels), 8 // q.bits
    if num_channels % size or num_channels == run:
        return None
    if packing.planes(q.bits) == (q.bits,) and num_channels % run == 0:
        span = run // fields  # bytes of a run
        if size % run == 0:
            return Axes((num_channels // size, size // run, fields, span), 1, 2)
        if span % size == 0:
            return Axes((num_channels // run, fields, span // size, size), 3, 1)
    return Axes((num_channels // size, size), 1, None)


@jax.jit
def integer_codes(q: QTensor) -> UInt8[Array, "*lead K N"]:
    """Returns the codes unpacked; signed codes still carry their `2**(bits - 1)`."""
    return transposed(code_rows(q))


@partial(jax.jit, static_argnames="dtype")
def dequantize(q: QTensor, dtype: DTypeLike = jnp.float32) -> Float[Array, "*lead K N"]:
    """Returns the kernel that `q` stands for, in `dtype` (the arithmetic is float32)."""
    return transposed(weight_rows(q, dtype))


def code_rows(q: QTensor) -> UInt8[Array, "*lead N K"]:
    """Returns `integer_codes(q)` as stored, a row per output channel."""
    return packing.unpack(jnp.asarray(q.codes), q.bits, q.shape[0])


def weight_rows(q: QTensor, dtype: DTypeLike = jnp.float32) -> Float[Array, "*lead N K"]:
    """Returns `dequantize(q, dtype)` as products want it, a row per output channel."""
    if q.has_levels:
        channel = groups.expand_rows(q.channel_scale[..., None, :], q.shape, 0)
        return (level_rows(q).astype(jnp.float32) * channel).astype(dtype)
    axes = axes_of(q)
    codes = spread_codes(q, axes)
    scale = spread(scale_values(q), q, axes)
    if q.fmt is not None:
        return joined((q.fmt.value(codes) * scale).astype(dtype), q)
    zero_point = q.zero_point
    if zero_point is None:
        offset = jnp.float32(2 ** (q.bits - 1))
    else:
        offset = spread(zero_point, q, axes).astype(jnp.float32)
    return joined(((codes.astype(jnp.float32) - offset) * scale).astype(dtype), q)


@jax.jit
def level_rows(q: QTensor) -> Int8[Array, "*lead N K"]:
    """Returns the int8 levels that the codes of `q` stand for, where it has two levels of scales."""
    if q.codebook is not None:
        assert q.fmt is not None
        step = q.fmt.step_value(q.scale)
        return codebooks.levels(code_rows(q), step, q.codebook, q.group_size)
    axes = axes_of(q)
    step, offset = (spread(values, q, axes) for values in step_and_offset(q))
    return joined(levels.affine_levels(spread_codes(q, axes), step, offset), q)


def spread_codes(q: QTensor, axes: Axes | None) -> UInt8[Array, "..."]:
    """Returns the codes `[..., N, K]`, K as `axes`."""
    if axes is None:
        return code_rows(q)
    if axes.field is None:
        return code_rows(q).reshape(*q.codes.shape[:-1], *axes.sizes)
    place = axes.field - len(axes.sizes)
    sizes = (*axes.sizes[: axes.field], 1, *axes.sizes[axes.field + 1 :])
    packed = jnp.asarray(q.codes).reshape(*q.codes.shape[:-1], *sizes)
    return packing.unpack_fields(packed, q.bits, place)


def spread(values: Num[Array, "*lead G B"], q: QTensor, axes: Axes | None) -> Num[Array, "..."]:
    """Returns one value per group, to be broadcast with `spread_codes(q, axes)`."""
    if axes is None:
        return groups.expand_rows(values, q.shape, q.group_size)
    outer, inner = axes.sizes[: axes.num_outer], axes.sizes[axes.num_outer :]
    *lead, count, _ = values.shape
    rows = jnp.broadcast_to(
        transposed(values)[..., None, :], (*lead, values.shape[-1], q.channel_group, count)
    )
    return rows.reshape(*lead, q.shape[1], *outer, *(1 for _ in inner))


def joined(values: Shaped[Array, "..."], q: QTensor) -> Shaped[Array, "*lead N K"]:
    """Returns `[..., N, K]`, K one axis again."""
    return values.reshape(*q.codes.shape[:-1], q.shape[0])
