"""The call that the kernels for TPUs share: its grid, the blocks of its operands, and what stays in VMEM.

A block of rows meets all blocks of columns of a panel, one after another. The codes of a panel, and what
makes weights of them, are read by its first block of rows alone, which leaves the weights in VMEM.

Dimensions: M rows (tokens), K input channels, N output channels, G groups along K, R packed bytes of a
channel.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Num

from qdit_jax.kernels.tpu_blocks import TILE, VMEM_LIMIT, Blocks, Sizes, chosen_blocks
from qdit_jax.kernels.tpu_words import (
    groups_of_sub_blocks,
    is_turned_inside,
    padded,
    whole_codes,
)
from qdit_jax.quant import QTensor

Index = tuple[Array | int, Array | int]


def packed_product(
    kernel: Callable[..., None],
    x: Float[Array, "*lead K"],
    q: QTensor,
    sizes: Sizes,
    maps: Sequence[Num[Array, "G N"]],
    of_columns: Sequence[Float[Array, "_ N"]],
    *,
    name: str,
    dtype: str,
    interpret: bool,
) -> Float[Array, "*lead N"]:
    """Returns the product of `x` and `q`, in `dtype`, that `kernel` computes block by block.

    The kernel is given `bits` and `groups`, the group of every 32 input channels, and the blocks of
    `x [L, K]`, of the packed codes `[R, C]`, or `[C, R]` where the last block is room to have them turned,
    of each of `maps [G, C]`, of each of `of_columns [_, C]`, and of the result `[L, C]`; then what stays in
    VMEM: codes `[L, K]` and scales `[L, 1]` of the rows, if these are quantized too, and the unpacked
    weights `[J, K, C]` of the panel. Where a token has scales of U units, there are `[L, U]` of them, as many
    zero points, and after the weights room for their sums `[J, U, C]`, both int32.
    """
    blocks = chosen_blocks(sizes)
    assert blocks is not None, "the kernel's reasons refuse it"
    rows, columns = blocks.rows * blocks.num_rows, sizes.column_tiles * TILE
    tokens = padded(x.reshape(-1, sizes.num_channels), rows, sizes.channels)
    codes = whole_codes(q, sizes, columns)
    inside = is_turned_inside(codes.shape[1])
    operands = [tokens, codes if inside else codes.T]
    operands += [padded(values, values.shape[0], columns) for values in maps]
    operands += [padded(values, values.shape[0], columns) for values in of_columns]
    groups = groups_of_sub_blocks(sizes.channels, sizes.num_channels, q.group_size)
    y = pl.pallas_call(
        functools.partial(kernel, bits=q.bits, groups=groups),
        grid=blocks.grid,
        in_specs=in_specs(operands, blocks, len(maps), inside=inside),
        out_specs=pl.BlockSpec((blocks.rows, blocks.columns), of_both(blocks)),
        out_shape=jax.ShapeDtypeStruct((rows, columns), dtype),
        scratch_shapes=held_in_vmem(blocks, sizes, operands[1].shape[1] if inside else 0),
        cost_estimate=cost(operands, blocks, sizes),
        compiler_params=compiler_params(),
        interpret=interpret,
        name=name,
    )(*operands)
    return y[: math.prod(x.shape[:-1]), : sizes.width].reshape(*x.shape[:-1], sizes.width)


def bias_row(bias: Float[Array, " N"] | None, q: QTensor) -> Float[Array, "1 N"]:
    """Returns the bias as a row in float32, zeros where there is none."""
    row = jnp.zeros(q.shape[1]) if bias is None else bias
    return row.astype(jnp.float32)[None]


def of_both(blocks: Blocks) -> Callable[[Array, Array, Array], Index]:
    """Returns the place of a block of the result, by panel p, block of rows i and of columns j."""
    return lambda p, i, j: (i, p * blocks.panel + j)


def in_specs(
    operands: Sequence[Array], blocks: Blocks, num_maps: int, *, inside: bool
) -> list[pl.BlockSpec]:
    """Returns the blocks of the operands: rows, codes, maps, and what has a value per column."""
    columns, panel = blocks.columns, blocks.panel

    def of_rows(p: Array, i: Array, j: Array) -> Index:
        return i, 0

    def of_columns(p: Array, i: Array, j: Array) -> Index:
        return 0, p * panel + j

    def once(p: Array, i: Array, j: Array) -> Index:
        # Only the first block of rows reads them: after it, the last block stays where it is.
        return 0, p * panel + jnp.where(i == 0, j, panel - 1)

    tokens, codes, *rest = operands
    of_codes = pl.BlockSpec((codes.shape[0], columns), once)
    if inside:
        of_codes = pl.BlockSpec((columns, codes.shape[1]), lambda *at: once(*at)[::-1])
    return [
        pl.BlockSpec((blocks.rows, tokens.shape[1]), of_rows),
        of_codes,
        *(pl.BlockSpec((values.shape[0], columns), once) for values in rest[:num_maps]),
        *(pl.BlockSpec((values.shape[0], columns), of_columns) for values in rest[num_maps:]),
    ]


def held_in_vmem(blocks: Blocks, sizes: Sizes, turned_bytes: int) -> list[Any]:
    """Returns what stays in VMEM, see `packed_product`; `turned_bytes` is R, or 0 for no room."""
    from jax.experimental.pallas import tpu as pltpu

    rows, columns, channels = blocks.rows, blocks.columns, sizes.channels
    unpacked, quantized, sums = jnp.bfloat16, [], []
    if sizes.unpacked == 1:
        unpacked, units = jnp.int8, max(sizes.units, 1)
        quantized = [pltpu.VMEM((rows, channels), jnp.int8), pltpu.VMEM((rows, units), jnp.float32)]
    if sizes.units:
        quantized.append(pltpu.VMEM((rows, units), jnp.int32))
        sums.append(pltpu.VMEM((blocks.panel, units, columns), jnp.int32))
    turned = [pltpu.VMEM((turned_bytes, columns), jnp.uint8)] if turned_bytes else []
    weights = pltpu.VMEM((blocks.panel, channels, columns), unpacked)
    return [*quantized, weights, *sums, *turned]


def cost(operands: Sequence[Array], blocks: Blocks, sizes: Sizes) -> pl.CostEstimate:
    """Returns what a call costs, for XLA's schedule."""
    tokens, width = operands[0], sizes.column_tiles * TILE
    rows, channels = tokens.shape
    of_weights = sum(values.size * values.dtype.itemsize for values in operands[1:])
    of_rows = tokens.dtype.itemsize * rows * (blocks.panels * channels + width)
    return pl.CostEstimate(
        flops=2 * rows * channels * width,
        transcendentals=0,
        bytes_accessed=of_weights + of_rows,
    )


def compiler_params() -> Any:
    """Returns that the grid is walked in order, and the VMEM that there is."""
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.CompilerParams(dimension_semantics=("arbitrary",) * 3, vmem_limit_bytes=VMEM_LIMIT)
