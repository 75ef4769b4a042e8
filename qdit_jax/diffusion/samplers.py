"""Samplers: pytrees of per-step coefficients with the rule of one step.

Dimension letters: S = number of steps, B, H, W, C = a batch of latents.

A sampler's arrays are data: another `eta`, schedule or clipping range of the same length does not
recompile.  Rows are in sampling order.  Every `step` has one signature:
`step(denoise_fn, x, condition, row, noise) -> Step`, with `noise=None` if `stochastic` is False.
A sampler that remembers earlier steps has `initial_state(x)` as well, and its `step` takes the
state as a sixth argument and returns the next one in `Step.state`; see `take_step`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qdit_jax.diffusion import posterior
from qdit_jax.diffusion.coefficients import (
    DDIMRow,
    DDPMRow,
    ddim_table,
    ddpm_table,
    in_sampling_order,
    log_variances,
    prediction_rows,
)
from qdit_jax.diffusion.posterior import (
    DenoiseFn,
    Latents,
    Limit,
    LimitFn,
    LogVariance,
    PredictFn,
    VarianceFn,
)
from qdit_jax.diffusion.respacing import respaced
from qdit_jax.diffusion.schedules import Schedule, linear_betas
from qdit_jax.types import AnyArray, Condition, Scalar, Tree

Row = TypeVar("Row")  # a pytree of coefficients


class Step(NamedTuple):
    """One iteration: the model's input and output, the predicted data, and the next `x`.

    `state` is what the sampler remembers for the next iteration, None if nothing.
    """

    x: Array
    timestep: AnyArray
    output: Array
    x0: Array
    x_next: Array
    state: Tree | None = None


@runtime_checkable
class SingleStepSampler(Protocol[Row]):
    """What the sampling loop needs of a sampler; `Row` is one row of its table."""

    @property
    def table(self) -> Row:
        """Coefficients, one row per step."""

    @property
    def stochastic(self) -> bool:
        """Whether steps need noise."""

    def step(
        self,
        denoise_fn: DenoiseFn,
        x: Latents,
        condition: Condition,
        row: Row,
        noise: Latents | None,
    ) -> Step:
        """Returns one iteration from `x` with the coefficients `row`."""


@runtime_checkable
class MultistepSampler(Protocol[Row]):
    """A sampler that remembers earlier steps, in a pytree of arrays beside `x`."""

    @property
    def table(self) -> Row:
        """Coefficients, one row per step."""

    @property
    def stochastic(self) -> bool:
        """Whether steps need noise."""

    def initial_state(self, x: Latents) -> Tree:
        """Returns the state before the first step from `x`, of the shapes that every step has."""

    def step(
        self,
        denoise_fn: DenoiseFn,
        x: Latents,
        condition: Condition,
        row: Row,
        noise: Latents | None,
        state: Tree,
    ) -> Step:
        """Returns one iteration from `x` and `state`, the next state in it."""


Sampler: TypeAlias = SingleStepSampler | MultistepSampler


def initial_state(sampler: Sampler, x: Latents) -> Tree | None:
    """Returns what a sampler remembers before its first step from `x`; None if nothing ever."""
    return sampler.initial_state(x) if isinstance(sampler, MultistepSampler) else None


def take_step(
    sampler: Sampler,
    denoise_fn: DenoiseFn,
    x: Latents,
    state: Tree | None,
    condition: Condition,
    row: Tree,
    noise: Latents | None,
) -> Step:
    """Returns one iteration of any sampler from `x` and what it remembers, see `initial_state`."""
    if isinstance(sampler, MultistepSampler):
        return sampler.step(denoise_fn, x, condition, row, noise, state)
    return sampler.step(denoise_fn, x, condition, row, noise)


def evaluated(denoise_fn: DenoiseFn, x: Latents, timestep: Scalar, condition: Condition) -> Array:
    """Returns the model's output with one scalar `timestep` for the whole batch."""
    return denoise_fn(x, jnp.full((x.shape[0],), timestep), condition)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DDIM:
    """Denoising diffusion implicit model (Song et al., arXiv:2010.02502), in either direction."""

    table: DDIMRow
    clip: Any
    predict_fn: PredictFn = dataclasses.field(metadata={"static": True})
    stochastic: bool = dataclasses.field(metadata={"static": True})
    limit_fn: LimitFn = dataclasses.field(
        default=posterior.consistent_clip, metadata={"static": True}
    )

    def step(
        self,
        denoise_fn: DenoiseFn,
        x: Latents,
        condition: Condition,
        row: DDIMRow,
        noise: Latents | None,
    ) -> Step:
        """Returns one iteration from `x` with the coefficients `row`."""
        output = evaluated(denoise_fn, x, row.timestep, condition)
        x0, eps = posterior.predicted(
            self.predict_fn, x, output, row.prediction, self.clip, self.limit_fn
        )
        x_next = x0 * row.x0_weight + eps * row.eps_weight
        if self.stochastic:
            assert noise is not None  # the loop draws it
            x_next = x_next + noise * row.noise_weight
        return Step(x, row.timestep, output, x0, x_next)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DDPM:
    """Ancestral sampling (Ho et al., arXiv:2006.11239) with a learned or fixed variance."""

    table: DDPMRow
    clip: Any
    predict_fn: PredictFn = dataclasses.field(metadata={"static": True})
    variance_fn: VarianceFn = dataclasses.field(metadata={"static": True})
    stochastic: bool = dataclasses.field(default=True, metadata={"static": True})
    limit_fn: LimitFn = dataclasses.field(
        default=posterior.consistent_clip, metadata={"static": True}
    )

    def step(
        self,
        denoise_fn: DenoiseFn,
        x: Latents,
        condition: Condition,
        row: DDPMRow,
        noise: Latents | None,
    ) -> Step:
        """Returns one iteration from `x` with the coefficients `row`."""
        output = evaluated(denoise_fn, x, row.timestep, condition)
        mean, log_variance, x0 = self.moments(x, output, row)
        assert noise is not None  # the loop draws it
        x_next = mean + jnp.exp(0.5 * log_variance) * row.noise_weight * noise
        return Step(x, row.timestep, output, x0, x_next)

    def moments(self, x: Latents, output: Array, row: DDPMRow) -> tuple[Latents, Latents, Latents]:
        """Returns the mean and log variance of the step before, and the predicted `x_0`."""
        x0, _ = posterior.predicted(
            self.predict_fn, x, output, row.prediction, self.clip, self.limit_fn
        )
        mean = x0 * row.x0_weight + x * row.x_weight
        return mean, self.variance_fn(x, output, row.log_variance), x0


