"""The scale of a token, as kernels compute it that quantize their inputs.

Dimensions: M rows (tokens), K input channels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from qdit_jax.quant import ActSpec

MAGNITUDE, INFINITY = 0x7FFFFFFF, 0x7F800000  # bits of float32
LEAST_NORMAL = 2.0**-126


def magnitude_bits(x: Float[Array, "*s"]) -> Int32[Array, "*s"]:
    """Returns whole numbers that are ordered as magnitudes are, NaN above infinity."""
    return jax.lax.bitcast_convert_type(x, jnp.int32) & MAGNITUDE


def divisor_of(high: Float[Array, "*s"], spec: ActSpec) -> Float[Array, "*s"]:
    """Returns what to divide tokens by, given their greatest magnitudes, which are finite."""
    limits = spec.range_fn.limits_from_extremes(-high, high, spec.bits, True)
    scale = spec.range_fn.scale(*limits, spec.bits, True)
    # What hardware flushes to zero has no reciprocal.
    return jnp.where(scale >= LEAST_NORMAL, scale, 1.0)
