"""Four weights at a time: packed codes become int8 levels in words of 32 bits.

Tensor cores take int8, and a GPU has no arithmetic of single bytes. So four neighboring codes share a word:
`(codes * step + offset) ^ 128` in each byte is one multiply-add and one exclusive or of words, for nothing
leaves its byte: 0 <= code * step + offset <= 255 (`quant.levels`).

Dimensions: N output channels, W words of four bytes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

EACH_BYTE = 0x01010101
FIELDS = 0x0F0F0F0F  # the low code of each byte of two
SIGNS = np.int32(-0x7F7F7F80)  # 0x80808080
BITS = (4, 8)  # of the codes that are unpacked here


def code_words(words: Int32[Array, "N W"], bits: int, half: int) -> Int32[Array, "N W"]:
    """Returns the codes of one half of a run, a byte each.

    A byte of 4 bits holds the codes j and j + 64 of a run of 128, one in each `half`; a byte of 8 bits is a
    code, and `words` are those of the half.
    """
    if bits == 8:
        return words
    return (words >> (4 * half)) & FIELDS


def level_words(
    codes: Int32[Array, "N W"], step: Int32[Array, "N #W"], offset: Int32[Array, "N #W"]
) -> Int32[Array, "N W"]:
    """Returns the int8 levels of codes, a byte each; `step` and `offset` are 0 to 255."""
    return (codes * step + offset * EACH_BYTE) ^ SIGNS


def centered_words(codes: Int32[Array, "N W"], offset: Int32[Array, "N #W"]) -> Int32[Array, "N W"]:
    """Returns the int8 `code + offset - 128`, a byte each; no sum may exceed 255."""
    return (codes + offset * EACH_BYTE) ^ SIGNS


def symmetric_level_words(codes: Int32[Array, "N W"], bits: int) -> Int32[Array, "N W"]:
    """Returns `code - 2**(bits - 1)` of symmetric codes, a byte each."""
    moved = codes if bits == 8 else codes + np.int32((128 - 2 ** (bits - 1)) * EACH_BYTE)
    return moved ^ SIGNS


def bytes_of(words: Int32[Array, "N W"]) -> Array:
    """Returns the int8 `[N, 4 W]` of words, as the interpreter's memory holds them."""
    loose = jax.lax.bitcast_convert_type(words, jnp.int8)
    return loose.reshape(words.shape[0], -1)


def words_of(values: Array) -> Int32[Array, "N W"]:
    """Returns the words `[N, W]` of bytes `[N, 4 W]`."""
    return jax.lax.bitcast_convert_type(values.reshape(values.shape[0], -1, 4), jnp.int32)
