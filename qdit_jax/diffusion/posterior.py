"""`x_0`, `eps` and the Gaussian of the next step, from a model's output at one step.

Coefficients are scalars of one timestep, which the sampling loop takes from a table.
Dimension letters: B = batch, D = height and width (and frames), C = channels of the latents,
O = channels of the model's output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from qdit_jax.types import AnyArray, Scalar

# Of all steps in NumPy `[S]`; of one step, traced, inside the sampling loop.
Coefficients = AnyArray


class Prediction(NamedTuple):
    """Coefficients that relate `x_t`, `x_0` and `eps`.

    `x_t = signal x_0 + noise eps`, and solved for the data `x_0 = x_weight x_t - eps_weight eps`;
    the weights are infinite where there is no signal.
    """

    x_weight: Coefficients
    eps_weight: Coefficients
    signal: Coefficients
    noise: Coefficients


Latents = Float[Array, "B *D C"]
# (x [B, *D, C], timestep [B], condition) -> [B, *D, O]
DenoiseFn = Callable[..., Array]
PredictFn = Callable[[Latents, Latents, Prediction], tuple[Latents, Latents]]
# (x, x_0, eps, row, limit) -> (x_0, eps)
LimitFn = Callable[[Latents, Latents, Latents, Prediction, Any], tuple[Latents, Latents]]
# The largest magnitude of the predicted data, or the two numbers of `dynamic_threshold`.
Limit = Scalar | tuple[Scalar, Scalar]


def eps_prediction(x: Latents, output: Latents, row: Prediction) -> tuple[Latents, Latents]:
    """Returns `(x_0, eps)` of a model that predicts the noise."""
    return x * row.x_weight - output * row.eps_weight, output


def x0_prediction(x: Latents, output: Latents, row: Prediction) -> tuple[Latents, Latents]:
    """Returns `(x_0, eps)` of a model that predicts the data."""
    return output, noise_of(x, output, row)


def v_prediction(x: Latents, output: Latents, row: Prediction) -> tuple[Latents, Latents]:
    """Returns `(x_0, eps)` of a model that predicts `v = signal eps - noise x_0`.

    (Salimans and Ho, arXiv:2202.00512.) It also holds where there is no signal.
    """
    return x * row.signal - output * row.noise, output * row.signal + x * row.noise


def noise_of(x: Latents, x0: Latents, row: Prediction) -> Latents:
    """Returns the `eps` that leads from the data `x_0` to `x`."""
    return (x - x0 * row.signal) / row.noise


def consistent_clip(
    x: Latents, x0: Latents, eps: Latents, row: Prediction, limit: Scalar
) -> tuple[Latents, Latents]:
    """Returns `x_0` clipped to `[-limit, limit]` and the `eps` that leads from it to `x`."""
    x0 = jnp.clip(x0, -limit, limit)
    return x0, noise_of(x, x0, row)


def data_clip(
    x: Latents, x0: Latents, eps: Latents, row: Prediction, limit: Scalar
) -> tuple[Latents, Latents]:
    """Returns `x_0` clipped to `[-limit, limit]` and the `eps` of the model, as diffusers does."""
    return jnp.clip(x0, -limit, limit), eps


def dynamic_threshold(
    x: Latents, x0: Latents, eps: Latents, row: Prediction, limit: tuple[Scalar, Scalar]
) -> tuple[Latents, Latents]:
    """Returns `x_0` clipped at a quantile of |x_0| and scaled into [-1, 1], and `eps` unchanged.

    `limit` is the quantile, in [0, 1], and the largest range; the smallest is 1. Each sample has
    its own range (Saharia et al., arXiv:2205.11487).
    """
    share, largest = limit
    axes = tuple(range(1, x0.ndim))
    size = jnp.quantile(jnp.abs(x0), share, axis=axes, keepdims=True)
    size = jnp.clip(size, 1.0, largest)
    return jnp.clip(x0, -size, size) / size, eps


def predicted(
    predict_fn: PredictFn,
    x: Latents,
    output: Float[Array, "B *D O"],
    row: Prediction,
    limit: Limit | None,
    limit_fn: LimitFn = consistent_clip,
) -> tuple[Latents, Latents]:
    """Returns `(x_0, eps)`, with `x_0` kept within `limit` by `limit_fn`.

    Channels of `output` beyond those of `x` belong to the variance and are not used; `limit=None`
    leaves `x_0` unclipped.
    """
    num_channels = x.shape[-1]
    if output.shape[:-1] != x.shape[:-1] or output.shape[-1] not in (
        num_channels,
        2 * num_channels,
    ):
        raise ValueError(
            f"the model returned {output.shape} for latents {x.shape}; it must return the same "
            f"shape with {num_channels} channels, or {2 * num_channels} with a learned variance."
        )
    x0, eps = predict_fn(x, output[..., :num_channels].astype(x.dtype), row)
    return (x0, eps) if limit is None else limit_fn(x, x0, eps, row, limit)


class LogVariance(NamedTuple):
    """Logs of the variances that a reverse step may have: the posterior's, and `beta`.

    The first timestep's zero is replaced by the second's in `posterior`; `beta_clipped` has the
    posterior's second there, as published.
    """

    posterior: Coefficients
    beta: Coefficients
    beta_clipped: Coefficients


VarianceFn = Callable[[Latents, Float[Array, "B *D O"], LogVariance], Latents]


def learned_range(x: Latents, output: Float[Array, "B *D O"], row: LogVariance) -> Latents:
    """Returns the log variance, interpolated by the model's last channels between the two extremes.

    -1 is the smallest, 1 the largest (Nichol and Dhariwal, arXiv:2102.09672).

    Raises:
        ValueError: if the model returns no variance channels.
    """
    num_channels = x.shape[-1]
    if output.shape[-1] != 2 * num_channels:
        raise ValueError(
            f"learned_range needs {2 * num_channels} output channels, the model returned "
            f"{output.shape[-1]}; use variance_fn=fixed_large or fixed_small."
        )
    share = (output[..., num_channels:].astype(x.dtype) + 1) / 2
    return share * row.beta + (1 - share) * row.posterior


def fixed_large(x: Latents, output: Float[Array, "B *D O"], row: LogVariance) -> Latents:
    """Returns the log of `beta`, the larger of the two fixed variances."""
    return jnp.full_like(x, row.beta_clipped)


def fixed_small(x: Latents, output: Float[Array, "B *D O"], row: LogVariance) -> Latents:
    """Returns the log of the posterior's variance, the smaller of the two fixed variances."""
    return jnp.full_like(x, row.posterior)
