"""Packed codes unpacked in a TPU's vector memory, four at a time, in words of 32 bits.

A word of a TPU is four neighboring rows of bytes, and codes are stored a row per output channel: they are
transposed first, packed, see `is_turned_inside`. The fields of a byte lie 64, 32 or 16 input channels apart
(`packing`): then 32 rows of bytes are 8 rows of words, each field of which is four whole codes.

Dimensions: K input channels, N output channels, R packed bytes of a channel; C columns of a block.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Int32, UInt8

from qdit_jax.kernels.refs import Ref
from qdit_jax.kernels.tpu_blocks import STRIP, TILE, Sizes
from qdit_jax.quant import QTensor, effective_group_size, num_groups, packing

EACH_BYTE = 0x01010101
SIGNS = -0x7F7F7F80  # 0x80808080 as int32


def padded(values: Array, rows: int, columns: int) -> Array:
    """Returns `[rows, columns]`, with zeros after `values`."""
    more = ((0, rows - values.shape[0]), (0, columns - values.shape[1]))
    return jnp.pad(values, more) if any(after for _, after in more) else values


def whole_codes(q: QTensor, sizes: Sizes, rows: int) -> UInt8[Array, "N R"]:
    """Returns the packed codes of `rows` output channels, with whole tiles of bytes in each plane.

    As they are stored where K is a multiple of 128, with 3, 5 and 7 bits of 256.
    Others are unpacked and packed again in each call.
    """
    codes = q.codes
    if sizes.code_channels != sizes.num_channels:
        loose = packing.unpack(codes, q.bits, sizes.num_channels)
        codes = packing.pack(padded(loose, loose.shape[0], sizes.code_channels), q.bits)
    return padded(codes, rows, codes.shape[1])


def is_turned_inside(num_bytes: int) -> bool:
    """Returns whether codes `[N, R]` are transposed in VMEM, rather than by XLA before the kernel.

    A TPU keeps a matrix of bytes with that axis in its lanes which 128 divides. Where it does not
    divide R, XLA's transpose is no work, and a kernel that wants rows would have them copied.
    """
    return num_bytes % TILE == 0


def groups_of_sub_blocks(channels: int, num_channels: int, group_size: int) -> tuple[int, ...]:
    """Returns the group of every 32 of `channels`, those of padding in the last one."""
    size = effective_group_size(num_channels, group_size)
    last = num_groups(num_channels, group_size) - 1
    return tuple(min(row // size, last) for row in range(0, channels, STRIP))


def code_words(codes: Ref, bits: int, index: int) -> Int32[Array, "8 C"]:
    """Returns the `index`-th 32 rows of codes, four neighboring rows in a word."""
    first, shift, words = 0, 0, []
    for plane in packing.planes(bits):
        words.append(plane_words(codes, first, plane, index) << shift)
        first += codes.shape[0] * plane // bits  # each plane holds all rows, in whole tiles
        shift += plane
    return functools.reduce(jnp.bitwise_or, words)


def plane_words(codes: Ref, first: int, plane: int, index: int) -> Int32[Array, "8 C"]:
    """Returns what the plane of bits from row `first` on has of the `index`-th 32 rows of codes."""
    run, place = divmod(index * STRIP, packing.RUN)
    size = packing.RUN * plane // 8  # rows of bytes of a run, and rows of codes between two fields
    field, row = divmod(place, size)
    row += first + run * size

    def bits_of(words: Int32[Array, "8 C"], field: int) -> Int32[Array, "8 C"]:
        return (words >> (plane * field)) & ((2**plane - 1) * EACH_BYTE)

    if size >= STRIP:
        words = as_rows_of(codes[pl.ds(row, STRIP), :], jnp.int32)
        return words if plane == 8 else bits_of(words, field)
    # A plane of one bit: 16 rows have two fields of a run, and a tile has the bytes of two runs.
    words = as_rows_of(codes[pl.ds(row - row % STRIP, STRIP), :], jnp.int32)
    low, high = bits_of(words, field), bits_of(words, field + 1)
    is_first = jax.lax.broadcasted_iota(jnp.int32, words.shape, 0) < words.shape[0] // 2
    if row % STRIP:
        return jnp.where(is_first, half_turned(low), high)
    return jnp.where(is_first, low, half_turned(high))


def half_turned(words: Int32[Array, "8 C"]) -> Int32[Array, "8 C"]:
    """Returns the two halves of the rows exchanged."""
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.roll(words, words.shape[0] // 2, 0)


def as_rows_of(values: Array, dtype: Any) -> Array:
    """Returns the same bits in `dtype`, four neighboring rows of bytes a row of words."""
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.bitcast(values, dtype)
