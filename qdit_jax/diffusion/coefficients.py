"""The coefficients of samplers: a table with one row per step.

Dimension letters: S = number of steps.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from qdit_jax.diffusion import posterior
from qdit_jax.diffusion.posterior import Coefficients, LogVariance, PredictFn, Prediction
from qdit_jax.diffusion.schedules import Schedule
from qdit_jax.types import Tree


class DDIMRow(NamedTuple):
    """Coefficients of a DDIM step: `x' = x0_weight x_0 + eps_weight eps + noise_weight noise`."""

    timestep: Coefficients
    prediction: Prediction
    x0_weight: Coefficients
    eps_weight: Coefficients
    noise_weight: Coefficients


class DDPMRow(NamedTuple):
    """Coefficients of an ancestral step: the mean's weights and the range of the log variance."""

    timestep: Coefficients
    prediction: Prediction
    x0_weight: Coefficients
    x_weight: Coefficients
    log_variance: LogVariance
    noise_weight: Coefficients


class FlowRow(NamedTuple):
    """Ends of one interval of time."""

    timestep: Coefficients
    timestep_next: Coefficients


def prediction_rows(alphas_cumprod: Float[np.ndarray, " S"], predict_fn: PredictFn) -> Prediction:
    """Returns what relates `x_t`, `x_0` and `eps` at given shares of signal.

    Raises:
        ValueError: if there is none somewhere, from where predicted noise cannot lead to the data.
    """
    if predict_fn is posterior.eps_prediction and not (alphas_cumprod > 0).all():
        raise ValueError(
            "sampling starts where there is no signal at all (zero terminal SNR), where a model "
            "that predicts the noise says nothing of the data; use a spacing that leaves the last "
            "timestep out, or a model that predicts v or the data."
        )
    with np.errstate(divide="ignore"):
        return Prediction(
            np.sqrt(1 / alphas_cumprod),
            np.sqrt(1 / alphas_cumprod - 1),
            np.sqrt(alphas_cumprod),
            np.sqrt(1 - alphas_cumprod),
        )


def ddpm_table(process: Schedule, prediction: Prediction, log_variance: LogVariance) -> DDPMRow:
    """Returns the rows of an ancestral sampler that adds noise at every step."""
    return DDPMRow(
        timestep=process.timestep_map,
        prediction=prediction,
        x0_weight=process.posterior_mean_coef1,
        x_weight=process.posterior_mean_coef2,
        log_variance=log_variance,
        noise_weight=np.ones(process.num_timesteps, bool),
    )


def log_variances(process: Schedule) -> LogVariance:
    """Returns the logs of the variances that each step of `process` may have."""
    posterior_log, beta_log = process.posterior_log_variance_clipped, np.log(process.betas)
    return LogVariance(posterior_log, beta_log, np.append(posterior_log[0], beta_log[1:]))


def ddim_table(
    timesteps: np.ndarray, prediction: Prediction, target: np.ndarray, sigma: np.ndarray
) -> DDIMRow:
    """Returns the rows of a DDIM sampler from the signal at each step's end and its new noise."""
    return DDIMRow(
        timestep=timesteps,
        prediction=prediction,
        x0_weight=np.sqrt(target),
        # eta = 1 cancels to a rounding error below zero where the target is the data itself.
        eps_weight=np.sqrt(np.maximum(1 - target - sigma**2, 0)),
        noise_weight=sigma,
    )


def in_sampling_order(table: Tree, *, backwards: bool) -> Tree:
    """Returns the rows in sampling order: integers as int32, everything else as float32."""

    def cast(values: np.ndarray) -> np.ndarray:
        ordered = values[::-1] if backwards else values
        whole = np.issubdtype(values.dtype, np.integer)
        return np.ascontiguousarray(ordered.astype(np.int32 if whole else np.float32))

    return jax.tree.map(cast, table)
