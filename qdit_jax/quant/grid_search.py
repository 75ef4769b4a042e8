"""The clipping-ratio search behind the MSE range rules, vectorised and in bounded memory.

Dimensions: P ratios tried, S members of a group, M groups (all that share nothing), B a block
of groups searched together.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# Groups searched together: [P, BLOCK] scores and their grids stay in the cache of one core.
BLOCK = 4608
_UNROLL = 4

# Least-squares polynomials, lowest power first: log2 on [sqrt(1/2), sqrt(2)], 2**x on [-1/2, 1/2].
_LOG2 = np.polynomial.Chebyshev.interpolate(np.log2, 6, [0.5**0.5, 2**0.5])
_EXP2 = np.polynomial.Chebyshev.interpolate(np.exp2, 4, [-0.5, 0.5])


def best_ratio(
    x: Float[Array, "S ..."],
    low: Float[Array, "*m"],
    high: Float[Array, "*m"],
    rule: Any,
    *,
    bits: int,
    symmetric: bool,
) -> Float[Array, "*m"]:
    """Returns the ratio r whose grid on `[r * low, r * high]` has the least error for each group.

    `rule` names the grid (`num_points`, `max_shrink`), the `norm` and the `scale` rule. Of equal
    scores the first (widest) wins. Memory beyond `x` and its transpose: a few times
    `num_points * BLOCK` floats.
    """
    _, *lead = x.shape
    count = int(np.prod(lead))
    block = min(BLOCK, count)
    pad = -count % block
    ratios = jnp.asarray(grid_of(rule), jnp.float32)[:, None]

    def blocks(values: Any) -> Any:
        rows = values.reshape(-1, count)
        rows = jnp.pad(rows, ((0, 0), (0, pad)), mode="edge")
        return jnp.swapaxes(rows.reshape(rows.shape[0], -1, block), 0, 1)

    def search(args: Any) -> Any:
        members, low_, high_ = args
        score = _score(members, low_[0] * ratios, high_[0] * ratios, rule, bits, symmetric)
        return ratios[jnp.argmin(score, axis=0), 0]

    args = (blocks(x.astype(jnp.float32)), blocks(low), blocks(high))
    return jax.lax.map(search, args).reshape(-1)[:count].reshape(lead)


def grid_of(rule: Any) -> np.ndarray:
    """Returns the ratios that a rule tries, widest first, in float64."""
    return 1 - np.arange(rule.num_points) * (rule.max_shrink / rule.num_points)


def _score(
    x: Float[Array, "S B"],
    low: Float[Array, "P B"],
    high: Float[Array, "P B"],
    rule: Any,
    bits: int,
    symmetric: bool,
) -> Float[Array, "P B"]:
    """Returns sum |error|**norm; errors are measured in steps and scaled at the end."""
    scale = rule.scale(low, high, bits, symmetric)
    if symmetric:
        first = jnp.full_like(scale, -(2.0 ** (bits - 1)))
        last = jnp.full_like(scale, 2.0 ** (bits - 1) - 1)
    else:
        first = -jnp.clip(jnp.round(-low / scale), 0, 2**bits - 1)
        last = first + (2**bits - 1)
    per_unit = 1 / scale

    def add(score: Any, row: Any) -> Any:
        steps = row * per_unit
        error = jnp.abs(steps - jnp.clip(jnp.round(steps), first, last))
        return score + power(error, rule.norm)

    def add_rows(i: Any, score: Any) -> Any:
        for j in range(_UNROLL):  # fewer passes over the scores than one row at a time
            score = add(score, x[i * _UNROLL + j])
        return score

    whole = x.shape[0] // _UNROLL
    score = jax.lax.fori_loop(0, whole, add_rows, jnp.zeros_like(scale))
    for row in range(whole * _UNROLL, x.shape[0]):
        score = add(score, x[row])
    return score * scale**rule.norm


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


def _polynomial(fit: Any, x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    first, *rest = fit.convert(kind=np.polynomial.Polynomial).coef[::-1].astype(np.float32)
    result = jnp.full_like(x, first)
    for coefficient in rest:
        result = result * x + coefficient
    return result
