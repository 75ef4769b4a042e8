"""How kernels for TPUs read the rows of a block and write its sums, with what comes before and after a product.

Rows are read tile by tile, because a strip of all channels does not fit into registers; so is a norm computed,
in float32, from VMEM: twice for its mean and variance, and once more with each read of what it makes.

Dimensions: K input channels; L rows and C columns of a block, S samples of a block of modulations, R rows of a
strip.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from qdit_jax.kernels.epilogue import Epilogue, activated
from qdit_jax.kernels.prologue import Norm, Pending, before_of
from qdit_jax.kernels.refs import Ref, Span
from qdit_jax.kernels.tpu_blocks import STRIP, TILE

# The number of a tile -> its values.
TileFn = Callable[[int], Float[Array, "R 128"]]


class Modulation(NamedTuple):
    """A norm's modulation, in VMEM.

    Attributes:
        eps: of the norm.
        of_samples: shifts and scales of several samples, `[S, K]` each.
        sample: whose is the block's, counted in these.
        own: room for its shift and scale, `[2, K]`.
    """

    eps: float
    of_samples: Sequence[Ref]
    sample: Array
    own: Ref

    def fetch(self) -> None:
        """Writes the block's own shift and scale."""
        for index, values in enumerate(self.of_samples):
            for tile in range(values.shape[1] // TILE):
                own = row_of(values[:, span(tile)], self.sample)
                self.own[index : index + 1, span(tile)] = own


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A block of rows, normalized, modulated and mapped as it is read.

    Attributes:
        x: `[L, K]`, as it is in memory.
        modulation: of a norm, or None.
        maps: of channels, `[1, K]` each, see `prologue.maps_of`.
        num_channels: K, not padded.
    """

    x: Ref
    modulation: Modulation | None
    maps: Sequence[Ref]
    num_channels: int

    @property
    def num_tiles(self) -> int:
        """Of a row."""
        return self.x.shape[1] // TILE

    def over_strips(self, body: Callable[[Span, TileFn], None]) -> None:
        """Calls `body` with the rows of each strip, and what reads their tiles."""
        if self.modulation is not None:
            self.modulation.fetch()

        def over_strip(strip: Array, _: None) -> None:
            rows = pl.ds(pl.multiple_of(strip * STRIP, STRIP), STRIP)
            body(rows, self.tile_fn(rows))

        jax.lax.fori_loop(0, self.x.shape[0] // STRIP, over_strip, None)

    def tile_fn(self, rows: Span) -> TileFn:
        """Returns what reads the tiles of some rows, in float32; padding is zeros."""

        def stored(tile: int) -> Float[Array, "R 128"]:
            return self.x[rows, span(tile)].astype(jnp.float32)

        found = stored if self.modulation is None else self.modulated(stored, self.modulation)
        return self.mapped(found) if self.maps else found

    def modulated(self, tile_fn: TileFn, modulation: Modulation) -> TileFn:
        """Returns what reads tiles after the norm and its modulation."""
        mean = self.mean_of(tile_fn)
        variance = self.mean_of(lambda tile: jnp.square(tile_fn(tile) - mean))
        factor = jax.lax.rsqrt(variance + modulation.eps)

        def modulated_tile(tile: int) -> Float[Array, "R 128"]:
            shift, scale = (modulation.own[i : i + 1, span(tile)] for i in range(2))
            values = (tile_fn(tile) - mean) * factor * (1 + scale) + shift
            return self.without_padding(values, tile)

        return modulated_tile

    def mapped(self, tile_fn: TileFn) -> TileFn:
        """Returns what reads tiles after `InputMap`: its scale of channels, and its shift if any."""

        def mapped_tile(tile: int) -> Float[Array, "R 128"]:
            inverse_scale, *shift = (a[:, span(tile)] for a in self.maps)
            values = tile_fn(tile)
            return (values - shift[0] if shift else values) * inverse_scale

        return mapped_tile

    def mean_of(self, tile_fn: TileFn) -> Float[Array, "R 1"]:
        """Returns the mean over the channels of each row."""
        tiles = (self.without_padding(tile_fn(tile), tile) for tile in range(self.num_tiles))
        total = jnp.sum(functools.reduce(jnp.add, tiles), axis=1, keepdims=True)
        return total / self.num_channels

    def without_padding(self, values: Float[Array, "R 128"], tile: int) -> Float[Array, "R 128"]:
        """Returns values of a tile, zeros where they are no channels."""
        count = self.num_channels - tile * TILE
        if count >= TILE:
            return values
        lanes = jax.lax.broadcasted_iota(jnp.int32, values.shape, 1)
        return jnp.where(lanes < count, values, 0.0)


class Added(NamedTuple):
    """What a block is added to, times its gate.

    Attributes:
        x: `[L, C]`.
        gates: `[S, C]`.
        sample: whose gate it is, counted in the block of gates.
    """

    x: Ref
    gates: Ref
    sample: Array


@dataclasses.dataclass(frozen=True)
class Writer:
    """Writes the blocks of a result, with its epilogue.

    Attributes:
        bias: `[1, C]`.
        y: the block `[L, C]`.
    """

    bias: Ref
    y: Ref
    activation: str | None
    added: Added | None

    def write(self, values: Float[Array, "L C"]) -> None:
        """Writes sums, scaled and in float32."""
        values = activated(values + self.bias[...], self.activation)
        if self.added is not None:
            gate = row_of(self.added.gates[...], self.added.sample)
            values = self.added.x[...].astype(jnp.float32) + gate * values
        self.y[...] = values.astype(self.y.dtype)


class Around(NamedTuple):
    """What is static of what comes before and after a product.

    Attributes:
        norm: that comes first, or None.
        num_channels: K, not padded.
        activation: of the result.
        tokens_per_gate: of a gated sum, or 0.
    """

    norm: Norm | None
    num_channels: int
    activation: str | None
    tokens_per_gate: int


def around_of(x: Float[Array, "*lead K"] | Pending, epilogue: Epilogue) -> Around:
    """Returns what is static of a product's neighbors."""
    gated = epilogue.gated
    tokens_per_gate = 0 if gated is None else gated.tokens_per_sample
    return Around(before_of(x).norm, x.shape[-1], epilogue.activation, tokens_per_gate)


def tokens_of(x: Ref, refs: Sequence[Ref], around: Around, room: Ref) -> Tokens:
    """Returns the rows of this step of a grid, with what `tpu_neighbors.operands_before` has.

    `room` is that of a modulation, if there is one.
    """
    norm = around.norm
    if norm is None:
        return Tokens(x, None, refs, around.num_channels)
    sample = sample_of(x.shape[0], norm.tokens_per_sample, refs[0])
    return Tokens(x, Modulation(norm.eps, refs[:2], sample, room), refs[2:], around.num_channels)


def writer_of(refs: Sequence[Ref], y: Ref, around: Around) -> Writer:
    """Returns what writes this step of a grid, with what `tpu_neighbors.operands_after` has."""
    (bias, *others), added = refs, None
    if around.tokens_per_gate:
        x, gates = others
        added = Added(x, gates, sample_of(x.shape[0], around.tokens_per_gate, gates))
    return Writer(bias, y, around.activation, added)


def sample_of(rows: int, tokens_per_sample: int, modulations: Ref) -> Array:
    """Returns the row of a block of modulations that this block of rows has."""
    sample = jax.lax.div(pl.program_id(1) * rows, tokens_per_sample)
    return jax.lax.rem(sample, modulations.shape[0])


def row_of(values: Float[Array, "S C"], row: Array) -> Float[Array, "1 C"]:
    """Returns one of a tile's rows; a TPU reads no single row whose place is not known before."""
    rows = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
    return jnp.sum(jnp.where(rows == row, values, 0.0), axis=0, keepdims=True)


def span(tile: int) -> Span:
    """Returns the channels of a tile."""
    return pl.ds(tile * TILE, TILE)
