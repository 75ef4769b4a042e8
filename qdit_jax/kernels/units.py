"""Units: runs of input channels inside which both operands of a product in groups have one scale.

They are cut for kernels, whose steps hold 128 channels; `segments` cuts any two groupings for XLA.

Dimensions: K input channels, G groups of them, U units.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Int32, Num

from qdit_jax.quant import effective_group_size

MOST = 128  # input channels of a unit


def unit_of(num_channels: int, x_group_size: int, w_group_size: int) -> int:
    """Returns the input channels of a unit, 32, 64 or 128: inside each, both operands have one scale.

    A group of all channels cuts none.
    """
    return math.gcd(MOST, *(s for s in (x_group_size, w_group_size) if 0 < s < num_channels))


def of_units(
    values: Num[Array, "G _"], num_channels: int, group_size: int, unit: int
) -> Num[Array, "U _"]:
    """Returns a row for every unit of input channels; `values` themselves where these are the groups."""
    repeats = -(-effective_group_size(num_channels, group_size) // unit)
    if repeats == 1:
        return values
    count = -(-num_channels // unit)
    whole = jnp.repeat(values, repeats, axis=0, total_repeat_length=len(values) * repeats)
    return whole[:count]


def unit_sums(elements: Int32[Array, "_ K"], unit: int) -> Int32[Array, "U _"]:
    """Returns the sums over the channels of each unit."""
    return elements.reshape(len(elements), -1, unit).sum(axis=-1).T
