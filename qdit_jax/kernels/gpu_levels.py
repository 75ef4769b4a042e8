"""One int8 dot over all input channels, in one Pallas Mosaic GPU kernel for NVIDIA's Hopper (sm_90a).

Compiled ahead of time for an H100, interpreted on CPU, not run on a GPU.

XLA quantizes the inputs, one symmetric scale per token. The kernel fetches blocks of inputs and of packed
codes, makes int8 levels of the codes in registers (`gpu_words`), multiplies, and scales the int32 sums
by token and output channel. Memory sees the inputs, the packed codes and the result, and nothing between.

Tensor cores take registers as their left operand only, so blocks of the transposed result are computed, and
turned as they are stored. In a block one warpgroup fetches and two compute, one below the other.

Dimensions: M rows (tokens), K input channels, N output channels, all padded to whole blocks; R packed
bytes of an output channel; S sub-blocks of 32 input channels, which have one step and one offset.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int8, UInt8

from qdit_jax.kernels import gpu_words
from qdit_jax.kernels.gpu_memory import (
    byte_transforms,
    loaded,
    loaded_words,
    output_transforms,
    renamed,
    store_transposed,
    word_layout,
)
from qdit_jax.kernels.gpu_tiles import (
    COMPUTING,
    HALF,
    RUN,
    SUB,
    Shape,
    Tiles,
    chosen_tiles,
    rounded_up,
)
from qdit_jax.kernels.operands import act_elements
from qdit_jax.kernels.xla import integer_matmul
from qdit_jax.quant import (
    ActQuant,
    ActSpec,
    QTensor,
    effective_group_size,
    num_groups,
    scale_value,
    step_and_offset,
)


def levels_matmul(
    x: Float[Array, "*lead K"],
    q: QTensor,
    act: ActQuant | None,
    numerics: str,
    dtype: str | None = None,
    *,
    tiles: Tiles | None = None,
    interpret: Any = None,
) -> Float[Array, "*lead N"]:
    """Returns `act(x) @ q` in integer numerics, in `dtype`, by default that of `x`.

    Equal to `xla.integer_matmul` to float rounding, whose derivative it has. A token that holds NaN or
    infinity gives NaN. `interpret` is Pallas' `InterpretGPUParams`, which run it on a CPU, slowly.
    """
    assert act is not None, "gpu_reason refuses it"
    dtype = dtype or x.dtype.name
    if tiles is None:
        rows, itemsize = math.prod(x.shape[:-1]), jnp.dtype(dtype).itemsize
        tiles = chosen_tiles(Shape(rows, *q.shape, q.bits, itemsize))
    return _product(x, q, act.spec, dtype, tiles, interpret)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4, 5))
def _product(
    x: Float[Array, "*lead K"], q: QTensor, spec: ActSpec, dtype: str, tiles: Tiles, interpret: Any
) -> Float[Array, "*lead N"]:
    num_channels, width = q.shape
    elements, scale = quantized_rows(x, spec)
    num_rows = elements.shape[0]
    rows, columns = rounded_up(num_rows, tiles.rows), rounded_up(width, tiles.block)
    channel_scale = q.channel_scale if q.has_levels else scale_value(q.scale)[0]
    operands = [
        jnp.pad(elements, ((0, rows - num_rows), (0, 0))),
        jnp.pad(jnp.asarray(q.codes), ((0, columns - width), (0, 0))),
        jnp.pad(scale, (0, rows - num_rows)),
        jnp.pad(channel_scale, (0, columns - width)),
    ]
    if q.has_levels:
        maps = (of_sub_blocks(values, num_channels, q.group_size) for values in step_and_offset(q))
        operands += [jnp.pad(values, ((0, 0), (0, columns - width))) for values in maps]
    y = _call(tuple(operands), q.bits, jnp.dtype(dtype), tiles, interpret)
    return y[:num_rows, :width].reshape(*x.shape[:-1], width)


@_product.defjvp
def _product_jvp(
    spec: ActSpec,
    dtype: str,
    tiles: Tiles,
    interpret: Any,
    primals: tuple[Any, Any],
    tangents: tuple[Any, Any],
) -> tuple[Array, Array]:
    def by_xla(x: Array, q: QTensor) -> Array:
        return integer_matmul(x, q, ActQuant(spec)).astype(dtype)

    _, tangent = jax.jvp(by_xla, primals, tangents)
    return _product(*primals, spec, dtype, tiles, interpret), tangent


def quantized_rows(
    x: Float[Array, "*lead K"], spec: ActSpec
) -> tuple[Int8[Array, "M K"], Float[Array, " M"]]:
    """Returns the int8 elements of tokens and their scales, NaN of a token that is not finite."""
    wide = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    elements, _, scale = act_elements(wide, ActQuant(spec), jnp.dtype(jnp.int8))
    is_finite = jnp.all(jnp.isfinite(wide), axis=-1)
    return elements, jnp.where(is_finite, jnp.asarray(scale)[:, 0], jnp.nan)


def of_sub_blocks(
    values: UInt8[Array, "G N"], num_channels: int, group_size: int
) -> UInt8[Array, "S N"]:
    """Returns a row for every 32 input channels; `values` themselves where these are the groups."""
    repeats = effective_group_size(num_channels, group_size) // SUB
    if repeats == 1:
        return values
    count = num_groups(num_channels, group_size)
    return jnp.repeat(values, repeats, axis=0, total_repeat_length=count * repeats)[
        : num_channels // SUB
    ]


def _call(
    operands: tuple[Array, ...], bits: int, dtype: Any, tiles: Tiles, interpret: Any
) -> Float[Array, "M N"]:
    """Returns the kernel's result, padding included."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    tokens, codes, *_ = operands
    (rows, num_channels), columns = tokens.shape, codes.shape[0]
    scratch = {
        "y_block": plgpu.SMEM(
            (COMPUTING, tiles.rows, tiles.columns),
            dtype,
            transforms=output_transforms(tiles, dtype),
        )
    }
    if interpret:
        scratch["levels"] = plgpu.SMEM(
            (COMPUTING, tiles.columns, HALF), jnp.int8, transforms=byte_transforms()
        )
    kernel = functools.partial(
        _kernel,
        bits=bits,
        tiles=tiles,
        dtype=dtype,
        num_maps=len(operands) - 4,
        interpret=interpret,
    )
    return plgpu.kernel(
        kernel,
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
        kernel_name="gpu_levels",
        interpret=interpret,
    )(*operands)


