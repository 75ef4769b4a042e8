"""DPM-Solver++ (2M): a second-order multi-step solver of the probability-flow ODE.

Dimension letters: S = number of steps, S1 = S + 1 ends of steps, B = batch.

Lu et al., arXiv:2211.01095, on the predicted data. With `x = signal x_0 + noise eps` and the half
logarithmic SNR `l = ln(signal / noise)`, a step of length h in l is
`x' = noise'/noise x - signal' (e**-h - 1) (x_0 + (x_0 - x_0_last) h / (2 h_last))`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Num

from qdit_jax.diffusion import posterior
from qdit_jax.diffusion.coefficients import in_sampling_order, prediction_rows
from qdit_jax.diffusion.posterior import (
    Coefficients,
    DenoiseFn,
    Latents,
    Limit,
    LimitFn,
    PredictFn,
    Prediction,
)
from qdit_jax.diffusion.respacing import spaced_timesteps
from qdit_jax.diffusion.samplers import Step, evaluated, limit_array
from qdit_jax.diffusion.schedules import Schedule, linear_betas
from qdit_jax.types import Condition

SPACINGS = ("linspace", "leading", "trailing", "continuous")
LEAST_SIGNAL = 2.0**-24  # share of the signal where a schedule has none, as in diffusers
FEW = 10  # steps below which the published continuous variant ends with a first-order one


class DPMRow(NamedTuple):
    """Coefficients of a step: `x' = x_weight x + x0_weight x_0 + change (x_0 - x_0_last)`."""

    timestep: Coefficients
    prediction: Prediction
    x_weight: Coefficients
    x0_weight: Coefficients
    change: Coefficients


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DPMSolver:
    """The multi-step sampler; its state is the data predicted in the last step."""

    table: DPMRow
    clip: Any
    predict_fn: PredictFn = dataclasses.field(metadata={"static": True})
    limit_fn: LimitFn = dataclasses.field(metadata={"static": True})
    stochastic: bool = dataclasses.field(default=False, metadata={"static": True})

    def initial_state(self, x: Latents) -> Latents:
        """Returns zeros, which the first step does not read."""
        return jnp.zeros_like(x)

    def step(
        self,
        denoise_fn: DenoiseFn,
        x: Latents,
        condition: Condition,
        row: DPMRow,
        noise: Latents | None,
        state: Latents,
    ) -> Step:
        """Returns one iteration from `x` and the data predicted before."""
        output = evaluated(denoise_fn, x, row.timestep, condition)
        x0, _ = posterior.predicted(
            self.predict_fn, x, output, row.prediction, self.clip, self.limit_fn
        )
        x_next = x * row.x_weight + x0 * row.x0_weight + (x0 - state) * row.change
        return Step(x, row.timestep, output, x0, x_next, x0.astype(x.dtype))


def dpm_solver_pp(
    steps: int | str = 20,
    *,
    schedule: Schedule | None = None,
    clip: Limit | None = None,
    predict_fn: PredictFn = posterior.eps_prediction,
    limit_fn: LimitFn = posterior.consistent_clip,
    spacing: str | None = None,
) -> DPMSolver:
    """Returns the sampler; `steps`, `schedule` and `clip` as for `ddim`.

    `spacing` of a number of steps is one of diffusers' (`"linspace"` is the default; as many steps
    as the schedule has timesteps visit each), or `"continuous"`: PixArt's authors sample at
    fractional timesteps, evenly spaced from the last to the first, between which `ln signal` is
    linear, and end at the first one, not at the data.

    Raises:
        ValueError: if `steps` or `spacing` do not fit the schedule.
    """
    process = schedule or Schedule(linear_betas())
    visited = spaced_timesteps(process.num_timesteps, steps)
    if spacing is not None and spacing not in SPACINGS:
        raise ValueError(f"spacing={spacing!r} is not known; use one of {', '.join(SPACINGS)}.")
    if spacing is not None and not str(steps).strip().isdecimal():
        raise ValueError(
            f"spacing={spacing!r} does not fit steps={steps!r}; give a number of steps."
        )
    if spacing == "continuous":
        return continuous(process, len(visited), clip, predict_fn, limit_fn)
    if str(steps).strip().isdecimal() and len(visited) < process.num_timesteps:
        visited = multistep_timesteps(process.num_timesteps, len(visited), spacing or "linspace")
    else:
        visited = visited[::-1]
    mapped = process.timestep_map[visited]
    return solver_over(mapped, process.alphas_cumprod[visited], clip, predict_fn, limit_fn)


def multistep_timesteps(
    num_timesteps: int, steps: int, spacing: str, offset: int = 0
) -> Int[np.ndarray, " S"]:
    """Returns the timesteps that diffusers' multi-step solvers visit, descending.

    Raises:
        ValueError: if they are not distinct, or `offset` leads beyond the last one.
    """
    if spacing == "linspace":
        found = np.linspace(0, num_timesteps - 1, steps + 1).round()[:0:-1].astype(np.int64)
    elif spacing == "leading":
        found = np.arange(steps, 0, -1) * (num_timesteps // (steps + 1)) + offset
    else:
        found = np.arange(num_timesteps, 0, -num_timesteps / steps)[:steps]
        found = found.round().astype(np.int64) - 1
    if found[0] >= num_timesteps:
        raise ValueError(
            f"steps={steps} with steps_offset={offset} lead to timestep {found[0]}, but the last is "
            f"{num_timesteps - 1}; use fewer steps."
        )
    if (np.diff(found) >= 0).any():
        raise ValueError(
            f"steps={steps} with spacing {spacing!r} visit a timestep of {num_timesteps} twice; use "
            "fewer steps."
        )
    return found


def solver_over(
    timesteps: Num[np.ndarray, " S"],
    alphas_cumprod: Float[np.ndarray, " S"],
    clip: Limit | None,
    predict_fn: PredictFn,
    limit_fn: LimitFn,
) -> DPMSolver:
    """Returns the sampler from `timesteps`, descending, with these shares of signal, to the data.

    Raises:
        ValueError: if a model of the noise is evaluated where there is no signal.
    """
    prediction_rows(alphas_cumprod, predict_fn)  # checks that
    shares = np.append(np.maximum(alphas_cumprod, LEAST_SIGNAL), 1.0)
    return solver(timesteps, shares, np.arange(len(timesteps)) < 1, clip, predict_fn, limit_fn)


def continuous(
    process: Schedule, steps: int, clip: Limit | None, predict_fn: PredictFn, limit_fn: LimitFn
) -> DPMSolver:
    """Returns the variant of PixArt's authors, see `dpm_solver_pp`."""
    count = process.num_timesteps
    if not np.array_equal(process.timestep_map, np.arange(count)):
        raise ValueError("spacing='continuous' needs a schedule that was not respaced.")
    times = np.linspace(1.0, 1 / count, steps + 1)
    known = np.arange(1, count + 1) / count
    shares = np.exp(np.interp(times, known, np.log(process.alphas_cumprod)))
    index = np.arange(steps)
    first_order = (index == 0) | ((index == steps - 1) & (steps < FEW))
    return solver(times[:-1] * count - 1, shares, first_order, clip, predict_fn, limit_fn)


