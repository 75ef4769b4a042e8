"""Quantising a kernel some output channels at a time, so that little beside it is in memory.

Output channels are independent under rounding to nearest. Dimensions: K input and N output channels.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from qdit_jax.quant import QTensor, WeightSpec, dequantize, quantize

# Values a block, 6 MB in float32: six blocks of a DiT-XL's largest kernel, all of one shape.
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

    A format with a factor for the whole tensor is quantised as a whole.

    Raises:
        TypeError, ValueError: see `quantize`.
    """
    blocks = [slice(None)]
    if spec.fmt is None or not spec.fmt.has_tensor_scale:
        blocks = column_blocks(w.shape, spec.channel_group)
    parts = [jax.tree.map(np.asarray, quantize(w[:, block], spec)) for block in blocks]
    if len(parts) == 1:
        return parts[0]
    alike = [dataclasses.replace(part, shape=w.shape) for part in parts]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays, axis=-1), *alike)


def sqnr_db(w: Any, q: QTensor) -> float:
    """Returns the signal-to-quantisation-noise ratio of a kernel `[K, N]` in dB."""
    w, q = np.asarray(w), jax.tree.map(np.asarray, q)
    signal = noise = 0.0
    for columns in column_blocks(w.shape, q.channel_group):
        part = np.asarray(w[:, columns], np.float32)
        # A sum inside of jit would unpack the codes again for every few values.
        error = np.asarray(dequantize(columns_of(q, columns))) - part
        signal, noise = signal + sum_of_squares(part), noise + sum_of_squares(error)
    return 10 * math.log10(max(signal / max(noise, 1e-30), 1e-30))


def sum_of_squares(x: Float[np.ndarray, "K N"]) -> float:
    """Returns the sum of all squares; `x` may be a part of an array and is not copied."""
    return float(np.einsum("kn,kn->k", x, x).sum(dtype=np.float64))


def columns_of(q: QTensor, columns: slice) -> QTensor:
    """Returns the columns of `q`, still packed; the slice ends between channel groups."""
    start, stop = columns.start, columns.stop
    group, zero_point = q.channel_group, q.packed_zero_point
    blocks = slice(start // group, stop // group)
    return dataclasses.replace(
        q,
        codes=q.codes[:, columns],
        scale=q.scale[:, blocks],
        packed_zero_point=None if zero_point is None else zero_point[:, blocks],
        shape=(q.shape[0], stop - start),
    )
