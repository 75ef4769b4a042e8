"""Packed kernels as format versions 1 and 2 stored them, brought into today's form as they are read.

Until version 3 codes were a column of bytes per output channel, `[..., R, N]`. In a plane of p bits, a
block of 32 * 8/p codes along K took 32 bytes, and field i of a byte was of the block's i-th 32 codes; the
codes after the last whole block were cut into 8/p parts of equal length. Zero points were packed along G
in the same way. The bytes are as many as today, and all other arrays are the same.

Arrays are converted one at a time, on the host, in blocks of output channels.

Dimensions: K input channels, N output channels, G groups, B scales of a group, R packed bytes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from qdit_jax.quant import num_groups, packing

VERSION = 3  # the first with a row of bytes per output channel
SUB_BLOCK = 32
BLOCK = 1 << 22  # codes that are unpacked at a time


@dataclasses.dataclass(frozen=True)
class Change:
    """What a packed array of the earlier form needs.

    Attributes:
        bits: of a code.
        num_codes: how many a column holds.
        by_row: whether a column becomes a row.
    """

    bits: int
    num_codes: int
    by_row: bool

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape in the file of an array that has `shape` today."""
        return turned_shape(shape) if self.by_row else shape

    def apply(self, array: UInt8[np.ndarray, "*lead R N"]) -> UInt8[np.ndarray, "..."]:
        """Returns the array in today's form."""
        *lead, size, width = array.shape
        rows = np.empty((*lead, width, size), np.uint8)
        step = max(BLOCK // (self.num_codes * math.prod(lead)), 1)
        for start in range(0, width, step):
            codes = unpacked(array[..., start : start + step], self.bits, self.num_codes)
            turned = np.ascontiguousarray(np.swapaxes(codes, -1, -2))
            rows[..., start : start + step, :] = packing.pack(turned, self.bits)
        return rows if self.by_row else np.ascontiguousarray(np.swapaxes(rows, -1, -2))


def changes(description: Mapping[str, Any]) -> dict[str, Change]:
    """Returns what the arrays of a checked description need, by name; those of today's form nothing."""
    found: dict[str, Change] = {}
    if description["format_version"] >= VERSION:
        return found
    for path, leaf in description["params"].items():
        if leaf["type"] != "QTensor":
            continue
        num_channels, bits = leaf["shape"][0], leaf["bits"]
        found[f"{path}/codes"] = Change(bits, num_channels, True)
        if "packed_zero_point" in leaf["arrays"]:
            count = num_groups(num_channels, leaf["group_size"])
            found[f"{path}/packed_zero_point"] = Change(bits, count, False)
    return found


def as_today(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the manifest of an earlier version with the shapes that its arrays have once read."""
    return {path: leaf_as_today(leaf) for path, leaf in manifest.items()}


def leaf_as_today(leaf: Any) -> Any:
    # What is damaged stays so, and is reported where manifests are checked.
    if not isinstance(leaf, Mapping) or leaf.get("type") != "QTensor":
        return leaf
    arrays = leaf.get("arrays")
    if not isinstance(arrays, Mapping):
        return leaf
    codes = arrays.get("codes")
    if not isinstance(codes, Mapping) or not isinstance(codes.get("shape"), list):
        return leaf
    turned = {**codes, "shape": list(turned_shape(codes["shape"]))}
    return {**leaf, "arrays": {**arrays, "codes": turned}}


def turned_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Returns a shape with its last two axes exchanged."""
    return (*shape[:-2], *shape[-2:][::-1])


def as_stored(
    target: Mapping[str, jax.ShapeDtypeStruct], needed: Mapping[str, Change]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the abstract arrays, by name, as the files hold them; those to be converted on the host."""
    return {
        name: jax.ShapeDtypeStruct(needed[name].stored_shape(leaf.shape), leaf.dtype)
        if name in needed
        else leaf
        for name, leaf in target.items()
    }


def unpacked(packed: UInt8[np.ndarray, "*lead R N"], bits: int, num_codes: int) -> np.ndarray:
    """Returns the codes `[..., K, N]` of the earlier packing."""
    codes = np.zeros((*packed.shape[:-2], num_codes, packed.shape[-1]), np.uint8)
    start, shift = 0, 0
    for plane in packing.planes(bits):
        fields, stop = 8 // plane, start + packing.plane_bytes(num_codes, plane)
        block, first = SUB_BLOCK * fields, 0
        while first < num_codes:
            whole = num_codes - first >= block
            length = SUB_BLOCK if whole else stop - start
            held = packed[..., start : start + length, :]
            for field in range(fields):
                row = first + field * length
                rows = codes[..., row : row + length, :]
                rows |= (
                    (held[..., : rows.shape[-2], :] >> (plane * field)) & (2**plane - 1)
                ) << shift
            start, first = start + length, first + (block if whole else num_codes)
        start, shift = stop, shift + plane
    return codes
