"""A codebook of 16 values per kernel, learned, whose entries become int8 levels: the formats `lut4`.

`level = clip(round(codebook[code] * step), -127, 127)` with a step per group of one byte (a whole
number, or E4M3 in `lut4_e4m3`), and `w = level * channel_scale`, as in `levels`. The codebook is the centroids of Lloyd's algorithm
(weighted k-means of one dimension) on weights divided by their group's step; steps and codebook
are fitted in turns. Entry 7 stays 0, so that zeros stay zeros. Deterministic.

Dimensions: K input channels, N output channels, G groups along K, P points, E = 16 entries.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8, UInt8

from qdit_jax.quant import formats, groups
from qdit_jax.quant.division import quotient, quotient_by_number
from qdit_jax.quant.levels import TOP, channel_scale_of
from qdit_jax.quant.specs import WeightSpec

ZERO = 7  # the entry that stays 0
NUM_POINTS = 1 << 16  # of a larger kernel, so many weights drawn at random teach the codebook
NUM_TURNS = 2  # of fitting the codebook and the steps
NUM_ITERATIONS = 40  # of Lloyd's algorithm in a turn
# Steps tried in turn, as factors of the best so far; 0 is least squares for the codes at hand.
TRIED = (1.0, 0.0, 0.0, 0.85, 0.92, 1.08)


class Fit(NamedTuple):
    """Steps of the groups, the codes they give, and the squared error of each group."""

    step: Float[Array, "G N"]
    codes: UInt8[Array, "K N"]
    error: Float[Array, "G N"]


class Quantized(NamedTuple):
    """A kernel in codes, and what they stand for; steps as stored."""

    codes: UInt8[Array, "K N"]
    channel_scale: Float[Array, " N"]
    step: UInt8[Array, "G N"]
    codebook: Float[Array, " E"]


def levels(
    codes: UInt8[Array, "*lead N K"],
    step: Float[Array, "*lead G N"],
    codebook: Float[Array, "*lead E"],
    group_size: int,
) -> Int8[Array, "*lead N K"]:
    """Returns the int8 levels of codes as stored; leading axes have a codebook each."""
    index = codes.reshape(*codebook.shape[:-1], -1).astype(jnp.int32)
    values = jnp.take_along_axis(codebook, index, axis=-1).reshape(codes.shape)
    *_, width, num_channels = codes.shape
    wide = groups.expand_rows(step, (num_channels, width), group_size)
    return level_of(values, wide).astype(jnp.int8)


def quantized(w: Float[Array, "K N"], spec: WeightSpec) -> Quantized:
    """Returns `w` with the codebook and steps that it teaches, in the groups and format of `spec`."""
    assert spec.fmt is not None
    channel_scale, step, codebook = learned(w, spec.group_size, spec.fmt)
    targets = quotient(w, jnp.broadcast_to(channel_scale, w.shape))
    codes = codes_of(targets, spec.fmt.step_value(step), codebook, spec.group_size)
    return Quantized(codes, channel_scale, step, codebook)


def level_of(value: Float[Array, "..."], step: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the levels of codebook values in groups, whole numbers in float32; both broadcast."""
    return jnp.clip(jnp.round(value * step), -TOP, TOP)


def learned(
    w: Float[Array, "K N"], group_size: int, fmt: formats.Format
) -> tuple[Float[Array, " N"], UInt8[Array, "G N"], Float[Array, " E"]]:
    """Returns (channel scale, step as `fmt` stores it, codebook) for the kernel `w`.

    A channel with a value that is not finite has the scale NaN.
    """
    absmax = jnp.max(jnp.abs(w), axis=0)
    scale = channel_scale_of(quotient_by_number(absmax, TOP))
    targets = quotient(w, jnp.broadcast_to(scale, w.shape))  # in levels
    targets = jnp.where(jnp.isfinite(targets), targets, 0)
    peak = groups.map_groups(lambda m: jnp.max(jnp.abs(m), axis=1), targets, group_size)
    step = rounded_step(peak, fmt)
    # What an error of one level weighs, its square below float32's range left out.
    weight = jnp.where(jnp.isfinite(scale) & (absmax > 0), scale, 0)
    weight = jnp.square(quotient(weight, jnp.max(weight)))
    codebook = jnp.asarray(formats.nf4.values())

    def turn(
        _: Int[Array, ""] | int, now: tuple[Float[Array, " E"], Float[Array, "G N"]]
    ) -> tuple[Float[Array, " E"], Float[Array, "G N"]]:
        codebook = taught(now[0], targets, now[1], weight, group_size)
        return codebook, fitted_steps(targets, now[1], codebook, group_size, fmt)

    codebook, step = jax.lax.fori_loop(0, NUM_TURNS, turn, (codebook, step))
    return scale, fmt.stored_step(step), codebook


def rounded_step(step: Float[Array, "*s"], fmt: formats.Format) -> Float[Array, "*s"]:
    """Returns the steps that `fmt` can store, in levels."""
    return fmt.step_value(fmt.stored_step(step))


