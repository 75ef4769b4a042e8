"""The call that the kernels for NVIDIA GPUs share: its grid, the pipeline, and what a block does with memory.

Tensor cores take registers as their left operand only, so blocks of the transposed result are computed, and
turned as they are stored. In a block one warpgroup fetches and two compute, one below the other.

Dimensions: M rows (tokens), K input channels, N output channels, all padded to whole blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from qdit_jax.kernels import gpu_words
from qdit_jax.kernels.epilogue import Epilogue, activated
from qdit_jax.kernels.gpu_memory import loaded, of_columns, renamed
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


class Added(NamedTuple):
    """What a block is added to, in memory.

    Attributes:
        x, modulation: of a `Gated`.
        first: column of the modulation where the gate begins.
        tokens_per_sample: see `Gated`.
        arrived: barriers of the warpgroups.
    """

    x: Ref
    modulation: Ref
    first: int
    tokens_per_sample: int
    arrived: Ref


@dataclasses.dataclass(frozen=True)
class Writer:
    """Writes the blocks of a result, with its epilogue."""

    bias: Ref
    parts: Sequence[Ref]  # of the result, by columns
    y_block: Ref  # of all warpgroups, in shared memory
    activation: str | None
    added: Added | None

    def begin(self, at: Place) -> None:
        """Fetches what a warpgroup's block will be added to, while it is computed; `write` waits for it."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        if self.added is not None:
            own, arrived = (
                a.at[lax.axis_index("warpgroup")] for a in (self.y_block, self.added.arrived)
            )
            plgpu.copy_gmem_to_smem(self.added.x.at[at.rows, at.columns], own, arrived)

    def write(self, values: Float[Array, "columns rows"], at: Place) -> None:
        """Writes a warpgroup's block, through shared memory."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        own = self.y_block.at[lax.axis_index("warpgroup")]
        moved = values + of_columns(self.bias.at[at.columns], values.shape)
        moved = activated(moved, self.activation)
        if self.added is not None:
            moved = self.sum_of(moved, own, at)
        own.T[...] = plgpu.layout_cast(
            moved.astype(self.y_block.dtype), plgpu.Layout.WGMMA_TRANSPOSED
        )
        plgpu.commit_smem()
        width = self.parts[0].shape[1]
        for index, part in enumerate(self.parts):
            # Its columns are asked for where the block lies in it alone.
            columns = pl.ds(at.columns.start - index * width, at.columns.size)

            def copy(part: Ref = part, columns: Span = columns) -> None:
                plgpu.copy_smem_to_gmem(own, part.at[at.rows, columns])

            if len(self.parts) == 1:
                copy()
            else:
                pl.when(at.columns.start // width == index)(copy)
        plgpu.wait_smem_to_gmem(0, wait_read_only=False)

    def sum_of(self, values: Float[Array, "columns rows"], own: Ref, at: Place) -> Array:
        """Returns what the block is added to plus its gate times `values`."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        added = self.added
        assert added is not None, "nothing to add to"
        plgpu.barrier_wait(added.arrived.at[lax.axis_index("warpgroup")])
        before = plgpu.layout_cast(loaded(own.T, plgpu.Layout.WGMMA_TRANSPOSED), plgpu.Layout.WGMMA)
        sample = lax.axis_index("row_block") * values.shape[1] // added.tokens_per_sample
        columns = pl.ds(added.first + at.columns.start, at.columns.size)
        gate = of_columns(added.modulation.at[sample, columns], values.shape)
        return before.astype(jnp.float32) + gate * values


def called(
    kernel: Callable[..., None],
    operands: Sequence[Array],
    epilogue: Epilogue,
    tiles: Tiles,
    *,
    name: str,
    interpret: Any,
) -> Sequence[Float[Array, "M _"]]:
    """Returns the parts of a kernel's result, padding included.

    The first operands are the tokens `[M, K]` and the packed codes `[N, R]`. The kernel is given references to
    all of them, `tiles`, and `writer`, which writes the sums of a block to the result; where it is interpreted,
    also `left_block` in shared memory, for its left operand.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    tokens, codes, *_ = operands
    operands, dtype, gated = [*operands, epilogue.bias], epilogue.dtype, epilogue.gated
    (rows, num_channels), columns = tokens.shape, codes.shape[0]
    scratch: dict[str, Any] = {
        "y_block": plgpu.SMEM(
            (COMPUTING, tiles.rows, tiles.columns),
            dtype,
            transforms=output_transforms(tiles, dtype),
        )
    }
    if gated is not None:
        operands += [gated.x.reshape(rows, columns), gated.modulation]
        scratch["arrived"] = plgpu.Barrier(num_barriers=COMPUTING)
    if interpret:
        scratch["left_block"] = plgpu.SMEM(
            (COMPUTING, tiles.columns, HALF),
            tokens.dtype,
            transforms=operand_transforms(tokens.dtype),
        )

    def with_epilogue(*refs: Ref, y_block: Ref, arrived: Ref = None, **scratch: Ref) -> None:
        found, parts = list(refs[: -epilogue.parts]), refs[-epilogue.parts :]
        added = None
        if gated is not None:
            *found, x, modulation = found
            added = Added(x, modulation, gated.gate * columns, gated.tokens_per_sample, arrived)
        *found, bias = found
        writer = Writer(bias, parts, y_block, epilogue.activation, added)
        kernel(*found, writer=writer, tiles=tiles, **scratch)

    return plgpu.kernel(
        with_epilogue,
        out_type=[jax.ShapeDtypeStruct((rows, columns // epilogue.parts), dtype)] * epilogue.parts,
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
    writer: Writer,
    step: Callable[..., Any],
    compute: Callable[[Any], None],
    num_runs: int,
    tiles: Tiles,
    in_specs: Sequence[Any],
) -> Callable[..., None]:
    """Returns what fetches the operands, a run of input channels after another, and gives them to `step`.

    `compute` is given the pipeline, which it calls with what the first step is given, and writes the result.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def begun(pipeline: Any) -> None:
        writer.begin(place_of(tiles))
        compute(pipeline)

    pipeline: Callable[..., None] = plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(num_runs,),
        memory_registers=40,
        wg_axis="warpgroup",
        num_compute_wgs=COMPUTING,
        max_concurrent_steps=tiles.steps,
        compute_context=begun,
        in_specs=in_specs,
    )
    return pipeline


def run_of(count: int, width: int, dtype: Any = jnp.int8, neighbors: int = HALF) -> Any:
    """Returns the block of a run: `width` numbers of each of `count` rows, by default bytes."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.BlockSpec(
        (count, width),
        lambda k: (0, k),
        transforms=operand_transforms(dtype, neighbors),
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


def operand_transforms(dtype: Any, neighbors: int = HALF) -> tuple[Any, ...]:
    """Returns how neighboring numbers of a row lie in shared memory: 64 or 128 bytes of them."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    swizzle = neighbors * jnp.dtype(dtype).itemsize
    return plgpu.TilingTransform((8, neighbors)), plgpu.SwizzleTransform(swizzle)


def output_transforms(tiles: Tiles, dtype: Any) -> tuple[Any, ...]:
    """Returns how a block of the result lies in shared memory."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    swizzle = plgpu.find_swizzle(tiles.columns * dtype.itemsize * 8, "output")
    tiling = plgpu.TilingTransform((8, swizzle // dtype.itemsize))
    return tiling, plgpu.SwizzleTransform(swizzle)
