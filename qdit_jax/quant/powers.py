"""Powers of errors by polynomials: XLA:CPU calls a scalar routine for a general power."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# Polynomials in the square root of an error: degrees tried, and how near one must come.
_DEGREES = range(4, 17)
_TOLERANCE = 1e-6

# Least-squares polynomials, lowest power first: log2 on [sqrt(1/2), sqrt(2)], 2**x on [-1/2, 1/2].
_LOG2 = np.polynomial.Chebyshev.interpolate(np.log2, 6, [0.5**0.5, 2**0.5])
_EXP2 = np.polynomial.Chebyshev.interpolate(np.exp2, 4, [-0.5, 0.5])


@cache
def root_polynomial(exponent: float, limit: float) -> tuple[float, ...] | None:
    """Returns c with `x**exponent = x * sum c[k] * sqrt(x)**k` nearly, for x in `[0, limit]`.

    In the square root the power is smooth at 0: few terms come within `_TOLERANCE` of it, relative
    to it or to its mean over [0, 1/2], a rounding error's range. None if no degree tried does.
    """
    top = limit**0.5
    root = (1 - np.cos(np.linspace(0, np.pi, 1000))) / 2
    wanted = (top * root) ** (2 * exponent)
    weight = 1 / (wanted + 0.5**exponent / (1 + exponent))
    for degree in _DEGREES:
        columns = root[:, None] ** np.arange(2, degree + 1) * weight[:, None]
        fit = np.linalg.lstsq(columns, wanted * weight)[0]
        if np.abs(columns @ fit - wanted * weight).max() < _TOLERANCE:
            return tuple(float(c) / top**k for k, c in enumerate(fit, 2))
    return None


def by_root(fit: tuple[float, ...], x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Returns the power of x that `fit` from `root_polynomial` stands for."""
    root = jnp.sqrt(x)
    result = jnp.full_like(x, fit[-1])
    for coefficient in fit[-2::-1]:
        result = result * root + np.float32(coefficient)
    return result * x


def power(x: Float[Array, "*s"], exponent: float) -> Float[Array, "*s"]:
    """Returns `x ** exponent` for x >= 0 to about 1e-5 relative, in vector instructions only.

    XLA:CPU calls a scalar routine for a general power, which costs seven times as much.
    The power of 0 is about `2**(-127 * exponent)`, never less than 2**-125.
    """
    if exponent == 1:
        return x
    if exponent == 2:
        return x * x
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    whole = (bits - 0x3F3504F3) >> 23  # exponent of x with the mantissa in [sqrt(1/2), sqrt(2))
    mantissa = jax.lax.bitcast_convert_type(bits - (whole << 23), jnp.float32)
    log2 = _polynomial(_LOG2, mantissa) + whole.astype(jnp.float32)
    log2 = jnp.maximum(log2 * np.float32(exponent), -125.0)
    whole = jnp.round(log2)
    fraction = _polynomial(_EXP2, log2 - whole)
    exponent_bits = whole.astype(jnp.int32) << 23
    return jax.lax.bitcast_convert_type(
        jax.lax.bitcast_convert_type(fraction, jnp.int32) + exponent_bits, jnp.float32
    )


def _polynomial(fit: np.polynomial.Chebyshev, x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    first, *rest = fit.convert(kind=np.polynomial.Polynomial).coef[::-1].astype(np.float32)
    result = jnp.full_like(x, first)
    for coefficient in rest:
        result = result * x + coefficient
    return result
