"""The kernel of `gpu_levels` on the GPU that is here: two small products against whole numbers.

It was compiled for a device that nobody had at hand. So before it computes anything, once in a process, it
multiplies what has an exact result, with packed codes of 4 and of 8 bits and results in both dtypes. A
device on which that goes wrong is given to the next row of the table, and the reason says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qdit_jax.kernels.gpu_levels import levels_matmul
from qdit_jax.quant import ActQuant, ActSpec, QTensor, packing

SIZES = (40, 256, 136)  # M, K, N: neither M nor N is a whole number of blocks
SPEC = ActSpec(8, 0, symmetric=True)
# x, weights, dtype of the result.
ProductFn = Callable[[Float[Array, "M K"], QTensor, str], Float[Array, "M N"]]


@functools.cache
def wrong_here() -> str | None:
    """Returns what is wrong with the kernel's results on this device, or None; computed once."""
    # A thread of its own: this may be asked while something else is traced.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(wrong_with, kernel_product).result()


def kernel_product(x: Float[Array, "M K"], q: QTensor, dtype: str) -> Float[Array, "M N"]:
    """Returns the product by the kernel."""
    return levels_matmul(x, q, ActQuant(SPEC), "integer", dtype)


def wrong_with(product_fn: ProductFn) -> str | None:
    """Returns what is wrong with the results of a product, one sentence, or None."""
    rng = np.random.default_rng(0)
    rows, channels, width = SIZES
    x = rng.integers(-127, 128, (rows, channels)).astype(np.float32)
    x[:, 5] = 127  # so that the scale of a token is 1
    for bits, dtype in ((4, "bfloat16"), (8, "float32")):
        q, levels = kernel_of_whole_numbers(rng, bits, channels, width)
        expected = x.astype(np.float64) @ levels.T
        try:
            found = np.asarray(product_fn(jnp.asarray(x), q, dtype), np.float64)
        except Exception as error:  # whatever a compiler or driver makes of it
            return f"it does not run here ({type(error).__name__}: {str(error)[:200]})."
        worst = np.max(np.abs(found - expected)) / np.abs(expected).max()
        if not worst <= {"bfloat16": 2**-8, "float32": 2**-20}[dtype]:  # NaN neither
            return f"a product of {bits} bits was wrong on this device, by {worst:.1e}."
    return None


def kernel_of_whole_numbers(
    rng: np.random.Generator, bits: int, channels: int, width: int
) -> tuple[QTensor, np.ndarray]:
    """Returns weights whose channel scales are 1, and their levels `[N, K]`."""
    codes = rng.integers(0, 2**bits, (width, channels)).astype(np.uint8)
    packed = jnp.asarray(packing.pack(codes, bits))
    shape = (channels, width)
    if bits == 8:
        scale = jnp.ones((1, width), jnp.float32)
        return QTensor(packed, scale, bits=8, group_size=0, shape=shape), codes.astype(int) - 128
    step = rng.integers(1, 17, (channels // 32, width)).astype(np.uint8)
    offset = rng.integers(0, 256 - 15 * step.astype(int)).astype(np.uint8)
    wide_step, wide_offset = (np.repeat(a.T.astype(int), 32, axis=1) for a in (step, offset))
    q = QTensor(
        packed,
        jnp.asarray(step),
        channel_scale=jnp.ones(width, jnp.float32),
        offset=jnp.asarray(offset),
        bits=4,
        group_size=32,
        shape=shape,
    )
    return q, codes * wide_step + wide_offset - 128
