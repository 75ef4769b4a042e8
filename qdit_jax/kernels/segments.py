"""Segments: the runs of input channels inside which both operands have one scale.

Dimensions: K input channels, U segments, L channels of a segment, padding included.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Num

from qdit_jax.quant import effective_group_size

# An int32 accumulator holds this many products of two 8-bit codes, corrections included.
MAX_SEGMENT = 8192


@dataclasses.dataclass(frozen=True)
class Segments:
    """The common refinement of two groupings of `num_channels` channels, of any two group sizes.

    Attributes:
        num_channels: K.
        starts: the first channel of every segment `[U]`.
        rows: the channels of every segment `[U, L]`; a shorter one is padded with `num_channels`.
    """

    num_channels: int
    starts: np.ndarray
    rows: np.ndarray

    @property
    def length(self) -> int:
        """Channels of the longest segment."""
        return self.rows.shape[1]

    @property
    def members(self) -> np.ndarray:
        """Channels of every segment, int32 `[U]`, without padding."""
        return (self.rows < self.num_channels).sum(axis=1, dtype=np.int32)

    @property
    def are_equal(self) -> bool:
        """Whether no segment is padded: all have the same length."""
        return self.rows.size == self.num_channels

    def group(self, group_size: int) -> np.ndarray:
        """Returns the index of each segment's group of `group_size` channels `[U]`."""
        return self.starts // effective_group_size(self.num_channels, group_size)

    def cut(self, values: Num[Array, "..."], axis: int) -> Num[Array, "..."]:
        """Returns `values` with the channels of all segments along `axis`; 0 where padded."""
        if self.are_equal:
            return values
        pad = [(0, 0)] * values.ndim
        pad[axis] = (0, max(self.rows.size - self.num_channels, 1))
        padded = jnp.pad(values, pad)
        if (
            np.diff(self.starts) == self.length
        ).all():  # only the last segment is shorter: no gather
            return padded
        return jnp.take(padded, self.rows.reshape(-1), axis=axis)


def segments(num_channels: int, x_group_size: int, w_group_size: int) -> Segments:
    """Returns the segments of operands with these group sizes, `product_group_size` of kernels."""
    edges = {0, *range(0, num_channels, MAX_SEGMENT)}
    for size in (x_group_size, w_group_size):
        size = effective_group_size(num_channels, size)
        edges.update(range(0, num_channels, size))
    starts = np.array(sorted(edges))
    lengths = np.diff(np.append(starts, num_channels))
    rows = starts[:, None] + np.arange(lengths.max())
    rows = np.where(rows < (starts + lengths)[:, None], rows, num_channels)
    return Segments(num_channels, starts, rows)
