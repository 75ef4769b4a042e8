"""Candidate scales of a layer's input channels, by the published rules.

All are normalized to a geometric mean of 1, which changes no quantizer's error and keeps 16-bit ranges
sane; a channel that is never used has the scale 1.

Dimensions: K input channels, N output channels, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from qdit_jax.calibration import LayerInputs

# `(inputs, kernel [K, N]) -> scales [C, K]`.
ScalesFn = Callable[[LayerInputs, np.ndarray], Float[np.ndarray, "C K"]]
LEAST, WIDEST = 1e-5, 1e4
ALPHAS = tuple(i / 10 for i in range(1, 11))


def smoothing(alphas: tuple[float, ...], *, one_sided: bool = True) -> ScalesFn:
    """Returns the rule of SmoothQuant, `max|X|^α / max|W|^β`, at each α with β of 1 - α.

    `one_sided` adds each α with β of 0, as SVDQuant's authors do.
    """

    def scales(inputs: LayerInputs, kernel: np.ndarray) -> Float[np.ndarray, "C K"]:
        pairs = [(alpha, 1 - alpha) for alpha in alphas]
        pairs += [(alpha, 0.0) for alpha in alphas if one_sided]
        x, w = inputs.absmax, np.abs(kernel).max(axis=1)
        return np.stack([balanced(x, w, alpha, beta) for alpha, beta in pairs])

    return scales


def activation_aware(alphas: tuple[float, ...]) -> ScalesFn:
    """Returns the rule of AWQ, `mean|X|^α` at each α."""

    def scales(inputs: LayerInputs, kernel: np.ndarray) -> Float[np.ndarray, "C K"]:
        ones = np.ones_like(inputs.mean_abs)
        return np.stack([balanced(inputs.mean_abs, ones, alpha, 0.0) for alpha in alphas])

    return scales


def balanced(
    x: Float[np.ndarray, " K"], w: Float[np.ndarray, " K"], alpha: float, beta: float
) -> Float[np.ndarray, " K"]:
    """Returns `x^alpha / w^beta` with geometric mean 1."""
    used = (x > 0) & (w > 0)
    log = np.zeros(len(x))
    log[used] = alpha * np.log(np.maximum(x[used], LEAST)) - beta * np.log(
        np.maximum(w[used], LEAST)
    )
    log[used] -= log[used].mean() if used.any() else 0.0
    return np.clip(np.exp(log), 1 / WIDEST, WIDEST).astype(np.float32)
