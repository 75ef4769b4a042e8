"""The kernels for NVIDIA GPUs on the GPU that is here: two small products of each against whole numbers.

They were compiled for a device that nobody had at hand. So before one computes anything, once in a process,
it multiplies what has an exact result, with packed codes of 4 and of 8 bits or FP8, and results in both dtypes. A
device on which that goes wrong is given to the next row of the table, and the reason says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qdit_jax.kernels.epilogue import Gated
from qdit_jax.kernels.gpu_fp8 import fp8_fused
from qdit_jax.kernels.gpu_groups import groups_fused
from qdit_jax.kernels.gpu_levels import levels_fused
from qdit_jax.kernels.gpu_weights import weights_fused
from qdit_jax.kernels.prologue import Mapped, Modulated
from qdit_jax.quant import ActQuant, ActSpec, InputMap, QTensor, formats, packing

SIZES = (40, 256, 136)  # M, K, N: neither M nor N is a whole number of blocks
# Samples, tokens, K, N: blocks lie in one sample, and in one of three parts.
NEIGHBORS = (2, 128, 256, 384)
# x, weights, dtype of the result.
ProductFn = Callable[[Float[Array, "M K"], QTensor, str], Float[Array, "M N"]]
KernelFn = Callable[[np.random.Generator, int, int, int], tuple[QTensor, np.ndarray]]
# (rng, what quantizes the inputs, M, K) -> inputs.
InputsFn = Callable[[np.random.Generator, ActSpec | None, int, int], np.ndarray]


def bytes_of_range(
    rng: np.random.Generator, act: ActSpec | None, rows: int, channels: int
) -> np.ndarray:
    """Returns whole numbers of a byte, with both ends in every group, so that the scales of a token are 1."""
    low = -127 if act is not None and act.symmetric else -128
    x = rng.integers(low, 128, (rows, channels)).astype(np.float32)
    x[:, ::64], x[:, 1::64] = low, 127
    return x


def multiples_of_64(
    rng: np.random.Generator, act: ActSpec | None, rows: int, channels: int
) -> np.ndarray:
    """Returns numbers that FP8 (E4M3) holds, up to its greatest, so that the scales of a token are 1."""
    x = 64 * rng.integers(-7, 8, (rows, channels)).astype(np.float32)
    x[:, ::64], x[:, 1::64] = -448, 448
    return x


class Check(NamedTuple):
    """Products of one kernel that have an exact result.

    Attributes:
        fused: the kernel with what comes before and after it, as the table calls it.
        act: what quantizes the inputs, if anything; whole numbers that reach both ends of its grid stay what
            they are.
        kernel_fn: `(rng, bits, K, N) ->` weights and their values `[N, K]`, whole numbers.
        x_dtype: of the inputs.
        bits: of the weights of a product in 16 bits, and of one in 32.
        inputs_fn: makes the inputs.
    """

    fused: Callable[..., tuple[Array, ...]]
    act: ActSpec | None
    kernel_fn: KernelFn
    x_dtype: str = "float32"
    bits: tuple[int, int] = (4, 8)
    inputs_fn: InputsFn = bytes_of_range


@functools.cache
def wrong_here(check: Check) -> str | None:
    """Returns what is wrong with a kernel's results on this device, or None; computed once."""

    def product(x: Float[Array, "M K"], q: QTensor, dtype: str) -> Float[Array, "M N"]:
        (y,) = check.fused(x, q, None if check.act is None else ActQuant(check.act), dtype)
        return y

    # A thread of its own: this may be asked while something else is traced.
    with ThreadPoolExecutor(1) as pool:
        wrong = pool.submit(wrong_with, product, check).result()
        if wrong is None:
            wrong = pool.submit(wrong_neighbors, check.fused, check).result()
        return wrong


def wrong_with(product_fn: ProductFn, check: Check) -> str | None:
    """Returns what is wrong with the results of a product, one sentence, or None."""
    rng = np.random.default_rng(0)
    rows, channels, width = SIZES
    x = check.inputs_fn(rng, check.act, rows, channels)
    for bits, dtype in zip(check.bits, ("bfloat16", "float32"), strict=True):
        q, values = check.kernel_fn(rng, bits, channels, width)
        expected = x.astype(np.float64) @ values.T
        try:
            found = np.asarray(product_fn(jnp.asarray(x, check.x_dtype), q, dtype), np.float64)
        except Exception as error:  # whatever a compiler or driver makes of it
            return f"it does not run here ({type(error).__name__}: {str(error)[:200]})."
        worst = np.max(np.abs(found - expected)) / np.abs(expected).max()
        if not worst <= {"bfloat16": 2**-8, "float32": 2**-20}[dtype]:  # NaN neither
            return f"a product of {bits} bits was wrong on this device, by {worst:.1e}."
    return None


