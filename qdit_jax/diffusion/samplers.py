"""Samplers: pytrees of per-step coefficients with the rule of one step.

Dimension letters: S = number of steps, B, H, W, C = a batch of latents.

A sampler's arrays are data: another `eta`, schedule or clipping range of the same length does not
recompile.  Rows are in the order in which they are walked.  Every `step` has one signature:
`step(denoise_fn, x, condition, row, noise) -> Step`, with `noise=None` if `stochastic` is False.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from qdit_jax.diffusion import posterior
from qdit_jax.diffusion.posterior import LogVariance, Prediction
from qdit_jax.diffusion.respacing import respaced
from qdit_jax.diffusion.schedules import Schedule, linear_betas

DenoiseFn = Callable[..., Any]  # (x [B,H,W,C], timestep [B], condition) -> [B,H,W,O]


class Step(NamedTuple):
    """One iteration: what the model was given, what it returned, and what followed."""

    x: Any
    timestep: Any
    output: Any
    x0: Any
    x_next: Any


@runtime_checkable
class Sampler(Protocol):
    """What the sampling loop asks of a sampler."""

    @property
    def table(self) -> Any:
        """Coefficients, one row a step."""

    @property
    def stochastic(self) -> bool:
        """Whether steps need noise."""

    def step(self, denoise_fn: DenoiseFn, x: Any, condition: Any, row: Any, noise: Any) -> Step:
        """Returns one iteration from `x` with the coefficients `row`."""


def evaluated(denoise_fn: DenoiseFn, x: Any, timestep: Any, condition: Any) -> Any:
    """Returns the model's output with one scalar `timestep` for the whole batch."""
    return denoise_fn(x, jnp.full((x.shape[0],), timestep), condition)


class DDIMRow(NamedTuple):
    """Coefficients of a DDIM step: `x' = x0_weight x_0 + eps_weight eps + noise_weight noise`."""

    timestep: Any
    prediction: Prediction
    x0_weight: Any
    eps_weight: Any
    noise_weight: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DDIM:
    """Denoising diffusion implicit model (Song et al., arXiv:2010.02502), in either direction."""

    table: Any
    clip: Any
    predict_fn: Callable = dataclasses.field(metadata={"static": True})
    stochastic: bool = dataclasses.field(metadata={"static": True})

    def step(self, denoise_fn: DenoiseFn, x: Any, condition: Any, row: Any, noise: Any) -> Step:
        """Returns one iteration from `x` with the coefficients `row`."""
        output = evaluated(denoise_fn, x, row.timestep, condition)
        x0, eps = posterior.predicted(self.predict_fn, x, output, row.prediction, self.clip)
        x_next = row.x0_weight * x0 + row.eps_weight * eps
        if self.stochastic:
            x_next = x_next + row.noise_weight * noise
        return Step(x, row.timestep, output, x0, x_next)


class DDPMRow(NamedTuple):
    """Coefficients of an ancestral step: the mean's weights and the range of the log variance."""

    timestep: Any
    prediction: Prediction
    x0_weight: Any
    x_weight: Any
    log_variance: LogVariance
    noise_weight: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DDPM:
    """Ancestral sampling (Ho et al., arXiv:2006.11239) with a learned or fixed variance."""

    table: Any
    clip: Any
    predict_fn: Callable = dataclasses.field(metadata={"static": True})
    variance_fn: Callable = dataclasses.field(metadata={"static": True})
    stochastic: bool = dataclasses.field(default=True, metadata={"static": True})

    def step(self, denoise_fn: DenoiseFn, x: Any, condition: Any, row: Any, noise: Any) -> Step:
        """Returns one iteration from `x` with the coefficients `row`."""
        output = evaluated(denoise_fn, x, row.timestep, condition)
        mean, log_variance, x0 = self.moments(x, output, row)
        x_next = mean + row.noise_weight * jnp.exp(0.5 * log_variance) * noise
        return Step(x, row.timestep, output, x0, x_next)

    def moments(self, x: Any, output: Any, row: Any) -> tuple[Any, Any, Any]:
        """Returns the mean and log variance of the step before, and the predicted `x_0`."""
        x0, _ = posterior.predicted(self.predict_fn, x, output, row.prediction, self.clip)
        mean = row.x0_weight * x0 + row.x_weight * x
        return mean, self.variance_fn(x, output, row.log_variance), x0


class FlowRow(NamedTuple):
    """Ends of one interval of time."""

    timestep: Any
    timestep_next: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Flow:
    """The probability-flow ODE of a model that predicts the velocity `x_data - x_noise`."""

    table: Any
    solve_fn: Callable = dataclasses.field(metadata={"static": True})
    stochastic: bool = dataclasses.field(default=False, metadata={"static": True})

    def step(self, denoise_fn: DenoiseFn, x: Any, condition: Any, row: Any, noise: Any) -> Step:
        """Returns one iteration from `x` over the interval `row`."""
        velocity = evaluated(denoise_fn, x, row.timestep, condition)
        if velocity.shape != x.shape:
            raise ValueError(
                f"the model returned {velocity.shape} for latents {x.shape}; a flow needs a "
                "velocity of the same shape."
            )
        velocity = velocity.astype(x.dtype)
        x_next = self.solve_fn(denoise_fn, x, velocity, condition, row)
        return Step(x, row.timestep, velocity, x + (1 - row.timestep) * velocity, x_next)


def euler(denoise_fn: DenoiseFn, x: Any, velocity: Any, condition: Any, row: FlowRow) -> Any:
    """Returns `x` at the interval's end by Euler's rule: first order, one evaluation."""
    return x + (row.timestep_next - row.timestep) * velocity


