"""What comes before and after a product on TPUs: which of it a kernel does, and its blocks.

A block of rows lies in one sample, so that it has one modulation and one gate; what cannot be cut that way is
XLA's, see `tpu_call.fused_by`.

Dimensions: M rows (tokens), K input channels, N output channels, B samples; L rows and C columns of a block,
S samples of a block of modulations.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from qdit_jax.kernels.call import Call
from qdit_jax.kernels.epilogue import Epilogue, Gated, bias_of, written_dtype
from qdit_jax.kernels.prologue import (
    Modulated,
    Pending,
    maps_of,
    norm_before,
    operands_of,
)
from qdit_jax.kernels.tpu_blocks import TILE, Blocks, Sizes
from qdit_jax.kernels.tpu_words import padded

SAMPLES = 8  # of a block of modulations: a tile of float32

Index = tuple[Array | int, Array | int]


class Operand(NamedTuple):
    """What a kernel reads.

    Attributes:
        values: `[R, C]`.
        spec: its blocks.
        read: how many numbers are read.
    """

    values: Array
    spec: pl.BlockSpec
    read: int


def takes(gated: Gated, dtype: str) -> bool:
    """Returns whether a kernel may compute a sum: of no padding, and of the dtype that XLA's would have."""
    is_wide = jnp.promote_types(gated.dtype, dtype) == gated.dtype
    return bool(is_wide) and gated.x.shape[-1] % TILE == 0


def sizes_around(
    sizes: Sizes,
    x: Float[Array, "*lead K"] | Pending,
    dtype: np.dtype,
    gated: Gated | None,
) -> Sizes:
    """Returns the sizes of a product with what comes before and after it in the kernel, which writes `dtype`."""
    norm = norm_before(x)
    tokens = [] if norm is None else [norm.tokens_per_sample]
    tokens += [] if gated is None else [gated.tokens_per_sample]
    return dataclasses.replace(
        sizes,
        result_itemsize=dtype.itemsize,
        channel_rows=len(maps_of(x)) + (0 if norm is None else 2),
        added_itemsize=0 if gated is None else gated.x.dtype.itemsize,
        tokens_per_sample=math.gcd(*tokens),
    )


def epilogue_of(
    sizes: Sizes,
    bias: Float[Array, " N"] | None,
    gated: Gated | None,
    call: Call,
) -> Epilogue:
    """Returns what is done with the sums of a product as they are written."""
    whole = bias_of(bias, sizes.width, sizes.column_tiles * TILE)
    return Epilogue(whole, written_dtype(call.dtype, gated), call.activation, gated)


def operands_before(
    x: Float[Array, "*lead K"] | Pending, blocks: Blocks, channels: int
) -> list[Operand]:
    """Returns the shift and the scale of a norm, if there is one, and what maps channels, padded."""
    norm, num_channels = norm_before(x), x.shape[-1]
    found = [] if norm is None else modulations(norm, blocks, channels)
    for values in operands_of(x)[1 + (norm is not None) :]:
        spec = pl.BlockSpec((1, channels), lambda p, i, j: (0, 0))
        found.append(Operand(padded(values[None], 1, channels), spec, num_channels))
    return found


def modulations(norm: Modulated, blocks: Blocks, channels: int) -> list[Operand]:
    """Returns the shift and the scale, of as many samples as a tile has rows, the block's among them."""
    values, tokens = norm.modulation.astype(jnp.float32), norm.tokens_per_sample
    count, num_channels = len(values), norm.shape[-1]
    if channels > num_channels:
        of_parts = values.reshape(count, -1, num_channels)
        more = ((0, 0), (0, 0), (0, channels - num_channels))
        values = jnp.pad(of_parts, more).reshape(count, -1)
    together = min(count, SAMPLES)

    def spec(part: int) -> pl.BlockSpec:
        def of_sample(p: Array, i: Array, j: Array) -> Index:
            return block_of(i * blocks.rows, tokens * together), part

        return pl.BlockSpec((together, channels), of_sample)

    return [Operand(values, spec(i), count * channels) for i in (norm.shift, norm.scale)]


def operands_after(
    epilogue: Epilogue, blocks: Blocks, of_both: Callable[..., Index]
) -> list[Operand]:
    """Returns the bias, and of a gated sum what the result is added to and the gates."""
    (width,), columns, gated = epilogue.bias.shape, blocks.columns, epilogue.gated
    of_columns = pl.BlockSpec((1, columns), lambda *at: (0, of_both(*at)[1]))
    bias = Operand(epilogue.bias[None], of_columns, width)
    if gated is None:
        return [bias]
    before, gates = gated.x.reshape(-1, width), gated.modulation.astype(jnp.float32)
    together, tokens = min(len(gates), SAMPLES), gated.tokens_per_sample

    def of_gate(p: Array, i: Array, j: Array) -> Index:
        column = gated.gate * (width // columns) + of_both(p, i, j)[1]
        return block_of(i * blocks.rows, tokens * together), column

    return [
        bias,
        Operand(before, pl.BlockSpec((blocks.rows, columns), of_both), before.size),
        Operand(gates, pl.BlockSpec((together, columns), of_gate), len(gates) * width),
    ]


def block_of(row: Array, rows: int) -> Array:
    """Returns which block of so many rows a row is in; `//` asks what device there is."""
    return jax.lax.div(row, rows)