def codes_of(
    targets: Float[Array, "K N"],
    step: Float[Array, "G N"],
    codebook: Float[Array, " E"],
    group_size: int,
) -> UInt8[Array, "K N"]:
    """Returns the codes of the levels nearest to `targets`, by comparing with midpoints."""
    entries = level_of(codebook[:, None, None], step)  # [E, G, N], ascending
    code = jnp.zeros(targets.shape, jnp.uint8)
    for middle in (entries[1:] + entries[:-1]) / 2:
        code += (targets > groups.expand_groups(middle, targets.shape, group_size)).astype(
            jnp.uint8
        )
    return code


def fit(
    targets: Float[Array, "K N"],
    step: Float[Array, "G N"],
    codebook: Float[Array, " E"],
    group_size: int,
) -> Fit:
    """Returns the codes and errors, in levels, that steps give."""
    codes = codes_of(targets, step, codebook, group_size)
    wide = groups.expand_groups(step, targets.shape, group_size)
    error = jnp.square(targets - level_of(codebook[codes], wide))
    return Fit(step, codes, sums(error, group_size))


def sums(values: Float[Array, "K N"], group_size: int) -> Float[Array, "G N"]:
    return groups.map_groups(lambda members: jnp.sum(members, axis=1), values, group_size)


def fitted_steps(
    targets: Float[Array, "K N"],
    step: Float[Array, "G N"],
    codebook: Float[Array, " E"],
    group_size: int,
    fmt: formats.Format,
) -> Float[Array, "G N"]:
    """Returns steps with no greater error, those of `TRIED`."""

    def better(i: Int[Array, ""] | int, best: Fit) -> Fit:
        values = codebook[best.codes]
        power = sums(jnp.square(values), group_size)
        least_squares = sums(targets * values, group_size) / jnp.maximum(power, 1e-6)
        factor = jnp.asarray(TRIED, jnp.float32)[i]
        step = rounded_step(jnp.where(factor > 0, best.step * factor, least_squares), fmt)
        found = fit(targets, step, codebook, group_size)
        wins = found.error < best.error
        wide = groups.expand_groups(wins, targets.shape, group_size)
        return Fit(
            jnp.where(wins, found.step, best.step),
            jnp.where(wide, found.codes, best.codes),
            jnp.where(wins, found.error, best.error),
        )

    nothing = Fit(step, jnp.zeros(targets.shape, jnp.uint8), jnp.full(step.shape, np.inf))
    return jax.lax.fori_loop(0, len(TRIED), better, nothing).step


def taught(
    codebook: Float[Array, " E"],
    targets: Float[Array, "K N"],
    step: Float[Array, "G N"],
    weight: Float[Array, " N"],
    group_size: int,
) -> Float[Array, " E"]:
    """Returns the codebook after Lloyd's algorithm on weights in units of their group's step.

    An error counts by its square in the kernel: `weight` is that of one level in each channel.
    """
    count, width = targets.shape
    place = jnp.arange(count * width, dtype=jnp.int32)
    if count * width > NUM_POINTS:
        place = jax.random.randint(jax.random.key(0), (NUM_POINTS,), 0, count * width, jnp.int32)
    row, column = place // width, place % width
    size = groups.effective_group_size(count, group_size)
    steps = step[row // size, column]
    points = targets[row, column] / steps
    order = jnp.argsort(points)
    points, mass = points[order], (jnp.square(steps) * weight[column])[order]
    before = jnp.pad(jnp.cumsum(mass), (1, 0))  # [P + 1], the mass of all points before one
    moment = jnp.pad(jnp.cumsum(mass * points), (1, 0))

    def iterate(_: Int[Array, ""] | int, codebook: Float[Array, " E"]) -> Float[Array, " E"]:
        inner = jnp.searchsorted(points, (codebook[1:] + codebook[:-1]) / 2)
        edges = jnp.concatenate(
            [jnp.zeros(1, inner.dtype), inner, jnp.full(1, points.size, inner.dtype)]
        )
        held, reached = jnp.diff(before[edges]), jnp.diff(moment[edges])
        centroid = reached / jnp.where(held > 0, held, 1)
        # Sums of rounded numbers: an entry may leave neither its cell nor 0.
        inside = jnp.clip(centroid, *cell(codebook))
        return jnp.where(held > 0, inside, codebook).at[ZERO].set(0)

    return jax.lax.fori_loop(0, NUM_ITERATIONS, iterate, codebook)


def cell(codebook: Float[Array, " E"]) -> tuple[Float[Array, " E"], Float[Array, " E"]]:
    """Returns the ends of the entries' cells, which lie between their neighbors."""
    middle = (codebook[1:] + codebook[:-1]) / 2
    return (
        jnp.concatenate([jnp.full(1, -np.inf, middle.dtype), middle]),
        jnp.concatenate([middle, jnp.full(1, np.inf, middle.dtype)]),
    )
