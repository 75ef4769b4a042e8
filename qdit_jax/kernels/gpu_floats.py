"""Packed codes as floats in an NVIDIA GPU's registers, for the kernel whose inputs have 16 bits.

A code becomes a float without a conversion: its byte is written below the mantissa of 2^23, which gives
2^23 + code, and 2^23 is taken away with the zero point.

Dimensions: N output channels of a warpgroup, K input channels of half a run.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

from qdit_jax.kernels.gpu_memory import by_register, loaded, word_layout
from qdit_jax.kernels.gpu_tiles import HALF
from qdit_jax.kernels.gpu_words import code_words
from qdit_jax.kernels.refs import Ref, Span

MAGIC = np.float32(2**23)
MAGIC_BITS = np.int32(0x4B000000)  # those of 2^23
BYTE = np.int32(0xFF)


def code_floats(
    block: Ref, own: Span, bits: int, half: int, is_interpreted: bool
) -> Float[Array, "N K"]:
    """Returns 2^23 + code of the weights of half a run, in float32.

    A byte of 4 bits holds the codes j and j + 64 of a run of 128, one in each `half`.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    part = pl.ds(half * HALF, HALF) if bits == 8 else slice(None)
    own_block = block.at[own, part]
    if is_interpreted:
        codes = code_words(own_block[...].astype(jnp.int32), bits, half)
        return codes.astype(jnp.float32) + MAGIC
    pairs = pairs_of(loaded(own_block, plgpu.Layout.WGMMA, optimized=False))
    return joined(*floats_of_pairs(pairs, bits, half))


def floats_of_pairs(
    pairs: Int32[Array, "N P"], bits: int, half: int
) -> tuple[Float[Array, "N P"], Float[Array, "N P"]]:
    """Returns 2^23 + code of the low and the high byte of pairs."""
    codes = code_words(pairs, bits, half)
    low, high = ((codes >> move) & BYTE for move in (0, 8))
    of_low, of_high = (
        lax.bitcast_convert_type(each | MAGIC_BITS, jnp.float32) for each in (low, high)
    )
    return of_low, of_high


def pairs_of(values: Array) -> Int32[Array, "N P"]:
    """Returns bytes `[N, K]` in registers as int32, two neighbors in each."""
    from jax.experimental.mosaic import gpu as mosaic
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jax.extend.mlir import ir
    from jax.extend.mlir.dialects import arith

    rows, columns = values.shape

    def both(register: Any) -> Any:
        short, word = (ir.IntegerType.get_signless(width) for width in (16, 32))
        wide = arith.extui(word, mosaic.utils.bitcast(register, short))
        return mosaic.utils.bitcast(wide, ir.VectorType.get((1,), word))

    shape = rows, columns // 2
    return by_register(both, (values,), plgpu.Layout.WGMMA, shape, jnp.int32, word_layout())


def joined(low: Float[Array, "N P"], high: Float[Array, "N P"]) -> Float[Array, "N K"]:
    """Returns what was of pairs of neighbors as one array, in the layout of tensor cores."""
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jax.extend.mlir import ir
    from jax.extend.mlir.dialects import vector

    rows, pairs = low.shape

    def together(low: Any, high: Any) -> Any:
        found = [vector.extract(one, [], [0]) for one in (low, high)]
        return vector.from_elements(ir.VectorType.get((2,), ir.F32Type.get()), found)

    shape = rows, 2 * pairs
    target = plgpu.Layout.WGMMA
    return by_register(together, (low, high), word_layout(), shape, jnp.float32, target)


def multiply_floats(sums: Ref, left: Array, token_block: Ref, half: int, left_block: Ref) -> None:
    """Adds the product of weights `[columns, HALF]` and half a run of the tokens to `sums`."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    right = token_block.at[:, pl.ds(half * HALF, HALF)].T
    if left_block is None:
        plgpu.wgmma(sums, left, right)
        return
    # The interpreter has no left operand in registers: through shared memory.
    own = left_block.at[lax.axis_index("warpgroup")]
    own[...] = left
    plgpu.commit_smem()
    plgpu.wgmma(sums, own, right)
    plgpu.wgmma_wait(0)
