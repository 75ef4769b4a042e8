"""Two levels of scales: int8 levels per output channel, made from codes by a map per group.

`w = level * channel_scale[n]`, so a product is one int8 dot over all of K, scaled once at the end.
A code becomes a level by a step and an offset of one byte each, `level = code * step + offset - 128`,
which never leaves int8. (QServe, arXiv:2405.04532, has a zero point of few bits in place of the
offset. An offset that is free to lie anywhere lowers the error of normal weights by 0.6 dB; in
exchange 0 is not always on the grid.)

A channel's scale is rounded up to 16 bits of mantissa: `level * channel_scale` is then exact in
float32, and levels are found again.

Dimensions: K input channels, N output channels, G groups along K, B scales of a row, S members of a
group, C candidates.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int8, UInt8

from qdit_jax.quant import groups, ranges, stored_scales
from qdit_jax.quant.division import quotient, quotient_by_number

TOP = 127  # the greatest level; -127 is the least that a grid is chosen for
HALF = 128  # what is added to a level to store it as a byte
BITS = (2, 3, 4, 5, 6)  # more bits are int8 per channel, or nearly
# Steps tried, from the one that just reaches the limits. Those further than 1 away are taken only
# where they have no error, which makes a kernel that has been quantized once come back as it is.
_STEPS = (0, 1, -1)
_EXACT_STEPS = (2, 3, 4, 5)
_SYMMETRIC_STEPS = (*_STEPS, *_EXACT_STEPS, -2)
_NO_ERROR = 1e-6  # in squared levels: division may be off by a few units in the last place
_PLACES = 5  # where codes are laid, see `_candidate`

# Step and offset of every group, whole numbers, and whether the group may have them.
Candidate = tuple[Float[Array, "G B"], Float[Array, "G B"], Bool[Array, "G B"]]


class Best(NamedTuple):
    """The best candidate so far, and its squared error in levels."""

    error: Float[Array, "G B"]
    step: Float[Array, "G B"]
    offset: Float[Array, "G B"]


def greatest_step(bits: int, symmetric: bool) -> int:
    """Returns the greatest step whose codes stay inside int8."""
    return 2 ** (8 - bits) if symmetric else (2 * TOP) // (2**bits - 1)


def channel_scale_of(scale: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Returns scales as stored: rounded up to 16 bits of mantissa, 1 for 0; NaN stays."""
    rounded = stored_scales.rounded_up(ranges.positive_or_one(scale), 16)
    return jnp.where(jnp.isfinite(scale), rounded, jnp.nan)


def affine_levels(
    codes: UInt8[Array, "*s"], step: UInt8[Array, "*s"], offset: UInt8[Array, "*#s"]
) -> Int8[Array, "*s"]:
    """Returns the levels of codes: one multiply-add and one exclusive or, all in bytes."""
    return jax.lax.bitcast_convert_type((codes * step + offset) ^ jnp.uint8(HALF), jnp.int8)


def symmetric_offset(step: UInt8[Array, "*s"], bits: int) -> UInt8[Array, "*s"]:
    """Returns the offset with which the middle code is level 0."""
    # 128 - 2**(bits - 1) * step in bytes, which wrap.
    return jnp.uint8(HALF) - jnp.uint8(2 ** (bits - 1)) * step