def ddim(
    steps: int | str = 50,
    eta: float | int = 0.0,
    *,
    schedule: Schedule | None = None,
    clip: Limit | None = None,
    predict_fn: PredictFn = posterior.eps_prediction,
    limit_fn: LimitFn = posterior.consistent_clip,
) -> DDIM:
    """Returns the DDIM sampler; `eta=0` is deterministic, `eta=1` has DDPM's variance.

    `steps` is a number or a published spacing (`"ddim25"`, `"10,15,20"`).  `schedule` is the
    process that the model was trained on, by default 1000 linear timesteps.  `clip` is passed
    to `limit_fn`: the range of the predicted data, whose default recomputes `eps` from the clipped
    data.

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
    clip: Limit | None = None,
    predict_fn: PredictFn = posterior.eps_prediction,
    limit_fn: LimitFn = posterior.consistent_clip,
) -> DDIM:
    """Returns the DDIM sampler of given shares of signal, ordered from data to noise.

    At `timesteps[i]` the signal's share of the variance (`alphas_cumprod`) is `now[i]`, and
    the step from there arrives at `target[i]`.

    Raises:
        ValueError: if `eta` is not in [0, 1], or a model of the noise is evaluated where there is
            no signal.
    """
    if not 0 <= eta <= 1:
        raise ValueError(
            f"eta={eta} is not supported; use 0 (deterministic) to 1 (as noisy as DDPM)."
        )
    sigma = eta * np.sqrt((1 - target) / (1 - now)) * np.sqrt(1 - now / target)
    table = ddim_table(timesteps, prediction_rows(now, predict_fn), target, sigma)
    rows = in_sampling_order(table, backwards=True)
    return DDIM(rows, limit_array(clip), predict_fn, eta > 0, limit_fn)


def reverse_ddim(
    steps: int | str = 50,
    *,
    schedule: Schedule | None = None,
    clip: float | int | None = None,
    predict_fn: PredictFn = posterior.eps_prediction,
) -> DDIM:
    """Returns the sampler that runs deterministic DDIM from data to noise (inversion).

    The last step of the published rule goes to a signal of exactly 0, that is to `eps` itself.

    Raises:
        ValueError: if `steps` does not fit the schedule.
    """
    process = respaced(schedule or Schedule(linear_betas()), steps)
    table = ddim_table(
        process.timestep_map,
        prediction_rows(process.alphas_cumprod, predict_fn),
        process.alphas_cumprod_next,
        np.zeros(process.num_timesteps),
    )
    rows = in_sampling_order(table, backwards=False)
    return DDIM(rows, limit_array(clip), predict_fn, stochastic=False)


def ddpm(
    steps: int | str = 250,
    *,
    schedule: Schedule | None = None,
    clip: Limit | None = None,
    predict_fn: PredictFn = posterior.eps_prediction,
    variance_fn: VarianceFn = posterior.learned_range,
    limit_fn: LimitFn = posterior.consistent_clip,
) -> DDPM:
    """Returns the ancestral sampler; `steps`, `schedule` as for `ddim`.

    Raises:
        ValueError: if `steps` does not fit the schedule.
    """
    process = respaced(schedule or Schedule(linear_betas()), steps)
    # The last step adds no noise.
    adds_noise = np.arange(process.num_timesteps) > 0
    log_variance = log_variances(process)
    table = ddpm_table(process, prediction_rows(process.alphas_cumprod, predict_fn), log_variance)
    rows = in_sampling_order(table._replace(noise_weight=adds_noise), backwards=True)
    return DDPM(rows, limit_array(clip), predict_fn, variance_fn, limit_fn=limit_fn)


def ddpm_sampler(
    process: Schedule,
    adds_noise: Bool[np.ndarray, " S"],
    clip: Limit | None = None,
    predict_fn: PredictFn = posterior.eps_prediction,
    variance_fn: VarianceFn = posterior.learned_range,
    limit_fn: LimitFn = posterior.consistent_clip,
) -> DDPM:
    """Returns the ancestral sampler of a process with the variances as they are.

    Differs from `ddpm` in the first posterior variance, which is 0: `ddpm` replaces it by the
    second, this by 1e-20. `adds_noise` says which steps add noise, ordered from data to noise.
    """
    variance = np.log(np.maximum(process.posterior_variance, 1e-20))
    betas = np.log(process.betas)
    log_variance = LogVariance(variance, betas, betas)
    table = ddpm_table(process, prediction_rows(process.alphas_cumprod, predict_fn), log_variance)
    rows = in_sampling_order(table._replace(noise_weight=adds_noise), backwards=True)
    return DDPM(rows, limit_array(clip), predict_fn, variance_fn, limit_fn=limit_fn)


def limit_array(clip: Limit | None) -> np.float32 | tuple[np.float32, ...] | None:
    if clip is not None and not np.all(np.asarray(clip) > 0):
        raise ValueError(f"clip={clip} is not supported; use a positive range, or None.")
    return jax.tree.map(np.float32, clip)
