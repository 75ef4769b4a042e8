"""Samplers: pytrees of per-step coefficients with the rule of one step.

Dimension letters: S = number of steps, B, H, W, C = a batch of latents.

A sampler's arrays are data: another `eta`, schedule or clipping range of the same length does not
recompile.  Rows are in sampling order.  Every `step` has one signature:
`step(denoise_fn, x, condition, row, noise) -> Step`, with `noise=None` if `stochastic` is False.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from qdit_jax.diffusion import posterior
from qdit_jax.diffusion.posterior import LogVariance, Prediction
from qdit_jax.diffusion.respacing import respaced
from qdit_jax.diffusion.schedules import Schedule, linear_betas
from qdit_jax.errors import check_counts

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
        """Coefficients, one row per step."""

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
    limit_fn: Callable = dataclasses.field(
        default=posterior.consistent_clip, metadata={"static": True}
    )

    def step(self, denoise_fn: DenoiseFn, x: Any, condition: Any, row: Any, noise: Any) -> Step:
        """Returns one iteration from `x` with the coefficients `row`."""
        output = evaluated(denoise_fn, x, row.timestep, condition)
        x0, eps = posterior.predicted(
            self.predict_fn, x, output, row.prediction, self.clip, self.limit_fn
        )
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
    limit_fn: Callable = dataclasses.field(
        default=posterior.consistent_clip, metadata={"static": True}
    )

    def step(self, denoise_fn: DenoiseFn, x: Any, condition: Any, row: Any, noise: Any) -> Step:
        """Returns one iteration from `x` with the coefficients `row`."""
        output = evaluated(denoise_fn, x, row.timestep, condition)
        mean, log_variance, x0 = self.moments(x, output, row)
        x_next = mean + row.noise_weight * jnp.exp(0.5 * log_variance) * noise
        return Step(x, row.timestep, output, x0, x_next)

    def moments(self, x: Any, output: Any, row: Any) -> tuple[Any, Any, Any]:
        """Returns the mean and log variance of the step before, and the predicted `x_0`."""
        x0, _ = posterior.predicted(
            self.predict_fn, x, output, row.prediction, self.clip, self.limit_fn
        )
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
    clip: Any = None,
    predict_fn: Callable = posterior.eps_prediction,
    limit_fn: Callable = posterior.consistent_clip,
) -> DDIM:
    """Returns the DDIM sampler; `eta=0` is deterministic, `eta=1` has DDPM's variance.

    `steps` is a number or a published spacing (`"ddim25"`, `"10,15,20"`).  `schedule` is the
    process that the model was trained on, by default 1000 linear timesteps.  `clip` is what
    `limit_fn` takes: the range of the predicted data, by default with `eps` made consistent.

    Raises:
        ValueError: if `eta` is not in [0, 1], or `steps` does not fit the schedule.
    """
    process = respaced(schedule or Schedule(linear_betas()), steps)
    now, target = process.alphas_cumprod, process.alphas_cumprod_prev
    return ddim_sampler(process.timestep_map, now, target, eta, clip, predict_fn, limit_fn)


def ddim_sampler(
    timesteps: Int[np.ndarray, " S"],
    now: Float[np.ndarray, " S"],
    target: Float[np.ndarray, " S"],
    eta: float | int = 0.0,
    clip: Any = None,
    predict_fn: Callable = posterior.eps_prediction,
    limit_fn: Callable = posterior.consistent_clip,
) -> DDIM:
    """Returns the DDIM sampler from given shares of signal, rows from data to noise.

    At `timesteps[i]` the signal's share of the variance (`alphas_cumprod`) is `now[i]`, and
    the step from there arrives at `target[i]`.

    Raises:
        ValueError: if `eta` is not in [0, 1], or a model of the noise is asked where there is no
            signal.
    """
    if not 0 <= eta <= 1:
        raise ValueError(
            f"eta={eta} is not supported; use 0 (deterministic) to 1 (as noisy as DDPM)."
        )
    sigma = eta * np.sqrt((1 - target) / (1 - now)) * np.sqrt(1 - now / target)
    table = _ddim_table(timesteps, prediction_rows(now, predict_fn), target, sigma)
    rows = _in_sampling_order(table, backwards=True)
    return DDIM(rows, _clip(clip), predict_fn, eta > 0, limit_fn)


def reverse_ddim(
    steps: int | str = 50,
    *,
    schedule: Schedule | None = None,
    clip: float | int | None = None,
    predict_fn: Callable = posterior.eps_prediction,
) -> DDIM:
    """Returns the sampler that runs deterministic DDIM from data to noise (inversion).

    The last step of the published rule goes to a signal of exactly 0, that is to `eps` itself.

    Raises:
        ValueError: if `steps` does not fit the schedule.
    """
    process = respaced(schedule or Schedule(linear_betas()), steps)
    table = _ddim_table(
        process.timestep_map,
        prediction_rows(process.alphas_cumprod, predict_fn),
        process.alphas_cumprod_next,
        np.zeros(process.num_timesteps),
    )
    rows = _in_sampling_order(table, backwards=False)
    return DDIM(rows, _clip(clip), predict_fn, stochastic=False)


def ddpm(
    steps: int | str = 250,
    *,
    schedule: Schedule | None = None,
    clip: Any = None,
    predict_fn: Callable = posterior.eps_prediction,
    variance_fn: posterior.VarianceFn = posterior.learned_range,
    limit_fn: Callable = posterior.consistent_clip,
) -> DDPM:
    """Returns the ancestral sampler; `steps`, `schedule` as for `ddim`.

    Raises:
        ValueError: if `steps` does not fit the schedule.
    """
    process = respaced(schedule or Schedule(linear_betas()), steps)
    # The last step adds no noise.
    adds_noise = np.arange(process.num_timesteps) > 0
    log_variance = _log_variance(process)
    table = ddpm_table(process, prediction_rows(process.alphas_cumprod, predict_fn), log_variance)
    rows = _in_sampling_order(table._replace(noise_weight=adds_noise), backwards=True)
    return DDPM(rows, _clip(clip), predict_fn, variance_fn, limit_fn=limit_fn)


def ddpm_sampler(
    process: Schedule,
    adds_noise: Bool[np.ndarray, " S"],
    clip: Any = None,
    predict_fn: Callable = posterior.eps_prediction,
    variance_fn: posterior.VarianceFn = posterior.learned_range,
    limit_fn: Callable = posterior.consistent_clip,
) -> DDPM:
    """Returns the ancestral sampler of a process with the variances as they are.

    Differs from `ddpm`, which takes the second posterior variance for the first, which is 0: here
    that one is 1e-20. `adds_noise` says which steps add noise, from data to noise.
    """
    variance = np.log(np.maximum(process.posterior_variance, 1e-20))
    betas = np.log(process.betas)
    log_variance = LogVariance(variance, betas, betas)
    table = ddpm_table(process, prediction_rows(process.alphas_cumprod, predict_fn), log_variance)
    rows = _in_sampling_order(table._replace(noise_weight=adds_noise), backwards=True)
    return DDPM(rows, _clip(clip), predict_fn, variance_fn, limit_fn=limit_fn)


def flow(steps: int = 50, *, solve_fn: Callable = euler, edges: Any = None) -> Flow:
    """Returns the sampler of a velocity model, `steps` equal intervals of time from 0 to 1.

    Time is 0 at noise and 1 at data and reaches the model unscaled, as in SiT (arXiv:2401.08740).
    `edges`, ascending from 0 to 1, are the ends of the intervals in place of equal ones.

    Differs from SiT's script, whose number of steps counts the ends of the intervals: its fixed
    grid of N points is `flow(N - 1)`.

    Raises:
        TypeError: if `steps` is no whole number.
        ValueError: if `steps` is not positive, or does not fit `edges`.
    """
    check_counts(steps=steps)
    times = np.linspace(0.0, 1.0, steps + 1) if edges is None else np.asarray(edges, np.float64)
    if (
        times.shape != (steps + 1,)
        or times[0] != 0
        or times[-1] != 1
        or (np.diff(times) <= 0).any()
    ):
        raise ValueError(f"edges={edges} do not ascend from 0 to 1 in steps={steps} intervals.")
    return Flow(_in_sampling_order(FlowRow(times[:-1], times[1:]), backwards=False), solve_fn)


def prediction_rows(alphas_cumprod: Float[np.ndarray, " S"], predict_fn: Callable) -> Prediction:
    """Returns what relates `x_t`, `x_0` and `eps` at given shares of signal.

    Raises:
        ValueError: if there is none somewhere, from where predicted noise cannot lead to the data.
    """
    if predict_fn is posterior.eps_prediction and not (alphas_cumprod > 0).all():
        raise ValueError(
            "the walk starts where there is no signal at all (zero terminal SNR), where a model "
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


def _log_variance(process: Schedule) -> LogVariance:
    posterior_log, beta_log = process.posterior_log_variance_clipped, np.log(process.betas)
    return LogVariance(posterior_log, beta_log, np.append(posterior_log[0], beta_log[1:]))


def _ddim_table(
    timesteps: np.ndarray, prediction: Prediction, target: np.ndarray, sigma: np.ndarray
) -> DDIMRow:
    return DDIMRow(
        timestep=timesteps,
        prediction=prediction,
        x0_weight=np.sqrt(target),
        # eta = 1 cancels to a rounding error below zero where the target is the data itself.
        eps_weight=np.sqrt(np.maximum(1 - target - sigma**2, 0)),
        noise_weight=sigma,
    )


def _clip(clip: Any) -> Any:
    if clip is not None and not np.all(np.asarray(clip) > 0):
        raise ValueError(f"clip={clip} is not supported; use a positive range, or None.")
    return jax.tree.map(np.float32, clip)


def _in_sampling_order(table: Any, *, backwards: bool) -> Any:
    """Returns the rows in sampling order: integers as int32, everything else as float32."""

    def cast(values: np.ndarray) -> np.ndarray:
        ordered = values[::-1] if backwards else values
        whole = np.issubdtype(values.dtype, np.integer)
        return np.ascontiguousarray(ordered.astype(np.int32 if whole else np.float32))

    return jax.tree.map(cast, table)