def wrong_neighbors(fused_fn: Callable[..., tuple[Array, ...]], check: Check) -> str | None:
    """Returns what is wrong with what a kernel computes before and after a product, one sentence, or None."""
    rng, (samples, tokens, channels, width) = np.random.default_rng(0), NEIGHBORS
    q, _ = check.kernel_fn(rng, check.bits[0], channels, width)

    def normal(*shape: int) -> Float[Array, "..."]:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    x = Mapped(
        Modulated(normal(samples, tokens, channels), normal(samples, 2 * channels), 0, 1),
        InputMap(jnp.abs(normal(channels)) + 0.5, normal(channels)),
    )
    gated = Gated(normal(samples, tokens, width), normal(samples, 2 * width), 1)
    act = None if check.act is None else ActQuant(check.act)
    try:
        computed = x.array().astype(check.x_dtype)
        (alone,) = fused_fn(computed, q, act, "float32")
        first = computed if act is None else x  # a norm comes before a quantizer
        parts = fused_fn(first, q, act, "float32", None, None, None, 3)
        (total,) = fused_fn(computed, q, act, "float32", None, None, gated)
    except Exception as error:  # whatever a compiler or driver makes of it
        return f"its neighbors do not run here ({type(error).__name__}: {str(error)[:200]})."
    # Norms differ in the last bit, which may round a number the other way.
    pairs = {
        "norm and map before": (jnp.concatenate(parts, axis=-1), alone, 2**-6),
        "sum after": (total, gated.plus(alone), 2**-20),
    }
    for name, (found, expected, tolerance) in pairs.items():
        worst = jnp.max(jnp.abs(found - expected)) / jnp.max(jnp.abs(expected))
        if not worst <= tolerance:  # NaN neither
            return f"the {name} a product was wrong on this device, by {worst:.1e}."
    return None


def whole_levels(
    rng: np.random.Generator, bits: int, channels: int, width: int
) -> tuple[QTensor, np.ndarray]:
    """Returns weights on two levels of scales (4 bits) or per channel, and their levels `[N, K]`."""
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


def whole_groups(
    rng: np.random.Generator, bits: int, channels: int, width: int
) -> tuple[QTensor, np.ndarray]:
    """Returns weights in groups of 32 (4 bits) or 128 with zero points and scales of 1 and 2, and values."""
    group_size = 32 if bits == 4 else 128
    groups = (channels // group_size, width)
    codes = rng.integers(0, 2**bits, (width, channels)).astype(np.uint8)
    zero_point = rng.integers(0, 2**bits, groups)
    scale = rng.integers(1, 3, groups)
    q = QTensor(
        jnp.asarray(packing.pack(codes, bits)),
        jnp.asarray(scale, jnp.float32),
        jnp.asarray(packing.pack(zero_point.T, bits).T),
        bits=bits,
        group_size=group_size,
        shape=(channels, width),
    )
    wide_zero, wide_scale = (np.repeat(a.T, group_size, axis=1) for a in (zero_point, scale))
    return q, (codes.astype(int) - wide_zero) * wide_scale


def whole_fp8(
    rng: np.random.Generator, bits: int, channels: int, width: int
) -> tuple[QTensor, np.ndarray]:
    """Returns weights in FP8 of magnitudes 1 to 1.875, and their values `[N, K]`.

    Times `multiples_of_64`, a run of 128 channels has sums that 14 bits hold: multiples of 8 below 2**17.
    """
    fmt, shape = formats.fp8_e4m3, (width, channels)
    codes = (rng.integers(0, 2, shape) << 7 | 7 << 3 | rng.integers(0, 8, shape)).astype(np.uint8)
    scale = jnp.ones((1, width), jnp.float32)
    q = QTensor(
        jnp.asarray(codes), scale, bits=bits, group_size=0, shape=(channels, width), fmt=fmt
    )
    return q, fmt.values()[codes]


LEVELS = Check(levels_fused, ActSpec(8, 0, symmetric=True), whole_levels)
GROUPS = Check(groups_fused, ActSpec(8, 128), whole_groups)
WEIGHTS = Check(weights_fused, None, whole_groups, "bfloat16")
FP8 = Check(
    fp8_fused,
    ActSpec(fmt=formats.fp8_e4m3, group_size=0),
    whole_fp8,
    bits=(8, 8),
    inputs_fn=multiples_of_64,
)
