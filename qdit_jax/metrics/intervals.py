"""How sure a mean is, and whether two recipes differ: resampling over paired samples.

Dimensions: N samples (the same noise and label in every array); M must equal N.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from qdit_jax.types import AnyArray


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its confidence interval."""

    estimate: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class PairedTest:
    """The mean difference of two recipes, its 95% interval, and the two-sided p-value."""

    difference: Interval
    p_value: float
    num_samples: int


def bootstrap_interval(
    values: Float[AnyArray, " N"],
    *,
    seed: int = 0,
    num_resamples: int = 2000,
    level: float = 0.95,
    statistic: Callable[[np.ndarray], float] = np.mean,
) -> Interval:
    """Returns the statistic of `values` with its percentile bootstrap interval over samples.

    Raises:
        ValueError: if there are fewer than 2 values, or one is NaN or infinite.
    """
    values = checked(values)
    rng = np.random.default_rng(seed)
    draws = [
        statistic(values[rng.integers(0, len(values), len(values))]) for _ in range(num_resamples)
    ]
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(statistic(values)), float(low), float(high))


def paired_test(
    values_a: Float[AnyArray, " N"],
    values_b: Float[AnyArray, " M"],
    *,
    seed: int = 0,
    num_permutations: int = 10_000,
) -> PairedTest:
    """Returns how much `values_a` exceed `values_b` in the mean, and how surely.

    The p-value is that of a sign-flip permutation test on the differences: exact for few samples,
    else from `num_permutations` random flips (never below `1 / (num_permutations + 1)`).

    Raises:
        ValueError: if the arrays differ in length, or hold fewer than 2 finite values.
    """
    a, b = checked(values_a), checked(values_b)
    if a.shape != b.shape:
        raise ValueError(
            f"{len(a)} and {len(b)} values cannot be paired; use the same noise and labels."
        )
    difference = a - b
    p_value = sign_flip_p_value(difference, num_permutations, np.random.default_rng(seed))
    return PairedTest(bootstrap_interval(difference, seed=seed), p_value, len(difference))


def sign_flip_p_value(
    difference: Float[np.ndarray, " N"], num_permutations: int, rng: np.random.Generator
) -> float:
    """Returns the share of sign patterns whose mean is at least as far from zero as the observed."""
    count = len(difference)
    # Equal magnitudes summed in another order must still count as ties.
    observed = abs(difference.sum()) * (1 - 1e-12)
    if 2**count <= num_permutations:
        patterns = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
        return float((np.abs((2 * patterns - 1) @ difference) >= observed).mean())
    exceed, block = 0, max(1, 10**7 // count)
    for start in range(0, num_permutations, block):
        size = min(block, num_permutations - start)
        signs = 2 * rng.integers(0, 2, (size, count), np.int8) - 1
        exceed += int((np.abs(signs @ difference) >= observed).sum())
    return (exceed + 1) / (num_permutations + 1)


def checked(values: Float[AnyArray, "N ..."]) -> Float[np.ndarray, "N ..."]:
    """Returns `values` in float64; raises `ValueError` if they are too few or not finite."""
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        raise ValueError(
            f"{len(values)} values are too few for an interval; use at least 2 samples."
        )
    if not np.isfinite(values).all():
        raise ValueError(
            f"{(~np.isfinite(values)).sum()} of {values.size} values are NaN or infinite."
        )
    return values


def bootstrap_band(
    values: Float[AnyArray, "N S"],
    *,
    seed: int = 0,
    num_resamples: int = 500,
    level: float = 0.95,
) -> tuple[Float[np.ndarray, " S"], Float[np.ndarray, " S"], Float[np.ndarray, " S"]]:
    """Returns the mean over samples with the ends of its interval, for each of S quantities.

    Raises:
        ValueError: as `bootstrap_interval`.
    """
    values = checked(values)
    count = len(values)
    rng = np.random.default_rng(seed)
    # How often each sample is drawn: one product gives every resampled mean.
    draws = rng.multinomial(count, np.full(count, 1 / count), num_resamples) @ values / count
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return values.mean(0), low, high
