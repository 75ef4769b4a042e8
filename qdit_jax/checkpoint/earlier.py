"""Packed kernels as format versions 1 and 2 stored them, brought into today's form as they are read.

Until version 3 a kernel's arrays were `[K, N]`: packed codes `[..., R, N]`, scales, packed zero points
and offsets `[..., G, B]`. In a plane of p bits, a block of 32 * 8/p codes along K took 32 bytes, and field
i of a byte was of the block's i-th 32 codes; the codes after the last whole block were cut into 8/p
parts of equal length. The bytes are as many as today.

Arrays are converted one at a time, on the host, in blocks of output channels.

Dimensions: K input channels, N output channels, G groups, B scales of a group, R packed bytes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from qdit_jax.quant import num_groups, packing

VERSION = 3  # the first with a row of bytes per output channel
TURNED = ("codes", "scale", "packed_zero_point", "offset")
SUB_BLOCK = 32
BLOCK = 1 << 22  # codes that are unpacked at a time


@dataclasses.dataclass(frozen=True)
class Change:
    """What an array of the earlier form needs beside the exchange of its last two axes.

    Attributes:
        bits: of the codes that it packs; None if it packs none.
        num_codes: how many a column holds.
    """

    bits: int | None = None
    num_codes: int = 0

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape in the file of an array that has `shape` today."""
        return turned_shape(shape)

    def apply(self, array: np.ndarray) -> np.ndarray:
        """Returns the array in today's form."""
        if self.bits is None:
            return np.ascontiguousarray(np.swapaxes(array, -1, -2))
        *lead, _, width = array.shape
        size = packing.packed_bytes(self.num_codes, self.bits)
        packed = np.empty((*lead, width, size), np.uint8)
        step = max(BLOCK // (self.num_codes * math.prod(lead)), 1)
        for start in range(0, width, step):
            codes = unpacked(array[..., start : start + step], self.bits, self.num_codes)
            turned = np.ascontiguousarray(np.swapaxes(codes, -1, -2))
            packed[..., start : start + step, :] = packing.pack(turned, self.bits)
        return packed


def changes(description: Mapping[str, Any]) -> dict[str, Change]:
    """Returns what the arrays of a checked description need, by name; those of today's form nothing."""
    found: dict[str, Change] = {}
    if description["format_version"] >= VERSION:
        return found
    for path, leaf in description["params"].items():
        if leaf["type"] != "QTensor":
            continue
        num_channels, bits = leaf["shape"][0], leaf["bits"]
        packs = {
            "codes": Change(bits, num_channels),
            "packed_zero_point": Change(bits, num_groups(num_channels, leaf["group_size"])),
        }
        for name in (name for name in leaf["arrays"] if name in TURNED):
            found[f"{path}/{name}"] = packs.get(name, Change())
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
    turned = {
        name: {**array, "shape": list(turned_shape(array["shape"]))}
        for name, array in arrays.items()
        if name in TURNED and isinstance(array, Mapping) and isinstance(array.get("shape"), list)
    }
    return {**leaf, "arrays": {**arrays, **turned}}


def turned_shape(shape: Any) -> tuple[int, ...]:
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