def solver(
    timesteps: Num[np.ndarray, " S"],
    shares: Float[np.ndarray, " S1"],
    first_order: Bool[np.ndarray, " S"],
    clip: Limit | None,
    predict_fn: PredictFn,
    limit_fn: LimitFn,
) -> DPMSolver:
    """Returns the sampler between given shares of the signal's variance (`alphas_cumprod`).

    `first_order` says which steps do not use the data predicted before; a step to the data itself
    (a share of 1) never does.
    """
    signal, noise = np.sqrt(shares), np.sqrt(1 - shares)
    with np.errstate(divide="ignore"):
        h = np.diff(np.log(signal) - np.log(noise))  # [S], infinite if the last share is 1
    x0_weight = -signal[1:] * np.expm1(-h)
    first_order = first_order | np.isinf(h)
    ratio = np.where(first_order, 0.0, h)  # h / h_last, where it is used
    ratio[1:] /= h[:-1]
    table = DPMRow(
        timestep=timesteps,
        prediction=prediction_rows(shares[:-1], predict_fn),
        x_weight=noise[1:] / noise[:-1],
        x0_weight=x0_weight,
        change=x0_weight * ratio / 2,
    )
    rows = in_sampling_order(table, backwards=False)
    return DPMSolver(rows, limit_array(clip), predict_fn, limit_fn)
