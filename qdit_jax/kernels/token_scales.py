"""The scale of a token, as kernels compute it that quantize their inputs.

Dimensions: M rows (tokens), K input channels.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Num

from qdit_jax.quant import ActSpec, quotients_to_narrow, rounded_quotients

MAGNITUDE, INFINITY = 0x7FFFFFFF, 0x7F800000  # bits of float32
LEAST_NORMAL = 2.0**-126


def magnitude_bits(x: Float[Array, "*s"]) -> Int32[Array, "*s"]:
    """Returns whole numbers that are ordered as magnitudes are, NaN above infinity."""
    return jax.lax.bitcast_convert_type(x, jnp.int32) & MAGNITUDE


def divisor_of(high: Float[Array, "*s"], spec: ActSpec) -> Float[Array, "*s"]:
    """Returns what to divide tokens by, given their greatest magnitudes, which are finite."""
    if spec.fmt is not None:
        scale = spec.fmt.calibrated_scale(high)
    else:
        limits = spec.range_fn.limits_from_extremes(-high, high, spec.bits, True)
        scale = spec.range_fn.scale(*limits, spec.bits, True)
    # What hardware flushes to zero has no reciprocal.
    return jnp.where(scale >= LEAST_NORMAL, scale, 1.0)


def stored_dtype(spec: ActSpec) -> np.dtype:
    """Returns the dtype of one byte in which kernels hold the elements of inputs: int8, or FP8."""
    found = None if spec.fmt is None else spec.fmt.float8_dtype
    return jnp.dtype(jnp.int8) if found is None else found


def elements_fn(
    divisor: Float[Array, "*divisors"], spec: ActSpec
) -> Callable[[Float[Array, "*s"]], Num[Array, "*s"]]:
    """Returns the function from tokens to their elements, which a cast to `stored_dtype` rounds, if anything.

    Divisors broadcast to the tokens.
    """
    if spec.fmt is not None:
        return quotients_to_narrow(divisor)
    return rounded_quotients(divisor, 2 ** (spec.bits - 1) - 1)
