"""Checks of the arrays that a score is computed from; errors name the argument.

Dimensions: N samples, D features.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def feature_rows(name: str, features: object, min_samples: int = 1) -> Float[np.ndarray, "N D"]:
    """Returns `features` in float64.

    Raises:
        ValueError: if they are not `[N, D]`, too few, or not finite.
    """
    x = finite_array(name, features)
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"{name} has shape {x.shape}; features are [N, D]: a row per sample.")
    if len(x) < min_samples:
        raise ValueError(
            f"{name} has {len(x)} samples, which is too few; use at least {min_samples}."
        )
    return x


def finite_array(name: str, values: object) -> Float[np.ndarray, "..."]:
    """Returns `values` in float64; raises `ValueError` if they are not numbers or not finite."""
    try:
        x = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is not an array of numbers: {error}.") from error
    if not np.isfinite(x).all():
        count = int((~np.isfinite(x)).sum())
        raise ValueError(f"{name}: {count} of {x.size} values are NaN or infinite.")
    return x


def check_same_width(reference: np.ndarray, samples: np.ndarray) -> None:
    """Raises `ValueError` if two sets of features cannot come from one network."""
    if reference.shape[1] != samples.shape[1]:
        raise ValueError(
            f"features have {reference.shape[1]} and {samples.shape[1]} values; "
            "they come from different feature networks."
        )
