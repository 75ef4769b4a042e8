"""Mean and covariance of features, streamed over batches and merged over devices.

Dimensions: N samples, D features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float

from qdit_jax.types import AnyArray

BLOCK_ROWS = 4096


@dataclasses.dataclass(frozen=True)
class Moments:
    """The first two moments of `count` samples: `scatter = sum((x - mean) (x - mean)^T)`."""

    count: int
    mean: Float[np.ndarray, " D"]
    scatter: Float[np.ndarray, "D D"]

    @property
    def covariance(self) -> Float[np.ndarray, "D D"]:
        """The unbiased covariance, `scatter / (count - 1)`."""
        if self.count < 2:
            raise ValueError(f"count={self.count}: a covariance needs at least 2 samples.")
        return self.scatter / (self.count - 1)


def moments(features: Float[AnyArray, "..."]) -> Moments:
    """Returns the moments of features `[N, D]`, in float64 and in blocks of rows.

    Raises:
        ValueError: if there is no sample, the array is not `[N, D]`, or holds NaN or infinity.
    """
    if np.ndim(features) != 2 or features.shape[1] == 0:
        raise ValueError(
            f"features have shape {np.shape(features)}; moments need [N, D]: a row per sample."
        )
    if len(features) == 0:
        raise ValueError("features are empty; moments need at least 1 sample.")
    starts = range(0, len(features), BLOCK_ROWS)
    return merge_all(block_moments(features[i : i + BLOCK_ROWS]) for i in starts)


def block_moments(features: Float[AnyArray, "N D"]) -> Moments:
    """Returns the moments of an array that is small enough to copy to float64."""
    x = np.asarray(features, np.float64)
    if not np.isfinite(x).all():
        raise ValueError(
            f"{(~np.isfinite(x)).any(1).sum()} of {len(x)} features are NaN or infinite."
        )
    mean = x.mean(0)
    centered = x - mean
    return Moments(len(x), mean, centered.T @ centered)


def merge(a: Moments, b: Moments) -> Moments:
    """Returns the moments of both sets of samples (Chan, Golub, LeVeque 1979)."""
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"moments of {a.mean.size} and {b.mean.size} features cannot be merged; "
            "they come from different feature networks."
        )
    count = a.count + b.count
    shift = b.mean - a.mean
    scatter = a.scatter + b.scatter + np.outer(shift, shift) * (a.count * b.count / count)
    return Moments(count, a.mean + shift * (b.count / count), scatter)


def merge_all(parts: Iterable[Moments]) -> Moments:
    """Returns the moments of all parts together; there must be at least one."""
    parts = iter(parts)
    total = next(parts)
    for part in parts:
        total = merge(total, part)
    return total
