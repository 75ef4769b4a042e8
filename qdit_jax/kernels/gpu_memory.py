"""Blocks of a product in an NVIDIA GPU's registers, for the kernels on tensor cores.

Dimensions: N output channels of a warpgroup, W words of four bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from qdit_jax.kernels import gpu_words
from qdit_jax.kernels.refs import Ref

# Any: layouts and values of MLIR, which have no public type.


def loaded(block: Ref, layout: Any, *, optimized: bool = True) -> Array:
    """Returns a block of memory in registers."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    load: Any = plgpu.load  # versions of JAX differ in its further arguments
    values: Array = load(block, layout=layout, optimized=optimized)
    return values


def store(block: Ref, values: Array) -> None:
    """Writes to a block of memory, in whatever pieces a warp has."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    write: Any = vars(plgpu)["store"]  # older JAX, with which no kernel runs, has none
    write(block, values, optimized=False)


def of_rows(values: Ref, size: tuple[int, int]) -> Array:
    """Returns values of rows in every column of a block `[columns, rows]`."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    of_row = loaded(values, plgpu.Layout.WGMMA.reduce(0), optimized=False)
    return lax.broadcast_in_dim(of_row, size, [1])


def of_columns(values: Ref, size: tuple[int, ...]) -> Array:
    """Returns values of columns in every row of a block `[columns, rows]`."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    of_column = loaded(values, plgpu.Layout.WGMMA.reduce(1), optimized=False)
    return lax.broadcast_in_dim(of_column, size, [0])


def word_layout() -> Any:
    """Returns the layout of words whose bytes lie where tensor cores want int8 `[N, 4 W]`."""
    from jax.experimental.mosaic.gpu import fragmented_array
    from jax.experimental.pallas import mosaic_gpu as plgpu

    tiling = fragmented_array.Tiling(((64, 4), (16, 4), (8, 4), (1,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1)


def loaded_words(block: Ref, left_block: Ref) -> Array:
    """Returns 64 bytes of each of a warpgroup's rows as words `[columns, 16]`."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if left_block is not None:
        return gpu_words.words_of(block[...])
    return renamed(loaded(block, plgpu.Layout.WGMMA_8BIT), to_words=True)


def renamed(values: Array, *, to_words: bool) -> Array:
    """Returns bytes `[N, 4 W]` in registers as words `[N, W]`, or the reverse: no instruction."""
    from jax.experimental.mosaic import gpu as mosaic
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jax.extend.mlir import ir

    rows, columns = values.shape
    layouts = word_layout(), plgpu.Layout.WGMMA_8BIT
    source, target = layouts[::-1] if to_words else layouts
    shape = (rows, columns // 4) if to_words else (rows, columns * 4)
    dtype = jnp.int32 if to_words else jnp.int8

    def with_other_type(register: Any) -> Any:
        count, width = (1, 32) if to_words else (4, 8)
        kind = ir.VectorType.get((count,), ir.IntegerType.get_signless(width))
        return mosaic.utils.bitcast(register, kind)

    return by_register(with_other_type, (values,), source, shape, dtype, target)


def by_register(
    fn: Callable[..., Any],
    arrays: tuple[Array, ...],
    source: Any,
    shape: tuple[int, int],
    dtype: Any,
    target: Any,
) -> Array:
    """Returns an array in registers, each of which `fn` makes of the `arrays`' registers at its place.

    `fn` takes and returns values of MLIR. All `arrays` have the layout `source`.
    """
    import numpy as np
    from jax.experimental.mosaic.gpu import fragmented_array
    from jax.experimental.pallas import mosaic_gpu as plgpu

    @plgpu.inline_mgpu(
        arg_types=(source,) * len(arrays),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=target),
    )
    def made(_: Any, *found: Any) -> Any:
        registers = np.empty(found[0].registers.shape, object)
        for at in np.ndindex(registers.shape):
            registers[at] = fn(*(array.registers[at] for array in found))
        is_signed = True if jnp.issubdtype(dtype, jnp.integer) else None
        return fragmented_array.FragmentedArray(
            _registers=registers, _layout=target.to_mgpu(), _is_signed=is_signed
        )

    return made(*arrays)