def heun(denoise_fn: DenoiseFn, x: Any, velocity: Any, condition: Any, row: FlowRow) -> Any:
    """Returns `x` at the interval's end by Heun's rule: second order, two evaluations."""
    guess = euler(denoise_fn, x, velocity, condition, row)
    end = evaluated(denoise_fn, guess, row.timestep_next, condition).astype(x.dtype)
    return x + (row.timestep_next - row.timestep) * (velocity + end) / 2


def ddim(
    steps: int | str = 50,
    eta: float | int = 0.0,
    *,
    schedule: Schedule | None = None,
    clip: float | int | None = None,
    predict_fn: Callable = posterior.eps_prediction,
) -> DDIM:
    """Returns the DDIM sampler; `eta=0` is deterministic, `eta=1` has DDPM's variance.

    `steps` is a number or a published spacing (`"ddim25"`, `"10,15,20"`).  `schedule` is the
    process that the model was trained on, by default 1000 linear timesteps.

    Raises:
        ValueError: if `eta` is not in [0, 1], or `steps` does not fit the schedule.
    """
    if not 0 <= eta <= 1:
        raise ValueError(
            f"eta={eta} is not supported; use 0 (deterministic) to 1 (as noisy as DDPM)."
        )
    process = respaced(schedule or Schedule(linear_betas()), steps)
    now, target = process.alphas_cumprod, process.alphas_cumprod_prev
    sigma = eta * np.sqrt((1 - target) / (1 - now)) * np.sqrt(1 - now / target)
    table = _ddim_table(process, target, sigma)
    return DDIM(_walked(table, backwards=True), _clip(clip), predict_fn, stochastic=eta > 0)


def reverse_ddim(
    steps: int | str = 50,
    *,
    schedule: Schedule | None = None,
    clip: float | int | None = None,
    predict_fn: Callable = posterior.eps_prediction,
) -> DDIM:
    """Returns the sampler that walks deterministic DDIM from data to noise.

    The last step of the published rule goes to a signal of exactly 0, that is to `eps` itself.

    Raises:
        ValueError: if `steps` does not fit the schedule.
    """
    process = respaced(schedule or Schedule(linear_betas()), steps)
    table = _ddim_table(process, process.alphas_cumprod_next, np.zeros(process.num_timesteps))
    return DDIM(_walked(table, backwards=False), _clip(clip), predict_fn, stochastic=False)


def ddpm(
    steps: int | str = 250,
    *,
    schedule: Schedule | None = None,
    clip: float | int | None = None,
    predict_fn: Callable = posterior.eps_prediction,
    variance_fn: Callable = posterior.learned_range,
) -> DDPM:
    """Returns the ancestral sampler; `steps`, `schedule` as for `ddim`.

    Raises:
        ValueError: if `steps` does not fit the schedule.
    """
    process = respaced(schedule or Schedule(linear_betas()), steps)
    table = DDPMRow(
        timestep=process.timestep_map,
        prediction=_prediction(process),
        x0_weight=process.posterior_mean_coef1,
        x_weight=process.posterior_mean_coef2,
        log_variance=_log_variance(process),
        noise_weight=np.arange(process.num_timesteps) > 0,  # the last step adds no noise
    )
    return DDPM(_walked(table, backwards=True), _clip(clip), predict_fn, variance_fn)


def flow(steps: int = 50, *, solve_fn: Callable = euler) -> Flow:
    """Returns the sampler of a velocity model, `steps` equal intervals of time from 0 to 1.

    Time is 0 at noise and 1 at data and reaches the model unscaled, as in SiT (arXiv:2401.08740).

    Differs from SiT's script, whose number of steps counts the ends of the intervals: its fixed
    grid of N points is `flow(N - 1)`.

    Raises:
        ValueError: if `steps` is not a positive whole number.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} is not supported; use a positive whole number.")
    edges = np.linspace(0.0, 1.0, steps + 1)
    return Flow(_walked(FlowRow(edges[:-1], edges[1:]), backwards=False), solve_fn)


def _prediction(process: Schedule) -> Prediction:
    return Prediction(process.sqrt_recip_alphas_cumprod, process.sqrt_recipm1_alphas_cumprod)


def _log_variance(process: Schedule) -> LogVariance:
    posterior_log, beta_log = process.posterior_log_variance_clipped, np.log(process.betas)
    return LogVariance(posterior_log, beta_log, np.append(posterior_log[0], beta_log[1:]))


def _ddim_table(process: Schedule, target: np.ndarray, sigma: np.ndarray) -> DDIMRow:
    return DDIMRow(
        timestep=process.timestep_map,
        prediction=_prediction(process),
        x0_weight=np.sqrt(target),
        # eta = 1 cancels to a rounding error below zero where the target is the data itself.
        eps_weight=np.sqrt(np.maximum(1 - target - sigma**2, 0)),
        noise_weight=sigma,
    )


def _clip(clip: float | int | None) -> np.float32 | None:
    if clip is not None and not clip > 0:
        raise ValueError(f"clip={clip} is not supported; use a positive range, or None.")
    return None if clip is None else np.float32(clip)


def _walked(table: Any, *, backwards: bool) -> Any:
    """Returns the rows in walking order: whole numbers as int32, everything else as float32."""

    def cast(values: np.ndarray) -> np.ndarray:
        ordered = values[::-1] if backwards else values
        whole = np.issubdtype(values.dtype, np.integer)
        return np.ascontiguousarray(ordered.astype(np.int32 if whole else np.float32))

    return jax.tree.map(cast, table)
