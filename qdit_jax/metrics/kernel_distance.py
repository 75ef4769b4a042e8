"""The kernel distance (KID, arXiv:1801.01401) with a standard error.

The kernel is `k(x, y) = (x . y / D + 1)^3`; sums run in float64, because the estimate is a small
difference of large means. Dimensions: N reference samples, M other samples, D features; E must equal D.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from qdit_jax.metrics.arrays import check_same_width, feature_rows
from qdit_jax.types import AnyArray

BLOCK_ROWS = 1024


def kid(reference: Float[AnyArray, "..."], samples: Float[AnyArray, "..."]) -> tuple[float, float]:
    """Returns the unbiased squared kernel distance of features `[N, D]` and `[M, D]`, and its
    jackknife standard error.

    All pairs are used; time grows with `(N + M)^2 D`, memory with a block of rows.

    Raises:
        ValueError: if a set has fewer than 3 samples, holds NaN or infinity, or is not `[N, D]`, or
            the numbers of features differ.
    """
    reference = feature_rows("reference", reference, min_samples=3)
    samples = feature_rows("samples", samples, min_samples=3)
    check_same_width(reference, samples)
    n, m = len(reference), len(samples)
    own_x, own_y = own_sums(reference), own_sums(samples)
    cross_x, cross_y = cross_sums(reference, samples)
    x, y, xy = own_x.sum(), own_y.sum(), cross_x.sum()
    value = x / (n * (n - 1)) + y / (m * (m - 1)) - 2 * xy / (n * m)
    without_x = (x - 2 * own_x) / ((n - 1) * (n - 2)) - 2 * (xy - cross_x) / ((n - 1) * m)
    without_y = (y - 2 * own_y) / ((m - 1) * (m - 2)) - 2 * (xy - cross_y) / (n * (m - 1))
    # Jackknife: (n - 1) / n * sum((leave-one-out - mean)^2) for each of the two samples.
    variance = (n - 1) * without_x.var() + (m - 1) * without_y.var()
    return float(value), float(np.sqrt(variance))


def kid_of_subsets(
    reference: Float[AnyArray, "..."],
    samples: Float[AnyArray, "..."],
    *,
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns the mean and the standard deviation over random subsets, as KID is often published.

    Raises:
        ValueError: if a set is smaller than `subset_size`, or as `kid`.
    """
    reference, samples = feature_rows("reference", reference), feature_rows("samples", samples)
    check_same_width(reference, samples)
    if num_subsets < 1:
        raise ValueError(f"num_subsets={num_subsets} leaves nothing to average; use 1 or more.")
    if subset_size > min(len(reference), len(samples)) or subset_size < 3:
        raise ValueError(
            f"subset_size={subset_size} must be at least 3 and at most the number of samples "
            f"({len(reference)} and {len(samples)})."
        )
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(num_subsets):
        x, y = (s[rng.choice(len(s), subset_size, replace=False)] for s in (reference, samples))
        values.append(kid(x, y)[0])
    return float(np.mean(values)), float(np.std(values))


def kernel(x: Float[AnyArray, "N D"], y: Float[AnyArray, "M D"]) -> Float[np.ndarray, "N M"]:
    """Returns the cubic kernel of all pairs."""
    return (np.asarray(x) @ np.asarray(y).T / x.shape[1] + 1) ** 3


def cross_sums(
    x: Float[AnyArray, "N D"], y: Float[AnyArray, "M D"]
) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " M"]]:
    """Returns the sums of `kernel(x, y)` over each axis, block by block."""
    y = np.asarray(y, np.float64)
    rows, columns = [], np.zeros(len(y))
    for i in range(0, len(x), BLOCK_ROWS):
        block = kernel(np.asarray(x[i : i + BLOCK_ROWS], np.float64), y)
        rows.append(block.sum(1))
        columns += block.sum(0)
    return np.concatenate(rows), columns


def own_sums(x: Float[AnyArray, "N D"]) -> Float[np.ndarray, " N"]:
    """Returns for each sample the sum of its kernel with all *other* samples."""
    own = (np.square(np.asarray(x, np.float64)).mean(1) + 1) ** 3
    return cross_sums(x, x)[0] - own
