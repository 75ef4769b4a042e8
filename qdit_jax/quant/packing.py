"""Codes of 2 to 8 bits, packed into bytes along K.

A code is cut into planes of 8, 4, 2 or 1 bits (3 = 2+1, 5 = 4+1, 6 = 4+2, 7 = 4+2+1; the low
bits come first). In a plane of p bits, one byte holds 8/p codes, its fields. A block of 32 * 8/p
rows of codes becomes 32 rows of bytes: sub-block i, 32 neighboring rows of K, is field i of each
byte, bits `p*i` to `p*i + p - 1`. The fields of a byte thus lie 32 rows apart, and each field of 32
rows of bytes unpacks to one int8 tile. Rows after the last full block are cut into 8/p equal
sub-blocks, so a plane takes `ceil(K*p/8)` rows of bytes, without padding to whole blocks.

Dimensions: K rows of codes, R rows of bytes, N columns, F fields of a byte, S rows of a sub-block.
"""

from __future__ import annotations

import operator
from functools import reduce

import jax.numpy as jnp
from jaxtyping import Array, Integer, UInt8

SUB_BLOCK = 32
_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def planes(bits: int) -> tuple[int, ...]:
    """Returns the widths of the bit planes of a code, low bits first."""
    if bits not in _PLANES:
        raise ValueError(f"bits={bits} cannot be packed; use 2 to 8.")
    return _PLANES[bits]


def plane_rows(num_rows: int, plane: int) -> int:
    """Returns the rows of bytes that one plane of `num_rows` codes takes."""
    return -(-num_rows * plane // 8)


def packed_rows(num_rows: int, bits: int) -> int:
    """Returns the rows of bytes that `num_rows` rows of codes take."""
    return sum(plane_rows(num_rows, plane) for plane in planes(bits))


def pack(codes: Integer[Array, "*lead K N"], bits: int) -> UInt8[Array, "*lead R N"]:
    """Returns codes in `[0, 2**bits - 1]` packed along their last axis but one."""
    codes = codes.astype(jnp.uint8)
    packed, shift = [], 0
    for plane in planes(bits):
        packed.append(_pack_plane((codes >> shift) & ((1 << plane) - 1), plane))
        shift += plane
    return jnp.concatenate(packed, axis=-2)


def unpack(
    packed: UInt8[Array, "*lead R N"], bits: int, num_rows: int
) -> UInt8[Array, "*lead K N"]:
    """Returns the `num_rows` rows of codes that `pack` packed."""
    parts, row, shift = [], 0, 0
    for plane in planes(bits):
        rows = plane_rows(num_rows, plane)
        parts.append(_unpack_plane(packed[..., row : row + rows, :], plane, num_rows) << shift)
        row, shift = row + rows, shift + plane
    return reduce(operator.or_, parts)


def _split(num_rows: int, plane: int) -> tuple[int, int, int]:
    """Returns (full blocks, rows of a full block, rows of a tail's sub-block)."""
    block = SUB_BLOCK * 8 // plane  # rows of codes
    full = num_rows // block
    return full, block, plane_rows(num_rows - full * block, plane)


def _pack_plane(codes: UInt8[Array, "*lead K N"], plane: int) -> UInt8[Array, "*lead R N"]:
    fields = 8 // plane
    if fields == 1:
        return codes
    *lead, num_rows, width = codes.shape
    full, block, tail = _split(num_rows, plane)
    # Less than 8 / plane rows: the tail is cut into sub-blocks of equal length.
    pad = [(0, 0)] * len(lead) + [(0, full * block + fields * tail - num_rows), (0, 0)]
    codes = jnp.pad(codes, pad)
    head = codes[..., : full * block, :].reshape(*lead, full, fields, SUB_BLOCK, width)
    rest = codes[..., full * block :, :].reshape(*lead, 1, fields, tail, width)  # one short block
    joined = [_join(part, plane) for part in (head, rest)]  # [..., blocks, S, N]
    return jnp.concatenate([part.reshape(*lead, -1, width) for part in joined], axis=-2)


def _join(fields: UInt8[Array, "*lead F S N"], plane: int) -> UInt8[Array, "*lead S N"]:
    """Returns bytes with field i in bits `plane * i` and up."""
    result = fields[..., 0, :, :]
    for i in range(1, 8 // plane):
        result = result | (fields[..., i, :, :] << (plane * i))
    return result


def _unpack_plane(
    packed: UInt8[Array, "*lead R N"], plane: int, num_rows: int
) -> UInt8[Array, "*lead K N"]:
    fields = 8 // plane
    if fields == 1:
        return packed
    *lead, _, width = packed.shape
    full, _, tail = _split(num_rows, plane)
    head = packed[..., : full * SUB_BLOCK, :].reshape(*lead, full, SUB_BLOCK, width)
    rest = packed[..., full * SUB_BLOCK :, :].reshape(*lead, 1, tail, width)
    parts = [  # [..., blocks, F, S, N]
        jnp.stack([(part >> (plane * i)) & ((1 << plane) - 1) for i in range(fields)], axis=-3)
        for part in (head, rest)
    ]
    rows = [part.reshape(*lead, -1, width) for part in parts]
    return jnp.concatenate(rows, axis=-2)[..., :num_rows, :]  # without the tail's padding
