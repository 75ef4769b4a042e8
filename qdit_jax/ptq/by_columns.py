"""Quantizes a kernel in blocks of output channels, which bounds the temporary memory.

Output channels are independent under rounding to nearest. Dimensions: K input and N output channels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import Float

from qdit_jax.quant import QTensor, WeightSpec, dequantize, quantize, select_columns
from qdit_jax.types import AnyArray

# Values per block, 6 MB in float32: a DiT-XL's largest kernel is six blocks of one shape.
BLOCK = 3 << 19


def column_blocks(shape: tuple[int, ...], channel_group: int) -> list[slice]:
    """Returns the columns of a kernel `(K, N)` as slices of one length, the last perhaps shorter.

    Each has whole channel groups and about `BLOCK` values at most.
    """
    num_rows, width = shape
    count = -(-num_rows * width // BLOCK)
    length = -(-width // (count * channel_group)) * channel_group
    return [slice(start, min(start + length, width)) for start in range(0, width, length)]


def quantize_by_columns(w: Float[np.ndarray, "K N"], spec: WeightSpec) -> QTensor:
    """Returns `quantize(w, spec)` bit for bit, its arrays in NumPy.

    A kernel in a format with a factor or a codebook per tensor is quantized in one block.

    Raises:
        TypeError, ValueError: see `quantize`.
    """
    blocks = [slice(None)]
    if spec.fmt is None or not spec.fmt.needs_whole_tensor:
        blocks = column_blocks(w.shape, spec.channel_group)
    parts = [jax.tree.map(np.asarray, quantize(w[:, block], spec)) for block in blocks]
    if len(parts) == 1:
        return parts[0]
    alike = [dataclasses.replace(part, shape=w.shape) for part in parts]
    # Of every array the output channels are the first axis.
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *alike)


def squares_by_columns(
    w: Float[AnyArray, "K N"], q: QTensor
) -> Iterator[tuple[Float[np.ndarray, "K n"], Float[np.ndarray, " n"], Float[np.ndarray, " n"]]]:
    """Yields blocks of columns of a kernel, and the squared norms of them and of their errors.

    Everything is in units of `unit_of(w)`: blocks float32 `[K, n]`, squares float64 `[n]`.
    """
    w, q = np.asarray(w), jax.tree.map(np.asarray, q)
    unit = np.float32(unit_of(w))
    for columns in column_blocks(w.shape, q.channel_group):
        part = np.asarray(w[:, columns]).astype(np.float32) / unit
        # A sum inside of jit would unpack the codes again for every few values.
        error = np.asarray(dequantize(select_columns(q, columns))) / unit - part
        yield part, sum_of_squares(part), sum_of_squares(error)


def sum_of_squares(x: Float[np.ndarray, "K N"]) -> Float[np.ndarray, " N"]:
    """Returns the sum of each column's squares, in float64 without a copy of `x`."""
    return np.einsum("kn,kn->n", x, x, dtype=np.float64)


def unit_of(w: np.ndarray) -> float:
    """Returns a power of two near the greatest magnitude: division by it is exact."""
    top = max(-float(w.min()), float(w.max()))
    return 2.0 ** max(math.floor(math.log2(top)), -126) if 0 < top < math.inf else 1.0


def decibels(signal: float, noise: float) -> float:
    """Returns a ratio in dB, within [-300, 300]; -inf if one of the two is not finite."""
    if not math.isfinite(signal) or not math.isfinite(noise):
        return -math.inf
    ratio = signal / noise if noise else (1e30 if signal else 1.0)
    return 10 * math.log10(min(max(ratio, 1e-30), 1e30))