# Any: references to memory, which have no public type.
def _kernel(
    tokens: Any,
    codes: Any,
    token_scale: Any,
    channel_scale: Any,
    *rest: Any,
    y_block: Any,
    levels: Any = None,
    bits: int,
    tiles: Tiles,
    dtype: Any,
    num_maps: int,
    interpret: Any,
) -> None:
    """Writes one block of the result; `rest` are the steps and offsets, if any, and the result."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    maps, y = rest[:num_maps], rest[num_maps]
    warpgroup = lax.axis_index("warpgroup")
    rows = pl.ds(lax.axis_index("row_block") * tiles.rows, tiles.rows)
    block = pl.ds(lax.axis_index("column_block") * tiles.block, tiles.block)
    own = pl.ds(warpgroup * tiles.columns, tiles.columns)
    columns = pl.ds(
        lax.axis_index("column_block") * tiles.block + warpgroup * tiles.columns, tiles.columns
    )

    def compute(pipeline: Any) -> None:
        @functools.partial(pl.run_scoped, sums=plgpu.ACC((tiles.columns, tiles.rows), jnp.int32))
        def _(sums: Any) -> None:
            pipeline(sums)
            scaled = scaled_sums(sums, token_scale.at[rows], channel_scale.at[columns], tiles)
            out = y_block.at[warpgroup]
            store_transposed(scaled.astype(dtype), out)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out, y.at[rows, columns])
            plgpu.wait_smem_to_gmem(0, wait_read_only=False)

    def step(_: Any, token_block: Any, code_block: Any, *rest: Any) -> Any:
        *map_blocks, sums = rest
        words = None
        for half in range(2):
            if words is None or bits == 8:
                part = pl.ds(half * HALF, HALF) if bits == 8 else slice(None)
                words = loaded_words(code_block.at[own, part], interpret)
            fields = gpu_words.code_words(words, bits, half)
            if map_blocks:
                maps = (sub_block_values(m, own, half, tiles) for m in map_blocks)
                found = gpu_words.level_words(fields, *maps)
            else:
                found = gpu_words.symmetric_level_words(fields, bits)
            right = token_block.at[:, pl.ds(half * HALF, HALF)].T
            if interpret:
                # The interpreter has no left operand in registers: through shared memory.
                levels[warpgroup] = gpu_words.bytes_of(found)
                plgpu.commit_smem()
                plgpu.wgmma(sums, levels.at[warpgroup], right)
                plgpu.wgmma_wait(0)
            else:
                plgpu.wgmma(sums, renamed(found, to_words=False), right)
        plgpu.wgmma_wait(0)
        return sums

    def run_of(shape: tuple[int, int], transforms: tuple[Any, ...] = ()) -> Any:
        return plgpu.BlockSpec(
            shape, lambda k: (0, k), transforms=transforms, memory_space=plgpu.SMEM
        )

    map_spec = plgpu.BlockSpec((RUN // SUB, tiles.block), lambda k: (k, 0), memory_space=plgpu.SMEM)
    plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(tokens.shape[1] // RUN,),
        memory_registers=40,
        wg_axis="warpgroup",
        num_compute_wgs=COMPUTING,
        max_concurrent_steps=tiles.steps,
        compute_context=compute,
        in_specs=[
            run_of((tiles.rows, RUN), byte_transforms()),
            run_of((tiles.block, RUN * bits // 8), byte_transforms()),
            *(map_spec for _ in maps),
        ],
    )(tokens.at[rows, :], codes.at[block, :], *(m.at[:, block] for m in maps))


def scaled_sums(sums: Any, token_scale: Any, channel_scale: Any, tiles: Tiles) -> Array:
    """Returns the block `[columns, rows]` in float32."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    shape = (tiles.columns, tiles.rows)
    of_token = loaded(token_scale, plgpu.Layout.WGMMA.reduce(0), optimized=False)
    of_channel = loaded(channel_scale, plgpu.Layout.WGMMA.reduce(1), optimized=False)
    scaled = sums[...].astype(jnp.float32) * lax.broadcast_in_dim(of_token, shape, [1])
    return scaled * lax.broadcast_in_dim(of_channel, shape, [0])


def sub_block_values(block: Any, own: Any, half: int, tiles: Tiles) -> Array:
    """Returns the steps or offsets of a half run, one for each word: `[columns, 16]` in int32."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    layout, shape = word_layout(), (tiles.columns, SUB // 4)
    parts = []
    for index in range(HALF // SUB):
        row = block.at[half * (HALF // SUB) + index, own]
        values = loaded(row, layout.reduce(1), optimized=False).astype(jnp.int32)
        parts.append(plgpu.layout_cast(lax.broadcast_in_dim(values, shape, [0]), layout))
    return lax.concatenate(parts, 1)
