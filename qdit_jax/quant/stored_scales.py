"""Scales as they are stored: rounded up to 16 bits, with the whole range of float32.

A scale is positive, so the negative bit patterns of float16 are free. With these and the subnormal
patterns it holds the scales outside its normal range too, those of very small or large weights:

- `[2**-14, 65504]`: the number itself;
- `[2**-29, 2**-14)`: the subnormal patterns 64 to 1023 count numbers of six mantissa bits upwards,
  so that none, read as a number, is less than the scale it stands for;
- all others: the negative normal patterns count numbers of seven mantissa bits upwards.

Rounding up makes a step at most 1.6 % wider there. Only whole numbers are computed with: subnormals
are never operands, which XLA may flush to zero. bfloat16 has float32's range as it is.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Int

# Bits of float32: smallest and greatest number that can be stored, and where patterns change.
_LEAST, _GREATEST = 0x00800000, 0x7F7F0000
_NORMAL, _BEYOND_NORMAL = 113 << 23, 143 << 23  # 2**-14, 2**16
_SUBNORMAL = 98 << 23  # 2**-29
_FIRST_SUBNORMAL, _FIRST_NORMAL, _FIRST_NEGATIVE = 64, 0x0400, 0x8400
# Numbers of seven mantissa bits below float16's normal range, and inside it.
_BELOW, _INSIDE = (_NORMAL - _LEAST) >> 16, (_BEYOND_NORMAL - _NORMAL) >> 16


def stored_scale(scale: Float[Array, "*s"], dtype: str) -> Float[Array, "*s"]:
    """Returns `scale` as stored in `dtype`, rounded up, so that the codes reach the whole range.

    Read it with `scale_value`: as a float16 number it is the scale only where that is in
    `[2**-14, 65504]`. NaN and infinity stay what they are.
    """
    if dtype == "float32":
        return scale
    bits = jax.lax.bitcast_convert_type(scale, jnp.int32)
    if dtype == "bfloat16":
        pattern = _ceil(jnp.clip(bits, _LEAST, _GREATEST), 7) >> 16
    else:
        pattern = _float16_pattern(jnp.clip(bits, _LEAST, _GREATEST))
    special = jnp.where(jnp.isnan(scale), _pattern_of(np.nan, dtype), _pattern_of(np.inf, dtype))
    pattern = jnp.where(jnp.isfinite(scale), pattern, special).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(pattern, jnp.dtype(dtype))


def scale_value(stored: Float[Any, "*s"]) -> Float[Array, "*s"]:
    """Returns the scales, float32, that `stored_scale` stored."""
    stored = jnp.asarray(stored)
    if stored.dtype != jnp.float16:
        return stored.astype(jnp.float32)
    pattern = jax.lax.bitcast_convert_type(stored, jnp.uint16).astype(jnp.int32)
    small = ((pattern - _FIRST_SUBNORMAL) << 17) + _SUBNORMAL
    number = pattern - _FIRST_NEGATIVE
    other = (jnp.where(number < _BELOW, number, number + _INSIDE) << 16) + _LEAST
    is_small = (pattern >= _FIRST_SUBNORMAL) & (pattern < _FIRST_NORMAL)
    is_other = (pattern >= _FIRST_NEGATIVE) & (pattern < 0xFC00)
    value = jax.lax.bitcast_convert_type(jnp.where(is_small, small, other), jnp.float32)
    return jnp.where(is_small | is_other, value, stored.astype(jnp.float32))


def rounded_up(scale: Float[Array, "*s"], num_bits: int) -> Float[Array, "*s"]:
    """Returns positive finite scales rounded up to `num_bits` bits of mantissa; never subnormal."""
    bits = jax.lax.bitcast_convert_type(scale, jnp.int32)
    return jax.lax.bitcast_convert_type(
        _ceil(jnp.clip(bits, _LEAST, _GREATEST), num_bits), jnp.float32
    )


def _float16_pattern(bits: Int[Array, "*s"]) -> Int[Array, "*s"]:
    """Returns the float16 patterns of positive float32 numbers, given by their bits."""
    plain = _ceil(bits, 10)
    small = _ceil(bits, 6)
    other = (_ceil(bits, 7) - _LEAST) >> 16
    other = jnp.where(bits < _NORMAL, other, other - _INSIDE) + _FIRST_NEGATIVE
    is_plain = (plain >= _NORMAL) & (plain < _BEYOND_NORMAL)
    is_small = (bits >= _SUBNORMAL) & (small < _NORMAL)
    small = ((small - _SUBNORMAL) >> 17) + _FIRST_SUBNORMAL
    plain = ((plain - _NORMAL) >> 13) + _FIRST_NORMAL
    # Just below 2**-14, where rounding up to six bits leaves the small numbers.
    edge = (bits >= _SUBNORMAL) & (bits < _NORMAL)
    return jnp.where(
        is_plain, plain, jnp.where(is_small, small, jnp.where(edge, _FIRST_NORMAL, other))
    )


def _ceil(bits: Int[Array, "*s"], num_bits: int) -> Int[Array, "*s"]:
    """Returns the bits of positive float32 numbers rounded up to `num_bits` bits of mantissa."""
    rest = (1 << (23 - num_bits)) - 1
    return (bits + rest) & ~rest


def _pattern_of(number: float, dtype: str) -> int:
    kind = np.float16 if dtype == "float16" else ml_dtypes.bfloat16
    return int(np.array(number, kind).view(np.uint16))
