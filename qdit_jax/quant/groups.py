"""Group arithmetic: K input channels cut into groups of `group_size`, the last one perhaps shorter.

Dimensions: K input channels, N output channels, G groups, S members of a group,
C output channels that share a scale (`channel_group`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

Result = TypeVar("Result")  # an array with G first, or a tuple of such


def effective_group_size(num_channels: int, group_size: int) -> int:
    """Returns the group size in channels: 0, or more than there are, means the whole channel."""
    return num_channels if group_size == 0 else min(group_size, num_channels)


def num_groups(num_channels: int, group_size: int) -> int:
    """Returns how many groups `num_channels` make, a shorter last one included."""
    return -(-num_channels // effective_group_size(num_channels, group_size))


def map_groups(
    fn: Callable[[Shaped[Array, "G S B"]], Result],
    w: Shaped[Array, "K N"],
    group_size: int,
    channel_group: int = 1,
) -> Result:
    """Returns `fn` of every group, stacked along G.

    `fn` takes `[G, S, N // C]` (S counts the members of a group, the C neighboring output
    channels included) and returns `[G, N // C]` arrays. The full groups and a shorter last
    group are two calls, so that no padding enters a statistic.
    """
    num_channels, width = w.shape
    size = effective_group_size(num_channels, group_size)
    full = num_channels // size
    results = []
    if full:
        results.append(fn(_members(w[: full * size].reshape(full, size, width), channel_group)))
    if num_channels % size:
        results.append(fn(_members(w[full * size :][None], channel_group)))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=0), *results)


def _members(groups: Shaped[Array, "G S N"], channel_group: int) -> Shaped[Array, "G M B"]:
    if channel_group == 1:
        return groups
    count, size, width = groups.shape
    blocks = groups.reshape(count, size, width // channel_group, channel_group)
    return jnp.swapaxes(blocks, 2, 3).reshape(count, size * channel_group, -1)


def expand_groups(
    values: Shaped[Array, "*lead G B"], shape: tuple[int, ...], group_size: int
) -> Shaped[Array, "*lead K N"]:
    """Returns one value per weight from one value per group (and per channel group)."""
    num_channels, width = shape
    size = effective_group_size(num_channels, group_size)
    *lead, count, blocks = values.shape
    wide = jnp.broadcast_to(
        values[..., :, None, :, None], (*lead, count, size, blocks, width // blocks)
    )
    return wide.reshape(*lead, count * size, width)[..., :num_channels, :]


def expand_rows(
    values: Shaped[Array, "*lead B G"], shape: tuple[int, ...], group_size: int
) -> Shaped[Array, "*lead N K"]:
    """Returns `expand_groups` of a kernel `shape` (K, N) as `QTensor` stores it, a row per channel."""
    num_channels, width = shape
    size = effective_group_size(num_channels, group_size)
    *lead, blocks, count = values.shape
    wide = jnp.broadcast_to(
        values[..., :, None, :, None], (*lead, blocks, width // blocks, count, size)
    )
    return wide.reshape(*lead, width, count * size)[..., :num_channels]
