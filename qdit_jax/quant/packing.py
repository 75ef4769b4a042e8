"""Codes of 2 to 8 bits, packed into bytes along their last axis, K.

A code is cut into planes of 8, 4, 2 or 1 bits (3 = 2+1, 5 = 4+1, 6 = 4+2, 7 = 4+2+1; the low
bits come first); the bytes of a plane follow those of the plane before. In a plane of p bits, one byte
holds F = 8/p codes, its fields: field i is in bits `p*i` to `p*i + p - 1`.

K is cut into runs of 128 codes, or of 32 where 128 does not divide it. A run of L codes takes L/F
bytes of a plane: byte j holds the codes j, j + L/F, j + 2*L/F, ... of the run. With 4 bits and
128 codes these are j and j + 64. So each field of four neighboring bytes is four neighboring codes,
and a kernel unpacks four at a time in a word of 32 bits. The codes after the last whole run are a
shorter one, whose `ceil(rest/F)` bytes hold codes that far apart. A plane thus takes `ceil(K*p/8)`
bytes, without padding to whole runs.

Dimensions: K codes, R bytes, F fields of a byte, S bytes of a run.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Integer, UInt8

from qdit_jax.types import AnyArray

RUN, SHORT_RUN = 128, 32
_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def planes(bits: int) -> tuple[int, ...]:
    """Returns the widths of the bit planes of a code, low bits first."""
    if bits not in _PLANES:
        raise ValueError(f"bits={bits} cannot be packed; use 2 to 8.")
    return _PLANES[bits]


def run_length(num_codes: int) -> int:
    """Returns the codes of a run of `num_codes`."""
    return SHORT_RUN if num_codes % RUN else RUN


def plane_bytes(num_codes: int, plane: int) -> int:
    """Returns the bytes that one plane of `num_codes` codes takes."""
    return -(-num_codes * plane // 8)


def packed_bytes(num_codes: int, bits: int) -> int:
    """Returns the bytes that `num_codes` codes take."""
    return sum(plane_bytes(num_codes, plane) for plane in planes(bits))


def pack(codes: Integer[AnyArray, "*lead K"], bits: int) -> UInt8[AnyArray, "*lead R"]:
    """Returns codes in `[0, 2**bits - 1]` packed along their last axis; of NumPy, in NumPy."""
    codes = codes.astype(np.uint8)
    packed, shift = [], 0
    for plane in planes(bits):
        packed.append(_pack_plane((codes >> shift) & ((1 << plane) - 1), plane))
        shift += plane
    xp = np if isinstance(codes, np.ndarray) else jnp
    return xp.concatenate(packed, axis=-1)


def unpack(
    packed: UInt8[AnyArray, "*lead R"], bits: int, num_codes: int
) -> UInt8[AnyArray, "*lead K"]:
    """Returns the `num_codes` codes that `pack` packed; of NumPy, in NumPy."""
    run = run_length(num_codes)
    parts = [
        _unpack_plane(
            packed[..., start : start + plane_bytes(num_codes, plane)], plane, num_codes, run
        )
        << shift
        for plane, start, shift in _placed_planes(bits, num_codes)
    ]
    return reduce(operator.or_, parts)


def can_slice(num_codes: int, length: int) -> bool:
    """Returns whether `unpack_slice` takes neighboring slices of `length` of `num_codes` codes."""
    run = run_length(num_codes)
    return num_codes % run == 0 and (length % run == 0 or run % length == 0)


def unpack_slice(
    packed: UInt8[Array, "*lead R"],
    bits: int,
    num_codes: int,
    start: Int[AnyArray, ""],
    length: int,
) -> UInt8[Array, "*lead L"]:
    """Returns `length` of the codes from `start` on, a multiple of `length` that may be traced.

    Only the bytes of the runs that hold them are read. See `can_slice`.
    """
    run = run_length(num_codes)
    covered = max(run, length)  # whole runs
    first = start // covered * covered
    parts = []
    for plane, at, shift in _placed_planes(bits, num_codes):
        held = _dynamic_slice(packed, at + first // 8 * plane, covered // 8 * plane)
        parts.append(_unpack_plane(held, plane, covered, run) << shift)
    codes = reduce(operator.or_, parts)
    return codes if covered == length else _dynamic_slice(codes, start - first, length)


def _dynamic_slice(values: Array, start: Int[AnyArray, ""], length: int) -> Array:
    # Never negative: no code for indices from the end.
    return jax.lax.dynamic_slice_in_dim(values, start, length, -1, allow_negative_indices=False)


def _placed_planes(bits: int, num_codes: int) -> Iterator[tuple[int, int, int]]:
    """Yields (bits, first byte, bits of the planes before) of every plane."""
    start, shift = 0, 0
    for plane in planes(bits):
        yield plane, start, shift
        start, shift = start + plane_bytes(num_codes, plane), shift + plane


def _pack_plane(codes: UInt8[AnyArray, "*lead K"], plane: int) -> UInt8[AnyArray, "*lead R"]:
    fields = 8 // plane
    if fields == 1:
        return codes
    *lead, num_codes = codes.shape
    run = run_length(num_codes)
    whole = num_codes - num_codes % run
    head = _join(codes[..., :whole].reshape(*lead, -1, fields, run // fields), plane)
    head = head.reshape(*lead, whole // fields)
    if whole == num_codes:
        return head
    xp = np if isinstance(codes, np.ndarray) else jnp
    rest = plane_bytes(num_codes - whole, plane)
    pad = [(0, 0)] * len(lead) + [(0, whole + fields * rest - num_codes)]
    tail = _join(xp.pad(codes[..., whole:], pad).reshape(*lead, fields, rest), plane)
    return xp.concatenate([head, tail], axis=-1)


def _join(fields: UInt8[AnyArray, "*lead F S"], plane: int) -> UInt8[AnyArray, "*lead S"]:
    """Returns bytes with field i in bits `plane * i` and up."""
    parts = [fields[..., i, :] << (plane * i) for i in range(8 // plane)]
    return reduce(operator.or_, parts)


def _unpack_plane(
    packed: UInt8[AnyArray, "*lead R"], plane: int, num_codes: int, run: int
) -> UInt8[AnyArray, "*lead K"]:
    fields = 8 // plane
    if fields == 1:
        return packed
    xp = np if isinstance(packed, np.ndarray) else jnp

    def split(part: UInt8[AnyArray, "*lead S"]) -> UInt8[AnyArray, "*lead F S"]:
        mask = (1 << plane) - 1
        return xp.stack([(part >> (plane * i)) & mask for i in range(fields)], axis=-2)

    *lead, _ = packed.shape
    whole = num_codes - num_codes % run
    head = packed[..., : whole // fields].reshape(*lead, whole // run, run // fields)
    codes = split(head).reshape(*lead, whole)
    if whole == num_codes:
        return codes
    tail = split(packed[..., whole // fields :]).reshape(*lead, -1)
    return xp.concatenate([codes, tail], axis=-1)[..., :num_codes]  # without the tail's padding
