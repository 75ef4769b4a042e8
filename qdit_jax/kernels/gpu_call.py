"""The call that the kernels for NVIDIA GPUs share: its grid, the pipeline, and what a block does with memory.

Tensor cores take registers as their left operand only, so blocks of the transposed result are computed, and
turned as they are stored. In a block one warpgroup fetches and two compute, one below the other.

Dimensions: M rows (tokens), K input channels, N output channels, all padded to whole blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from qdit_jax.kernels import gpu_words
from qdit_jax.kernels.epilogue import activated
from qdit_jax.kernels.gpu_memory import of_columns, renamed
from qdit_jax.kernels.gpu_tiles import COMPUTING, HALF, Tiles
from qdit_jax.kernels.refs import Ref, Span

# Any: block specs and what a pipeline is given, which have no public type.


class Place(NamedTuple):
    """Where a warpgroup works.

    Attributes:
        rows: of the block, in the operands.
        block: its output channels, of both warpgroups.
        columns: those of this warpgroup.
        own: the same, counted in the block.
    """

    rows: Span
    block: Span
    columns: Span
    own: Span


class Epilogue(NamedTuple):
    """What is done with the sums as they are written.

    Attributes:
        bias: of all output channels, padding included.
        dtype: of the result.
        activation: see `epilogue.activated`.
    """

    bias: Float[Array, " N"]
    dtype: np.dtype
    activation: str | None = None


# Values of a block `[columns, rows]`, and where it is.
WriteFn = Callable[[Float[Array, "columns rows"], Place], None]


def bias_of(bias: Float[Array, " N"] | None, width: int, columns: int) -> Float[Array, " N"]:
    """Returns the bias of `columns` output channels in float32, zeros where there is none."""
    if bias is None:
        return jnp.zeros(columns, jnp.float32)
    return jnp.pad(bias.astype(jnp.float32), (0, columns - width))


def called(
    kernel: Callable[..., None],
    operands: Sequence[Array],
    epilogue: Epilogue,
    tiles: Tiles,
    *,
    name: str,
    interpret: Any,
) -> Float[Array, "M N"]:
    """Returns the result of a kernel, padding included.

    The first operands are the tokens `[M, K]` and the packed codes `[N, R]`. The kernel is given references to
    all of them, `tiles`, and `write_fn`, which writes the sums of a block to the result; where it is interpreted,
    also `left_block` in shared memory, for its left operand.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    tokens, codes, *_ = operands
    operands, dtype = [*operands, epilogue.bias], epilogue.dtype
    (rows, num_channels), columns = tokens.shape, codes.shape[0]
    scratch = {
        "y_block": plgpu.SMEM(
            (COMPUTING, tiles.rows, tiles.columns),
            dtype,
            transforms=output_transforms(tiles, dtype),
        )
    }
    if interpret:
        scratch["left_block"] = plgpu.SMEM(
            (COMPUTING, tiles.columns, HALF),
            tokens.dtype,
            transforms=operand_transforms(tokens.dtype),
        )

    def with_epilogue(*refs: Ref, y_block: Ref, **scratch: Ref) -> None:
        *found, bias, y = refs

        def write_fn(values: Float[Array, "columns rows"], at: Place) -> None:
            moved = values + of_columns(bias.at[at.columns], (tiles.columns, tiles.rows))
            write(activated(moved, epilogue.activation), y_block, y, at)

        kernel(*found, write_fn=write_fn, tiles=tiles, **scratch)

    return plgpu.kernel(
        with_epilogue,
        out_type=jax.ShapeDtypeStruct((rows, columns), dtype),
        grid=(rows // tiles.rows, columns // tiles.block),
        grid_names=("row_block", "column_block"),
        num_threads=COMPUTING + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * num_channels * columns,
            transcendentals=0,
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in operands)
            + rows * columns * dtype.itemsize,
        ),
        kernel_name=name,
        interpret=interpret,
    )(*operands)


def place_of(tiles: Tiles) -> Place:
    """Returns where the warpgroup that asks works."""
    warpgroup, column_block = lax.axis_index("warpgroup"), lax.axis_index("column_block")
    return Place(
        rows=pl.ds(lax.axis_index("row_block") * tiles.rows, tiles.rows),
        block=pl.ds(column_block * tiles.block, tiles.block),
        columns=pl.ds(column_block * tiles.block + warpgroup * tiles.columns, tiles.columns),
        own=pl.ds(warpgroup * tiles.columns, tiles.columns),
    )


def run_pipeline(
    step: Callable[..., Any],
    compute: Callable[[Any], None],
    num_runs: int,
    tiles: Tiles,
    in_specs: Sequence[Any],
) -> Callable[..., None]:
    """Returns what fetches the operands, a run of input channels after another, and gives them to `step`.

    `compute` is given the pipeline, which it calls with what the first step is given.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    pipeline: Callable[..., None] = plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(num_runs,),
        memory_registers=40,
        wg_axis="warpgroup",
        num_compute_wgs=COMPUTING,
        max_concurrent_steps=tiles.steps,
        compute_context=compute,
        in_specs=in_specs,
    )
    return pipeline


def run_of(count: int, width: int, dtype: Any = jnp.int8) -> Any:
    """Returns the block of a run: `width` numbers of each of `count` rows, by default bytes."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.BlockSpec(
        (count, width),
        lambda k: (0, k),
        transforms=operand_transforms(dtype),
        memory_space=plgpu.SMEM,
    )


def multiply(sums: Ref, left: Array, token_block: Ref, half: int, left_block: Ref) -> None:
    """Adds the product of words `[columns, 16]` and half a run of the tokens to int32 `sums`."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    right = token_block.at[:, pl.ds(half * HALF, HALF)].T
    if left_block is None:
        plgpu.wgmma(sums, renamed(left, to_words=False), right)
        return
    # The interpreter has no left operand in registers: through shared memory.
    own = left_block.at[lax.axis_index("warpgroup")]
    own[...] = gpu_words.bytes_of(left)
    plgpu.commit_smem()
    plgpu.wgmma(sums, own, right)
    plgpu.wgmma_wait(0)


def write(values: Float[Array, "columns rows"], y_block: Ref, y: Ref, at: Place) -> None:
    """Writes a warpgroup's block `[columns, rows]` to the result, through shared memory."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    out = y_block.at[lax.axis_index("warpgroup")]
    out.T[...] = plgpu.layout_cast(values.astype(y.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out, y.at[at.rows, at.columns])
    plgpu.wait_smem_to_gmem(0, wait_read_only=False)


def operand_transforms(dtype: Any) -> tuple[Any, ...]:
    """Returns how 64 neighboring numbers of a row lie in shared memory, bytes or 16 bits wide."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    swizzle = HALF * jnp.dtype(dtype).itemsize
    return plgpu.TilingTransform((8, HALF)), plgpu.SwizzleTransform(swizzle)


def output_transforms(tiles: Tiles, dtype: Any) -> tuple[Any, ...]:
    """Returns how a block of the result lies in shared memory."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    swizzle = plgpu.find_swizzle(tiles.columns * dtype.itemsize * 8, "output")
    tiling = plgpu.TilingTransform((8, swizzle // dtype.itemsize))
    return tiling, plgpu.SwizzleTransform(swizzle)
