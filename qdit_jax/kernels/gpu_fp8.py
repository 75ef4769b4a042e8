"""A product of FP8 inputs and FP8 weights, in one Pallas Mosaic GPU kernel for NVIDIA's Hopper (sm_90a).

Compiled ahead of time for an H100, interpreted on CPU, not run on a GPU.

The inputs are quantized first, one symmetric scale per token (`gpu_rows`). The kernel fetches blocks of both
operands, which tensor cores take from shared memory as they are stored. Hopper's tensor cores keep about 14 bits of the sums of
FP8 products. So each run of 128 input channels has sums of its own, which are then added up in float32, in registers;
the total is scaled by token and output channel.

Dimensions: M rows (tokens), K input channels, N output channels, all padded to whole blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from qdit_jax.kernels import gpu_rows
from qdit_jax.kernels.call import Call
from qdit_jax.kernels.gpu_call import (
    Writer,
    place_of,
    run_of,
    run_pipeline,
)
from qdit_jax.kernels.gpu_memory import of_columns, of_rows
from qdit_jax.kernels.gpu_neighbors import fused_by
from qdit_jax.kernels.gpu_tiles import RUN, Shape, Tiles, rounded_up
from qdit_jax.kernels.operands import element_scale
from qdit_jax.kernels.prologue import Pending
from qdit_jax.kernels.refs import Ref
from qdit_jax.quant import ActSpec, QTensor


def fp8_shape(rows: int, q: QTensor, spec: ActSpec | None, itemsize: int) -> Shape:
    """Returns the product as the table of blocks knows it."""
    return Shape(rows, *q.shape, q.bits, itemsize, elements="fp8")


def _operands(
    x: Float[Array, "*lead K"] | Pending, q: QTensor, call: Call
) -> tuple[Callable[..., None], list[Array]]:
    assert call.spec is not None, "its row refuses it"
    width, tiles = q.shape[1], call.tiles
    columns = rounded_up(width, tiles.block)
    rows = rounded_up(math.prod(x.shape[:-1]), tiles.rows)
    elements, scale = gpu_rows.quantized_tokens(x, call.spec, rows, call.interpret)
    channel_scale = jnp.pad(element_scale(q, q.scale[0]), (0, columns - width))
    return _kernel, [elements, weight_elements(q, columns), scale, channel_scale]


# In integer numerics. Equal to `xla.integer_matmul` to the rounding of sums, whose derivative it has; a token
# that holds NaN or infinity gives NaN.
fp8_fused = fused_by("gpu_fp8", _operands, fp8_shape)


def weight_elements(q: QTensor, columns: int) -> Float[Array, "N K"]:
    """Returns the stored weights as FP8, without a copy, but for output channels that are added."""
    dtype = None if q.fmt is None else q.fmt.float8_dtype
    assert dtype is not None, "its row refuses it"
    codes = jnp.pad(jnp.asarray(q.codes), ((0, columns - q.shape[1]), (0, 0)))
    return jax.lax.bitcast_convert_type(codes, dtype)


def _kernel(
    tokens: Ref,
    weights: Ref,
    token_scale: Ref,
    channel_scale: Ref,
    *,
    writer: Writer,
    left_block: Ref = None,
    tiles: Tiles,
) -> None:
    """Writes one block of the result; both operands are in shared memory, interpreted or not."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    at, size = place_of(tiles), (tiles.columns, tiles.rows)

    def compute(pipeline: Any) -> None:
        zeros = plgpu.layout_cast(jnp.zeros(size, jnp.float32), plgpu.Layout.WGMMA)
        total = pipeline(zeros) * of_rows(token_scale.at[at.rows], size)
        writer.write(total * of_columns(channel_scale.at[at.columns], size), at)

    def step(_: Any, token_block: Ref, weight_block: Ref, total: Array) -> Array:
        def sums_of(sums: Ref) -> Array:
            plgpu.wgmma(sums, weight_block.at[at.own, :], token_block.T)
            return sums[...]

        sums: Array = pl.run_scoped(sums_of, plgpu.ACC(size, jnp.float32))
        return total + sums

    in_specs = [
        run_of(tiles.rows, RUN, tokens.dtype, RUN),
        run_of(tiles.block, RUN, weights.dtype, RUN),
    ]
    pipeline = run_pipeline(writer, step, compute, tokens.shape[1] // RUN, tiles, in_specs)
    pipeline(tokens.at[at.rows, :], weights.at[at.block, :])
