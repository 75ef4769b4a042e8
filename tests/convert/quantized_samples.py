"""Files of quantized weights made from the formats' descriptions, in NumPy alone.

Every function returns the tensors of one layer by what stands after its name, and the weight that they
stand for, float64 `[N, K]` in the layer's own coordinates (rotated blocks turned back).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
Made = tuple[dict[str, np.ndarray], np.ndarray]


def regular(size: int) -> np.ndarray:
    """Returns the regular Hadamard matrix of a power of 4, orthogonal."""
    first = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron(matrix, first)
    return matrix / np.sqrt(size)


def turned(rows: np.ndarray, size: int) -> np.ndarray:
    """Returns rows with blocks of `size` columns rotated; 0 leaves them."""
    if not size:
        return rows
    return (rows.reshape(len(rows), -1, size) @ regular(size)).reshape(rows.shape)


def marker(**settings: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(settings).encode(), np.uint8)


def int8(w: np.ndarray, size: int = 0, per_row: bool = True) -> Made:
    """Returns a layer in `int8_tensorwise`; `size` is that of the marker's blocks."""
    blocks = size if size and w.shape[1] % size == 0 else 0
    rotated = turned(w.astype(np.float64), blocks)
    absmax = np.abs(rotated).max(axis=1, keepdims=True) if per_row else np.abs(rotated).max()
    scale = np.maximum(absmax / 127, 1e-30).astype(np.float32)
    codes = np.clip(np.rint(rotated / scale), -128, 127).astype(np.int8)
    settings: dict[str, Any] = {"format": "int8_tensorwise", "per_row": per_row}
    settings |= {"convrot": True, "convrot_groupsize": size} if size else {}
    parts = {"weight": codes, "weight_scale": scale, "comfy_quant": marker(**settings)}
    return parts, turned(codes * scale.astype(np.float64), blocks)


def int4(w: np.ndarray, size: int) -> Made:
    """Returns a layer in `convrot_w4a4`."""
    rotated = turned(w.astype(np.float64), size)
    scale = (np.abs(rotated).max(axis=1, keepdims=True) / 7).astype(np.float32)
    codes = np.clip(np.rint(rotated / scale), -7, 7).astype(np.int8)
    nibble = codes.view(np.uint8) & 15
    settings = {"convrot_groupsize": size, "quant_group_size": 64, "linear_dtype": "int4"}
    parts = {
        "weight": (nibble[:, ::2] | nibble[:, 1::2] << 4).view(np.int8),
        "weight_scale": scale.reshape(-1),
        "comfy_quant": marker(format="convrot_w4a4", **settings),
    }
    return parts, turned(codes * scale.astype(np.float64), size)


def mxfp8(w: np.ndarray) -> Made:
    """Returns a layer in `mxfp8`: a power of two for 32 input channels, its exponents in tiles."""
    rows, columns = w.shape
    groups = w.astype(np.float64).reshape(rows, -1, 32)
    exponent = np.ceil(np.log2(np.abs(groups).max(axis=2) / 448)).astype(int)
    values = (groups / 2.0 ** exponent[..., None]).astype(np.float32).astype(E4M3)
    parts = {
        "weight": values.reshape(rows, columns),
        "weight_scale": tiled((exponent + 127).astype(np.uint8)),
        "comfy_quant": marker(format="mxfp8"),
    }
    return parts, (values.astype(np.float64) * 2.0 ** exponent[..., None]).reshape(rows, columns)


