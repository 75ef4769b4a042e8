"""Division rounded once, on every backend.

A code is the rounding of a quotient, and quotients on a tie are common (a range cut into equal
steps has them), so an error of one unit in the last place moves codes. XLA divides float32 exactly
on CPU; its code for GPUs is off by up to two units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qdit_jax.types import Numbers

_UPPER_HALF = -(1 << 12)  # of a float32: sign, exponent and 11 bits of mantissa
_FIVE_BITS, _HALF_OF_FIFTH = -(1 << 19), 1 << 18  # sign, exponent, 4 of mantissa; half the last
_WHOLE, _WHOLE_BITS = 1.5 * 2.0**23, 0x4B400000
_IN_ONE_FORM: ContextVar[bool] = ContextVar("in_one_form", default=False)


@contextmanager
def in_one_form() -> Iterator[None]:
    """Inside, a division has one form on all platforms, for compilers that have no branches by platform."""
    token = _IN_ONE_FORM.set(True)
    try:
        yield
    finally:
        _IN_ONE_FORM.reset(token)


def quotient(x: Float[Array, "*s"], divisor: Numbers) -> Float[Array, "*s"]:
    """Returns `x / divisor` in float32, rounded to nearest, as IEEE 754 has it.

    `divisor` broadcasts to `x`. Beyond about 1e30 and below 1e-30 the last bit is the backend's.
    """
    divisor = jnp.broadcast_to(jnp.asarray(divisor, jnp.float32), x.shape)
    if _IN_ONE_FORM.get():
        return _divided_again(x, divisor)
    return jax.lax.platform_dependent(x, divisor, cpu=jnp.divide, default=_divided_again)


def quotient_by_number(x: Float[Array, "*s"], divisor: int | float) -> Float[Array, "*s"]:
    """Returns `x / divisor`, rounded once, for one number `divisor`.

    XLA turns a division by a broadcast scalar into a product with its reciprocal, which may be
    one ulp off. It leaves a divisor alone that seems to depend on `x`, also under vmap.
    """
    return quotient(x, jnp.where(jnp.isnan(x), 1.0, divisor))


def _divided_again(x: Float[Array, "*s"], divisor: Float[Array, "*s"]) -> Float[Array, "*s"]:
    return corrected(x / divisor, x, divisor)


def corrected(
    near: Float[Array, "*s"], x: Float[Array, "*s"], divisor: Float[Array, "*s"]
) -> Float[Array, "*s"]:
    """Returns `x / divisor` rounded once from a quotient `near` that is a few units off.

    The remainder `x - near * divisor` is computed exactly from halves of both factors, whose
    products have no rounding error, fused with the sums or not (Dekker, 1971).
    """
    upper, lower = _halves(near)
    top, rest = _halves(divisor)
    product = near * divisor
    error = ((upper * top - product) + upper * rest + lower * top) + lower * rest
    better = near + ((x - product) - error) / divisor
    return jnp.where(jnp.abs(better) < jnp.inf, better, near)


def _halves(x: Float[Array, "*s"]) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
    bits: Int[Array, "*s"] = jax.lax.bitcast_convert_type(x, jnp.int32)
    upper = jax.lax.bitcast_convert_type(bits & _UPPER_HALF, jnp.float32)
    return upper, x - upper


def rounded_quotients(
    divisor: Float[Array, "*divisors"], top: int
) -> Callable[[Float[Array, "*s"]], Int[Array, "*s"]]:
    """Returns the function `x -> round(quotient(x, divisor))`, ties to even.

    Divisors broadcast to `x`; they are positive; results are in [-top - 1, top], `top` at most 255, as int32. Half of the work
    of `quotient`: the nearest half of a whole number, by the reciprocal, and its remainder, which is
    exact, so that ties are those of the quotient in float32.
    """
    reciprocal = quotient(jnp.ones_like(divisor), divisor)
    least, most = -(top + 1) * divisor, top * divisor
    upper, lower = _halves(0.5 * divisor)  # 12 bits each: exact times a whole number of 10 bits

    def rounded(x: Float[Array, "*s"]) -> Int[Array, "*s"]:
        x = jnp.clip(x, least, most)
        doubled = _nearest(x * (2 * reciprocal)).astype(jnp.float32)
        rest = (x - doubled * upper) - doubled * lower
        return _nearest(0.5 * doubled + rest * reciprocal)

    return rounded


def quotients_to_narrow(
    divisor: Float[Array, "*divisors"],
) -> Callable[[Float[Array, "*s"]], Float[Array, "*s"]]:
    """Returns the function from `x` to what rounds to FP8 as `quotient(x, divisor)` does, ties included.

    Divisors broadcast to `x`; they are positive. All ties of numbers of up to four significant bits have five.
    The nearest number of five bits is found by the reciprocal, and its remainder, which is exact, is added.
    """
    reciprocal = quotient(jnp.ones_like(divisor), divisor)
    upper, lower = _halves(divisor)  # 12 bits each: exact times a number of five

    def narrow(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
        bits = jax.lax.bitcast_convert_type(x * reciprocal, jnp.int32)
        near = jax.lax.bitcast_convert_type((bits + _HALF_OF_FIFTH) & _FIVE_BITS, jnp.float32)
        rest = (x - near * upper) - near * lower
        return near + rest * reciprocal

    return narrow


def _nearest(x: Float[Array, "*s"]) -> Int[Array, "*s"]:
    """Returns the nearest whole number, ties to even, of numbers below 2**22, as int32.

    An addition of floats and one of integers; `round` and a conversion take nine operations on a TPU.
    """
    shifted = x + _WHOLE  # floats have a spacing of 1 there
    return jax.lax.bitcast_convert_type(shifted, jnp.int32) - _WHOLE_BITS
