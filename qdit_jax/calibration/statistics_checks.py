"""Whether calibration statistics can be used, layer by layer.

Dimensions: S timesteps, K input channels, M tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qdit_jax.quant import check_finite


def check_layer(path: str, stats: Any, num_channels: int | None = None) -> None:
    """Raises `ValueError`, naming the layer, unless its statistics are ranges of `[S, K]`.

    `num_channels` is K where the caller knows it.
    """
    if path not in stats.low or path not in stats.high:
        side = "high" if path in stats.low else "low"
        raise ValueError(f"the statistics of {path} have no array {side!r}; calibrate again.")
    num_steps = len(stats.timesteps)
    low, high = np.asarray(stats.low[path]), np.asarray(stats.high[path])
    width = low.shape[-1] if low.ndim else 0
    wanted = (num_steps, num_channels or width)
    for name, array in (("low", low), ("high", high)):
        check_array(path, name, array, wanted)
    if (low > high).any():
        step, channel = (int(i) for i in np.argwhere(low > high)[0])
        raise ValueError(
            f"the statistics of {path} have low {low[step, channel]:g} above high "
            f"{high[step, channel]:g} at step {step}, channel {channel}; calibrate again."
        )
    if path in stats.hessians:
        check_array(path, "hessian", np.asarray(stats.hessians[path]), (width, width))
    if path in stats.tokens:
        tokens = np.asarray(stats.tokens[path])
        count = tokens.shape[1] if tokens.ndim == 3 else 0
        check_array(path, "tokens", tokens, (num_steps, count, width))


def check_array(path: str, name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raises `ValueError` unless `array` is finite, not empty and of that shape."""
    if array.shape != shape or 0 in shape:
        raise ValueError(
            f"the statistics of {path} have {name} of shape {array.shape}, where "
            f"{shape} is needed; calibrate this network again."
        )
    check_finite(f"the statistics of {path}: {name}", array)


def check_all(stats: Any) -> None:
    """Raises `ValueError` if any layer's statistics, or those of a half, cannot be used."""
    timesteps = np.asarray(stats.timesteps)
    if timesteps.ndim != 1 or not timesteps.size:
        raise ValueError(f"timesteps have shape {timesteps.shape}; one number per step is needed.")
    check_finite("timesteps", timesteps)
    for one in (stats, *stats.halves.values()):
        for path in sorted({*one.low, *one.high}):
            check_layer(path, one)
