"""Quantizing a block of tokens in groups, inside of the kernel of `tpu_groups`.

Groups and units are multiples of 32 channels, and may begin and end inside of a tile.

Dimensions: K input channels, U units of them, L rows of a block, R rows of a strip.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32

from qdit_jax.kernels.refs import Ref, Span
from qdit_jax.kernels.token_scales import INFINITY, LEAST_NORMAL, magnitude_bits
from qdit_jax.kernels.tpu_blocks import TILE
from qdit_jax.kernels.tpu_rows import TileFn, Tokens, span
from qdit_jax.quant import ActSpec, rounded_quotients


class Cut(NamedTuple):
    """Input channels of a group of the inputs, and of a unit."""

    group: int
    unit: int

    @property
    def units(self) -> int:
        """Of a tile."""
        return TILE // self.unit


def lanes_of(shape: tuple[int, ...], first: int, count: int) -> Bool[Array, "_ 128"]:
    """Returns where `count` lanes from `first` on are; lanes that a tile has not are left out."""
    lanes = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return (lanes >= first) & (lanes < first + count)


def quantize_rows(
    tokens: Tokens, x_codes: Ref, x_scale: Ref, x_zero: Ref, spec: ActSpec, cut: Cut
) -> None:
    """Writes codes, scales and zero points of a block of tokens, as `ActSpec` has them; not finite: NaN.

    An int8 tile at a time, which is read three times: a strip of all K does not fit into registers.
    """
    channels = tokens.num_tiles * TILE

    def quantize_strip(rows: Span, tile_fn: TileFn) -> None:
        most = functools.reduce(
            jnp.maximum, (magnitude_bits(tile_fn(tile)) for tile in range(tokens.num_tiles))
        )
        is_finite = jnp.max(most, axis=1, keepdims=True) < INFINITY
        unfinished: dict[int, Array] = {}  # codes of tiles whose later channels are of other groups
        for first in range(0, channels, cut.group):
            group = Group(first, min(cut.group, channels - first))
            codes_fn, scale, zero = grid_of_rows(*group.extremes(tile_fn), is_finite, spec)
            for tile in group.tiles():
                codes = codes_fn(tile_fn(tile))
                if (before := unfinished.pop(tile, None)) is not None:
                    codes = jnp.where(group.lanes(tile, codes.shape), codes, before)
                if group.first + group.size < (tile + 1) * TILE:
                    unfinished[tile] = codes
                else:
                    x_codes[rows, span(tile)] = codes.astype(jnp.int8)
            for unit in range(first // cut.unit, -(-(first + group.size) // cut.unit)):
                chunk, lane = divmod(unit, TILE)
                x_scale[chunk, rows, lane : lane + 1] = scale
                x_zero[chunk, rows, lane : lane + 1] = zero

    tokens.over_strips(quantize_strip)


class Group(NamedTuple):
    """A group of the inputs' channels: the first, and how many, all multiples of 32."""

    first: int
    size: int

    def tiles(self) -> range:
        """Returns the tiles that have some of its channels."""
        return range(self.first // TILE, -(-(self.first + self.size) // TILE))

    def lanes(self, tile: int, shape: tuple[int, ...]) -> Bool[Array, "_ 128"]:
        """Returns where its channels are in a tile."""
        first = max(self.first - tile * TILE, 0)
        return lanes_of(shape, first, self.first + self.size - tile * TILE - first)

    def extremes(self, tile_fn: TileFn) -> tuple[Float[Array, "R 1"], Float[Array, "R 1"]]:
        """Returns the least and the greatest of its values, by row."""

        def values(tile: int, others: float) -> Float[Array, "R 128"]:
            found = tile_fn(tile)
            is_whole = self.first <= tile * TILE and self.first + self.size >= (tile + 1) * TILE
            return found if is_whole else jnp.where(self.lanes(tile, found.shape), found, others)

        low = functools.reduce(jnp.minimum, (values(tile, jnp.inf) for tile in self.tiles()))
        high = functools.reduce(jnp.maximum, (values(tile, -jnp.inf) for tile in self.tiles()))
        return jnp.min(low, axis=1, keepdims=True), jnp.max(high, axis=1, keepdims=True)


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
