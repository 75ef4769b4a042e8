"""The Fréchet distance between two Gaussians, and its limit for infinitely many samples.

With Inception's pool_3 features this is FID (arXiv:1706.08500); with any other features it is not.
Dimensions: N samples, D features (E must equal D), R rank.
"""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import scipy.linalg
from jaxtyping import Float

from qdit_jax.metrics.arrays import feature_rows, finite_array
from qdit_jax.metrics.streaming import moments
from qdit_jax.types import AnyArray


def frechet_distance(
    mean_a: Float[AnyArray, "..."],
    covariance_a: Float[AnyArray, "..."],
    mean_b: Float[AnyArray, "..."],
    covariance_b: Float[AnyArray, "..."],
) -> float:
    """Returns `|mean_a - mean_b|^2 + tr(A + B - 2 sqrt(A B))`, in float64.

    Means are `[D]`, covariances `[D, D]`.

    With factors `A = L L^T` and `B = M M^T`, `tr sqrt(A B)` is the sum of the singular values of
    `L^T M`: real and stable whatever the ranks. Differs from the usual `sqrtm(A B)`, which needs
    a multiple of the identity added when the product is singular.

    Raises:
        ValueError: if sizes differ, values are not finite, or a matrix is not a covariance.
    """
    mean_a, a = checked_statistics("a", mean_a, covariance_a)
    mean_b, b = checked_statistics("b", mean_b, covariance_b)
    if mean_a.shape != mean_b.shape:
        raise ValueError(
            f"statistics have {mean_a.size} and {mean_b.size} features; "
            "they come from different feature networks."
        )
    overlap = scipy.linalg.svdvals(factor(a).T @ factor(b)).sum()
    distance = np.square(mean_a - mean_b).sum() + np.trace(a) + np.trace(b) - 2 * overlap
    return float(distance)


def checked_statistics(
    which: str, mean: AnyArray, covariance: AnyArray
) -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, "D D"]]:
    """Returns mean and covariance in float64; raises `ValueError` if their shapes do not fit."""
    mean = finite_array(f"mean_{which}", mean)
    covariance = finite_array(f"covariance_{which}", covariance)
    if mean.ndim != 1 or not mean.size:
        raise ValueError(
            f"mean_{which} has shape {mean.shape}; a mean is [D], one value per feature."
        )
    if covariance.shape != (mean.size, mean.size):
        raise ValueError(
            f"covariance_{which} has shape {covariance.shape}; with mean_{which} of {mean.size} "
            f"features it is [{mean.size}, {mean.size}]."
        )
    return mean, covariance


def factor(covariance: Float[np.ndarray, "D D"]) -> Float[np.ndarray, "D R"]:
    """Returns L with `L L^T = covariance`, of its numerical rank (at least one column).

    Raises:
        ValueError: if the matrix is not symmetric positive semidefinite.
    """
    check_covariance(covariance)
    noise = len(covariance) * np.finfo(np.float64).eps
    with contextlib.suppress(np.linalg.LinAlgError):
        # Many times faster than eigenvectors, and as exact while the rank is full.
        lower = np.linalg.cholesky(covariance)
        pivots = np.square(lower.diagonal())
        if pivots.min() > noise * pivots.max():
            return lower
    values, vectors = np.linalg.eigh(covariance)
    # Statistics stored in float32 may have slightly negative eigenvalues; more is an error.
    if values[0] < -1e-4 * np.abs(covariance).max():
        raise ValueError(f"the covariance has the negative eigenvalue {values[0]:.3g}.")
    # Eigenvalues of this size are rounding noise, and a root would raise it to half the digits.
    kept = values > values[-1] * noise
    kept[-1] = True
    return vectors[:, kept] * np.sqrt(np.maximum(values[kept], 0))


def check_covariance(covariance: Float[np.ndarray, "D D"]) -> None:
    """Raises `ValueError` if a look at the entries shows that the matrix is not a covariance."""
    largest = np.abs(covariance).max(initial=0.0)
    if not np.isfinite(largest):
        raise ValueError("the covariance holds NaN or infinite values.")
    if np.abs(covariance - covariance.T).max(initial=0.0) > 1e-5 * largest:
        raise ValueError("the covariance is not symmetric; check how the statistics were made.")
    if covariance.diagonal().min(initial=0.0) < 0:
        raise ValueError("the covariance has negative variances on its diagonal.")


@dataclasses.dataclass(frozen=True)
class Extrapolation:
    """The limit for infinitely many samples, its standard error, and the points it rests on."""

    value: float
    standard_error: float
    sizes: tuple[int, ...]
    distances: tuple[float, ...]


def frechet_infinity(
    mean: Float[AnyArray, "..."],
    covariance: Float[AnyArray, "..."],
    features: Float[AnyArray, "..."],
    *,
    seed: int = 0,
    num_points: int = 15,
    smallest: int | None = None,
) -> Extrapolation:
    """Returns the Fréchet distance of features `[N, D]` extrapolated to infinitely many samples.

    The method is that of arXiv:1911.07023.

    Distances of random subsets, `smallest` (a tenth by default) to all samples, are fitted by
    a line in `1 / N`; its intercept is the value. The standard error is the fit's own and leaves
    out that subsets share samples.

    Raises:
        ValueError: if `features` are too few for `num_points` different sizes, or as
            `frechet_distance`.
    """
    features = feature_rows("features", features)
    count = len(features)
    smallest = max(2, count // 10) if smallest is None else smallest
    sizes = np.linspace(smallest, count, num_points).astype(int)
    if num_points < 3 or smallest < 2 or len(set(sizes)) < num_points:
        raise ValueError(
            f"{count} samples are too few for num_points={num_points} subsets "
            f"of {smallest} samples and more; at least 3 points are needed."
        )
    rng = np.random.default_rng(seed)
    distances = []
    for size in sizes:
        subset = moments(features[rng.choice(count, size, replace=False)])
        distances.append(frechet_distance(mean, covariance, subset.mean, subset.covariance))
    value, standard_error = intercept(1 / sizes, np.array(distances))
    return Extrapolation(value, standard_error, tuple(sizes.tolist()), tuple(distances))


def intercept(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Returns the intercept of the least-squares line and its standard error."""
    design = np.stack([np.ones_like(x), x], axis=1)
    solution, *_ = np.linalg.lstsq(design, y, rcond=None)
    residual = np.square(y - design @ solution).sum() / (len(x) - 2)
    variance = residual * np.linalg.inv(design.T @ design)[0, 0]
    return float(solution[0]), float(np.sqrt(variance))
