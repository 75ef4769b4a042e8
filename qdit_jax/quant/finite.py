"""Refuses NaN and infinity, by name, before anything is computed with them."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from qdit_jax.types import AnyArray, Numbers

# Differences of greater weights overflow float32.
GREATEST_WEIGHT = 2.0**126


def check_finite(
    name: str, array: AnyArray | np.generic | float | int, limit: float = math.inf
) -> None:
    """Raises `ValueError` if `array` holds NaN or infinity; a traced one is not checked.

    Args:
        name: what the message calls it: an argument, or a layer's path.
        limit: the greatest magnitude that is allowed.
    """
    if isinstance(array, jax.core.Tracer) or not is_float(array) or np.size(array) == 0:
        return
    # The extremes show any NaN or infinity without an array of the same size.
    held = np.asarray(array) if in_host_memory(array) else jnp.asarray(array)
    with np.errstate(invalid="ignore"):
        low, high = float(held.min()), float(held.max())
    if math.isfinite(low) and math.isfinite(high) and max(-low, high) <= limit:
        return
    values = np.asarray(array).astype(np.float64)
    bad = ~(np.abs(values) <= limit) | ~np.isfinite(values)
    place = tuple(int(i) for i in np.unravel_index(np.argmax(bad), bad.shape))
    beyond = "" if math.isinf(limit) else f" or exceed {limit:.2g}"
    raise ValueError(
        f"{name} holds {int(bad.sum()):,} of {bad.size:,} values that are not finite{beyond}; the "
        f"first is {values[place]:g} at {place}. Mend what it comes from."
    )


def is_float(array: Numbers) -> bool:
    """Returns whether `array` holds floating-point numbers of any width."""
    dtype = array.dtype if hasattr(array, "dtype") else np.asarray(array).dtype
    return bool(jnp.issubdtype(dtype, jnp.inexact))


def in_host_memory(array: Numbers) -> bool:
    return not isinstance(array, jax.Array) or {d.platform for d in array.devices()} == {"cpu"}
