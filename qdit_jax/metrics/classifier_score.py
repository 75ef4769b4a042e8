"""The Inception Score (arXiv:1606.03498).

Dimensions: N samples, C classes.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.special import xlogy

from qdit_jax.metrics.arrays import feature_rows
from qdit_jax.types import AnyArray


def inception_score(
    probabilities: Float[AnyArray, "..."], *, split_size: int = 5000
) -> tuple[float, float]:
    """Returns the mean and the standard deviation of the score of `[N, C]` over splits.

    A split has `split_size` samples.

    A split's score is `exp(mean KL(p(y|x) || p(y)))`, with p(y) the mean within the split. The last
    split may be shorter, and counts as much as the others, as in the published evaluator.

    Raises:
        ValueError: if a row is not a distribution, or `split_size` is below 1.
    """
    p = feature_rows("probabilities", probabilities)
    if split_size < 1:
        raise ValueError(f"split_size={split_size} must be at least 1.")
    if (p < 0).any() or np.abs(p.sum(1) - 1).max() > 1e-3:
        raise ValueError("probabilities must be rows that sum to 1; pass them after the softmax.")
    starts = range(0, len(p), split_size)
    scores = [split_score(p[i : i + split_size]) for i in starts]
    return float(np.mean(scores)), float(np.std(scores))


def split_score(p: Float[np.ndarray, "N C"]) -> float:
    """Returns `exp` of the mean KL divergence from the marginal; 0 log 0 counts as 0."""
    entropy = -xlogy(p, p).sum(1).mean()
    marginal = p.mean(0)
    return float(np.exp(-xlogy(marginal, marginal).sum() - entropy))