def tiled(table: np.ndarray) -> np.ndarray:
    """Returns a table of block scales in tiles of 128 rows and 4 columns, padded, number by number."""
    rows, columns = table.shape
    padded = np.zeros((-(-rows // 128) * 128, -(-columns // 4) * 4), table.dtype)
    padded[:rows, :columns] = table
    found = np.zeros_like(padded).reshape(-1)
    tiles_across = padded.shape[1] // 4
    for r in range(padded.shape[0]):
        for c in range(padded.shape[1]):
            tile = (r // 128) * tiles_across + c // 4
            found[tile * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4] = padded[r, c]
    return found.reshape(padded.shape)


def float8(w: np.ndarray, dtype: type = E4M3, **settings: Any) -> Made:
    """Returns a layer in `float8_e4m3fn` or `float8_e5m2`."""
    info = ml_dtypes.finfo(dtype)
    scale = np.float32(np.abs(w).max() / float(info.max))
    values = (w / scale).astype(np.float32).astype(dtype)
    name = {"format": np.dtype(dtype).name, **settings}
    parts = {"weight": values, "weight_scale": np.array(scale), "comfy_quant": marker(**name)}
    return parts, values.astype(np.float64) * np.float64(scale)


def nvfp4(w: np.ndarray) -> Made:
    """Returns a layer in `nvfp4`."""
    rows, columns = w.shape
    groups = w.astype(np.float64).reshape(rows, -1, 16)
    factor = np.float32(np.abs(w).max() / (448 * 6))
    scale = (np.abs(groups).max(axis=2) / 6 / factor).astype(np.float32).astype(E4M3)
    step = scale.astype(np.float64)[..., None] * np.float64(factor)
    codes = np.abs(groups[..., None] / step[..., None] - FP4).argmin(axis=-1).reshape(rows, columns)
    packed = (codes[:, ::2] << 4 | codes[:, 1::2]).astype(np.uint8)
    parts = {
        "weight": packed,
        "weight_scale": tiled(scale),
        "weight_scale_2": np.array(factor),
        "comfy_quant": marker(format="nvfp4"),
    }
    return parts, (FP4[codes].reshape(groups.shape) * step).reshape(rows, columns)


def lut(w: np.ndarray, size: int = 256, codebook: np.ndarray | None = None) -> Made:
    """Returns a layer in `asym_w4a8_int8`: codes are whatever they are, the levels are what counts."""
    rows, columns = w.shape
    table = np.linspace(-1, 1, 16) ** 3 if codebook is None else codebook
    table = table.astype(np.float32)
    groups = turned(w.astype(np.float64), size).reshape(rows, -1, 16)
    channel = (np.abs(groups).max(axis=(1, 2)) / 127).astype(np.float32)
    peak = np.abs(groups).max(axis=2) / channel[:, None]
    rel = peak.astype(np.float32).astype(E4M3)
    product = table[None, None] * rel.astype(np.float32)[..., None]
    levels = np.clip(np.rint(product), -127, 127).astype(np.float64)  # [N, G, 16]
    targets = groups / channel[:, None, None]
    codes = np.abs(targets[..., None] - levels[:, :, None]).argmin(axis=-1)
    chosen = np.take_along_axis(levels, codes, axis=2) * channel.astype(np.float64)[:, None, None]
    codes = codes.reshape(rows, columns)
    parts = {
        "weight": (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8).view(np.int8),
        "weight_s_rel": rel,
        "weight_s_channel": channel,
        "weight_codebook": table,
        "comfy_quant": marker(
            format="asym_w4a8_int8", group_size=16, convrot=True, convrot_groupsize=size
        ),
    }
    return parts, turned(chosen.reshape(rows, columns), size)


def with_layers(
    arrays: dict[str, np.ndarray], layers: dict[str, dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Returns a file's arrays with the tensors of some layers in place of their weights."""
    found = {k: v for k, v in arrays.items() if k.removesuffix(".weight") not in layers}
    for name, parts in layers.items():
        found |= {f"{name}.{part}": np.ascontiguousarray(a) for part, a in parts.items()}
    return found


def write(path: Path, arrays: dict[str, np.ndarray], metadata: Any = None) -> Path:
    """Writes a safetensors file; `metadata` is what `_quantization_metadata` holds."""
    said = None if metadata is None else {"_quantization_metadata": json.dumps(metadata)}
    save_file(arrays, path, metadata=said)
    return path
