"""A product of 16-bit inputs with packed integer weights (W4A16), in one Pallas Mosaic GPU kernel for Hopper.

Compiled ahead of time for an H100, interpreted on CPU, not run on a GPU.

The kernel fetches blocks of inputs and of packed codes, makes bfloat16 weights of the codes in registers,
rounded as `quant.weight_rows` rounds them, and multiplies. Weights are never written unpacked, which XLA does
before each product.

Dimensions: M rows (tokens), K input channels, N output channels, all padded to whole blocks; R packed bytes
of an output channel; U units, runs of input channels that have one map.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from qdit_jax.kernels.call import Call
from qdit_jax.kernels.gpu_call import (
    Writer,
    place_of,
    run_of,
    run_pipeline,
)
from qdit_jax.kernels.gpu_floats import MAGIC, code_floats, multiply_floats
from qdit_jax.kernels.gpu_memory import loaded
from qdit_jax.kernels.gpu_neighbors import fused_by
from qdit_jax.kernels.gpu_tiles import HALF, RUN, Shape, Tiles, rounded_up
from qdit_jax.kernels.prologue import Pending, plain
from qdit_jax.kernels.refs import Ref, Span
from qdit_jax.kernels.units import of_units, unit_of
from qdit_jax.kernels.weight_maps import maps_of
from qdit_jax.quant import ActSpec, QTensor


def weights_shape(rows: int, q: QTensor, spec: ActSpec | None, itemsize: int) -> Shape:
    """Returns the product as the table of blocks knows it."""
    unit = unit_of(q.shape[0], q.group_size, q.group_size)
    return Shape(rows, *q.shape, q.bits, itemsize, unit, x_bits=16)


def _operands(
    x: Float[Array, "*lead K"] | Pending, q: QTensor, call: Call
) -> tuple[Callable[..., None], list[Array]]:
    (num_channels, width), tiles = q.shape, call.tiles
    tokens = plain(x).reshape(-1, num_channels)
    more_rows = (0, rounded_up(len(tokens), tiles.rows) - len(tokens))
    more = (0, rounded_up(width, tiles.block) - width)  # output channels
    unit = unit_of(num_channels, q.group_size, q.group_size)
    factor, zero, scale = maps_of(q)
    if factor is None:  # what the codes stand on is taken away with the zero point
        zero = zero + MAGIC
    maps = (a for a in (factor, zero, scale) if a is not None)
    operands = [
        jnp.pad(tokens, (more_rows, (0, 0))),
        jnp.pad(jnp.asarray(q.codes), (more, (0, 0))),
        *(jnp.pad(of_units(a, num_channels, q.group_size, unit), ((0, 0), more)) for a in maps),
    ]
    return functools.partial(_kernel, bits=q.bits, unit=unit), operands


# Sums in float32. Equal to `xla.simulated_matmul` to the rounding of sums, whose derivative it has.
weights_fused = fused_by("gpu_weights", _operands, weights_shape)


def _kernel(
    tokens: Ref,
    codes: Ref,
    *maps: Ref,
    writer: Writer,
    left_block: Ref = None,
    bits: int,
    unit: int,
    tiles: Tiles,
) -> None:
    """Writes one block of the result."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    at = place_of(tiles)

    def compute(pipeline: Any) -> None:
        size = tiles.columns, tiles.rows

        @functools.partial(pl.run_scoped, sums=plgpu.ACC(size, jnp.float32))
        def _(sums: Ref) -> None:
            pipeline(sums)
            writer.write(sums[...], at)

    def step(_: Any, token_block: Ref, code_block: Ref, *rest: Any) -> Any:
        *map_blocks, sums = rest
        for half in range(2):
            codes_of_half = code_floats(code_block, at.own, bits, half, left_block is not None)
            found = [half_of_map(m, at.own, half, unit, tiles) for m in map_blocks]
            left = weights_of(codes_of_half, found)
            multiply_floats(sums, left, token_block, half, left_block)
        plgpu.wgmma_wait(0)
        return sums

    maps_of_run = plgpu.BlockSpec(
        (RUN // unit, tiles.block), lambda k: (k, 0), memory_space=plgpu.SMEM
    )
    run_pipeline(
        writer,
        step,
        compute,
        tokens.shape[1] // RUN,
        tiles,
        [
            run_of(tiles.rows, RUN, jnp.bfloat16),
            run_of(tiles.block, RUN * bits // 8),
            *(maps_of_run for _ in maps),
        ],
    )(tokens.at[at.rows, :], codes.at[at.block, :], *(m.at[:, at.block] for m in maps))


def weights_of(codes: Float[Array, "N K"], maps: list[Array]) -> Array:
    """Returns weights in bfloat16 of codes that stand on `MAGIC`."""
    if len(maps) == 3:
        factor, zero, scale = maps
        return (((codes - MAGIC) * factor - zero) * scale).astype(jnp.bfloat16)
    zero, scale = maps
    return ((codes - zero) * scale).astype(jnp.bfloat16)


def half_of_map(block: Ref, own: Span, half: int, unit: int, tiles: Tiles) -> Float[Array, "N K"]:
    """Returns the values of a map for the weights of half a run, in float32."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    width = min(unit, HALF)
    parts = []
    for start in range(half * HALF, (half + 1) * HALF, width):
        of_columns = loaded(
            block.at[start // unit, own], plgpu.Layout.WGMMA.reduce(1), optimized=False
        )
        parts.append(lax.broadcast_in_dim(of_columns, (tiles.columns, width), [0]))
    return parts[0] if len(parts) == 1 else lax.concatenate(parts, 1)
