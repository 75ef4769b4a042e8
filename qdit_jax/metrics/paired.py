"""How far a quantized model's outputs are from full precision for the same noise, label and steps.

Each measure returns one number per sample, to be averaged with an interval (`intervals`).
Decibels are capped at 200, which equal arrays reach, so that means stay finite.
Dimensions: N samples, H and W rows and columns, C channels; M must equal N.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.ndimage import correlate1d

from qdit_jax.metrics.arrays import finite_array
from qdit_jax.types import AnyArray

MAX_DB = 200.0


def decibels(signal: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Returns `10 log10(signal / noise)`, at most `MAX_DB` and at least `-MAX_DB`."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = 10 * (np.log10(signal) - np.log10(noise))
    return np.clip(np.where(noise == 0, MAX_DB, ratio), -MAX_DB, MAX_DB)


def signal_to_noise_db(
    reference: Float[AnyArray, "N ..."], other: Float[AnyArray, "M ..."]
) -> Float[np.ndarray, " N"]:
    """Returns the power of each reference over the power of its error, in dB (higher is closer)."""
    x, y = as_pairs(reference, other, 1)
    return decibels(np.square(x).sum(-1), np.square(x - y).sum(-1))


def cosine(
    reference: Float[AnyArray, "N ..."], other: Float[AnyArray, "M ..."]
) -> Float[np.ndarray, " N"]:
    """Returns the cosine between each pair; 0 where one of the two is all zero."""
    x, y = as_pairs(reference, other, 1)
    norms = np.sqrt(np.square(x).sum(-1) * np.square(y).sum(-1))
    return (x * y).sum(-1) / np.where(norms > 0, norms, 1)


def psnr(
    reference: Float[AnyArray, "N ..."], other: Float[AnyArray, "M ..."], *, peak: float = 2.0
) -> Float[np.ndarray, " N"]:
    """Returns the peak signal-to-noise ratio in dB; `peak` is the span of values, 2 for [-1, 1]."""
    x, y = as_pairs(reference, other, 1)
    return decibels(np.full(len(x), peak**2), np.square(x - y).mean(-1))


def ssim(
    reference: Float[AnyArray, "N H W C"],
    other: Float[AnyArray, "M _ _ _"],
    *,
    peak: float = 2.0,
    sigma: float = 1.5,
    window: int = 11,
) -> Float[np.ndarray, " N"]:
    """Returns the structural similarity (Wang et al. 2004), averaged over positions and channels.

    Gaussian window, K1 = 0.01, K2 = 0.03, population variances, only windows wholly inside.

    Raises:
        ValueError: if the images are smaller than the window.
    """
    check_shapes(reference, other)
    if min(reference.shape[1:3]) < window:
        raise ValueError(f"images of {reference.shape[1:3]} are smaller than window={window}.")
    x, y = finite_array("reference", reference), finite_array("other", other)
    mean_x, mean_y, square_x, square_y, product = (
        windowed(values, sigma, window) for values in (x, y, x * x, y * y, x * y)
    )
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    variance = square_x - mean_x**2 + square_y - mean_y**2
    covariance = product - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * (2 * covariance + c2) / (variance + c2)).mean((1, 2, 3))


def windowed(
    x: Float[np.ndarray, "N H W C"], sigma: float, window: int
) -> Float[np.ndarray, "N h w C"]:
    """Returns Gaussian-weighted means over every window that lies inside the image."""
    weights = np.exp(-0.5 * np.square((np.arange(window) - (window - 1) / 2) / sigma))
    weights /= weights.sum()
    before, after = window // 2, (window - 1) // 2
    for axis in (1, 2):
        x = correlate1d(x, weights, axis=axis, mode="nearest")
        x = np.take(x, np.arange(before, x.shape[axis] - after), axis)
    return x


def as_pairs(reference: AnyArray, other: AnyArray, keep: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns both arrays in float64 with all but the first `keep` axes flattened into one."""
    check_shapes(reference, other)
    shape = (*reference.shape[:keep], -1)
    named = (("reference", reference), ("other", other))
    x, y = (finite_array(name, values).reshape(shape) for name, values in named)
    return x, y


def check_shapes(reference: AnyArray, other: AnyArray) -> None:
    """Raises `ValueError` if two arrays cannot be compared pair by pair."""
    if reference.ndim == 0 or reference.size == 0:
        raise ValueError(f"reference has shape {reference.shape}; there is no sample in it.")
    if reference.shape != other.shape:
        raise ValueError(
            f"shapes {reference.shape} and {other.shape} cannot be paired; "
            "sample both models with the same noise, labels and steps."
        )