def chosen_grid(
    w: Float[Array, "K N"],
    low: Float[Array, "G B"],
    high: Float[Array, "G B"],
    *,
    bits: int,
    symmetric: bool,
    group_size: int,
) -> tuple[Float[Array, " B"], UInt8[Array, "G B"], UInt8[Array, "G B"] | None]:
    """Returns (channel scale, step, offset) of the limits that a range rule gave every group.

    Of a few steps and offsets around a group's limits, those with the least squared error are taken.
    Offset is None if symmetric. Channels with limits that are not finite have the scale NaN.

    Quantizing with min-max limits is idempotent from 4 bits on: the greatest magnitude of a channel
    keeps one of the levels ±127. Where a group reaches from one to the other, its codes may not: up to
    14 levels, less than a step, are clipped at the other end.
    """
    most, codes = greatest_step(bits, symmetric), 2**bits - 1
    magnitude = jnp.max(jnp.maximum(-low, high), axis=0)
    reach = (2 ** (bits - 1) - 1) * most if symmetric else TOP
    scale = channel_scale_of(quotient_by_number(magnitude, reach))
    low, high = (quotient(limit, jnp.broadcast_to(scale, limit.shape)) for limit in (low, high))
    levels = quotient(w, groups.expand_groups(scale[None], w.shape, 0))
    candidate_fn = _symmetric_candidate if symmetric else _candidate

    def better(best: Best, one: tuple[Array, Array]) -> tuple[Best, None]:
        step, offset, fits = candidate_fn(low, high, *one, bits)
        error = _error(levels, step, offset, codes, group_size)
        fits &= (jnp.abs(one[0]) <= 1) | (error <= _NO_ERROR)
        error = jnp.where(fits, error, jnp.inf)
        wins = error < best.error
        return Best(
            jnp.where(wins, error, best.error),
            jnp.where(wins, step, best.step),
            jnp.where(wins, offset, best.offset),
        ), None

    first = Best(*(jnp.full_like(low, value) for value in (np.inf, 1, HALF)))
    pairs = [*itertools.product(_STEPS, range(_PLACES)), *itertools.product(_EXACT_STEPS, (0, 1))]
    steps, places = np.array([(step, 0) for step in _SYMMETRIC_STEPS] if symmetric else pairs).T
    tried = (jnp.asarray(steps, jnp.float32), jnp.asarray(places, jnp.int32))
    best, _ = jax.lax.scan(better, first, tried)
    offset = None if symmetric else best.offset.astype(jnp.uint8)
    return scale, best.step.astype(jnp.uint8), offset


def _symmetric_candidate(
    low: Float[Array, "G B"],
    high: Float[Array, "G B"],
    change: Float[Array, ""],
    place: Int[Array, ""],
    bits: int,
) -> Candidate:
    half, most = 2 ** (bits - 1), greatest_step(bits, True)
    step = jnp.clip(jnp.floor(high / (half - 1)) + change, 1, most)
    # The group with the greatest magnitude keeps the step that the channel's scale is made for.
    fits = (high < (half - 1) * most - 0.5) | (step == most)
    return step, HALF - half * step, fits


def _candidate(
    low: Float[Array, "G B"],
    high: Float[Array, "G B"],
    change: Float[Array, ""],
    place: Int[Array, ""],
    bits: int,
) -> Candidate:
    """Returns a step, an offset, and whether the grid has the level that made the channel's scale.

    The lowest, the highest or the middle codes lie on the limits, or a code lies on 0.
    """
    most, codes = greatest_step(bits, False), 2**bits - 1
    step = jnp.clip(jnp.floor((high - low) / codes) + change, 1, most)
    span = codes * step
    below = jnp.floor(-low / step)  # codes below 0
    lowest = jax.lax.select_n(
        jnp.broadcast_to(place, low.shape),
        low,
        high - span,
        (low + high - span) / 2,
        -below * step,
        -(below + 1) * step,
    )
    lowest = _moved_inside(jnp.round(lowest), step, span)
    is_high, is_low = high >= TOP - 0.5, low <= 0.5 - TOP
    fits = jnp.where(is_high, lowest + span == TOP, ~is_low | (lowest == -TOP))
    return step, lowest + HALF, fits


def _moved_inside(
    lowest: Float[Array, "G B"], step: Float[Array, "G B"], span: Float[Array, "G B"]
) -> Float[Array, "G B"]:
    """Returns the lowest level moved by whole steps until all codes are in [-127, 127], if it can."""
    lowest -= step * jnp.maximum(jnp.ceil((lowest + span - TOP) / step), 0)
    lowest += step * jnp.maximum(jnp.ceil((-TOP - lowest) / step), 0)
    return jnp.clip(lowest, -TOP, TOP - span)


def _error(
    levels: Float[Array, "K N"],
    step: Float[Array, "G B"],
    offset: Float[Array, "G B"],
    codes: int,
    group_size: int,
) -> Float[Array, "G B"]:
    """Returns every group's squared error, in levels, with codes from 0 to `codes`."""
    wide_step, wide_offset = (
        groups.expand_groups(a, levels.shape, group_size) for a in (step, offset)
    )
    lowest = wide_offset - HALF
    code = jnp.clip(jnp.round((levels - lowest) / wide_step), 0, codes)
    square = jnp.square(levels - (code * wide_step + lowest))
    channel_group = levels.shape[1] // step.shape[1]
    return groups.map_groups(
        lambda members: jnp.sum(members, axis=1), square, group_size, channel_group
    )
