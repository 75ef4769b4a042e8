"""One int8 dot over all input channels, in one Pallas Mosaic GPU kernel for NVIDIA's Hopper (sm_90a).

Compiled ahead of time for an H100, interpreted on CPU, not run on a GPU.

The inputs are quantized first, one symmetric scale per token (`gpu_rows`). The kernel fetches blocks of inputs and of packed
codes, makes int8 levels of the codes in registers (`gpu_words`), multiplies, and scales the int32 sums
by token and output channel. Memory sees the inputs, the packed codes and the result, and nothing between.

Dimensions: M rows (tokens), K input channels, N output channels, all padded to whole blocks; R packed
bytes of an output channel; S sub-blocks of 32 input channels, which have one step and one offset.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from qdit_jax.kernels import gpu_rows, gpu_words
from qdit_jax.kernels.call import Call
from qdit_jax.kernels.gpu_call import (
    Writer,
    multiply,
    place_of,
    run_of,
    run_pipeline,
)
from qdit_jax.kernels.gpu_memory import loaded, loaded_words, of_columns, of_rows, word_layout
from qdit_jax.kernels.gpu_neighbors import fused_by
from qdit_jax.kernels.gpu_tiles import (
    HALF,
    RUN,
    SUB,
    Shape,
    Tiles,
    rounded_up,
)
from qdit_jax.kernels.prologue import Pending
from qdit_jax.kernels.refs import Ref, Span
from qdit_jax.kernels.units import of_units
from qdit_jax.quant import (
    ActSpec,
    QTensor,
    scale_value,
    step_and_offset,
)


def levels_shape(rows: int, q: QTensor, spec: ActSpec | None, itemsize: int) -> Shape:
    """Returns the product as the table of blocks knows it."""
    return Shape(rows, *q.shape, q.bits, itemsize)


def _operands(
    x: Float[Array, "*lead K"] | Pending, q: QTensor, call: Call
) -> tuple[Callable[..., None], list[Array]]:
    assert call.spec is not None, "its row refuses it"
    (num_channels, width), tiles = q.shape, call.tiles
    rows = rounded_up(math.prod(x.shape[:-1]), tiles.rows)
    more = (0, rounded_up(width, tiles.block) - width)  # output channels
    elements, scale = gpu_rows.quantized_tokens(x, call.spec, rows, call.interpret)
    channel_scale = q.channel_scale if q.has_levels else scale_value(q.scale)[0]
    operands = [
        elements,
        jnp.pad(jnp.asarray(q.codes), (more, (0, 0))),
        scale,
        jnp.pad(channel_scale, more),
    ]
    if q.has_levels:
        maps = (of_units(values, num_channels, q.group_size, SUB) for values in step_and_offset(q))
        operands += [jnp.pad(values, ((0, 0), more)) for values in maps]
    return functools.partial(_kernel, bits=q.bits), operands


# In integer numerics. Equal to `xla.integer_matmul` to float rounding, whose derivative it has; a token that
# holds NaN or infinity gives NaN.
levels_fused = fused_by("gpu_levels", _operands, levels_shape)


def _kernel(
    tokens: Ref,
    codes: Ref,
    token_scale: Ref,
    channel_scale: Ref,
    *maps: Ref,
    writer: Writer,
    left_block: Ref = None,
    bits: int,
    tiles: Tiles,
) -> None:
    """Writes one block of the result; `maps` are the steps and offsets, if any."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    at = place_of(tiles)

    def compute(pipeline: Any) -> None:
        @functools.partial(pl.run_scoped, sums=plgpu.ACC((tiles.columns, tiles.rows), jnp.int32))
        def _(sums: Ref) -> None:
            pipeline(sums)
            of_blocks = token_scale.at[at.rows], channel_scale.at[at.columns]
            writer.write(scaled_sums(sums, *of_blocks, tiles), at)

    def step(_: Any, token_block: Ref, code_block: Ref, *rest: Any) -> Any:
        *map_blocks, sums = rest
        words = None
        for half in range(2):
            if words is None or bits == 8:
                part = pl.ds(half * HALF, HALF) if bits == 8 else slice(None)
                words = loaded_words(code_block.at[at.own, part], left_block)
            fields = gpu_words.code_words(words, bits, half)
            if map_blocks:
                found = (sub_block_values(m, at.own, half, tiles) for m in map_blocks)
                left = gpu_words.level_words(fields, *found)
            else:
                left = gpu_words.symmetric_level_words(fields, bits)
            multiply(sums, left, token_block, half, left_block)
        plgpu.wgmma_wait(0)
        return sums

    maps_of_run = plgpu.BlockSpec(
        (RUN // SUB, tiles.block), lambda k: (k, 0), memory_space=plgpu.SMEM
    )
    run_pipeline(
        writer,
        step,
        compute,
        tokens.shape[1] // RUN,
        tiles,
        [
            run_of(tiles.rows, RUN),
            run_of(tiles.block, RUN * bits // 8),
            *(maps_of_run for _ in maps),
        ],
    )(tokens.at[at.rows, :], codes.at[at.block, :], *(m.at[:, at.block] for m in maps))


def scaled_sums(sums: Ref, token_scale: Ref, channel_scale: Ref, tiles: Tiles) -> Array:
    """Returns the block `[columns, rows]` in float32."""
    size = tiles.columns, tiles.rows
    scaled = sums[...].astype(jnp.float32) * of_rows(token_scale, size)
    return scaled * of_columns(channel_scale, size)


def sub_block_values(block: Ref, own: Span, half: int, tiles: Tiles) -> Array:
    """Returns the steps or offsets of a half run, one for each word: `[columns, 16]` in int32."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    layout, shape = word_layout(), (tiles.columns, SUB // 4)
    parts = []
    for index in range(HALF // SUB):
        row = block.at[half * (HALF // SUB) + index, own]
        values = loaded(row, layout.reduce(1), optimized=False).astype(jnp.int32)
        parts.append(plgpu.layout_cast(lax.broadcast_in_dim(values, shape, [0]), layout))
    return lax.concatenate(parts, 1)
