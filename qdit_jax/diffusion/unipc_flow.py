"""UniPC of a velocity: a second-order multi-step predictor, and a corrector without further calls.

Dimension letters: S = number of steps, S1 = S + 1 ends of steps, B = batch.

Unified predictor-corrector (Zhao et al., arXiv:2302.04867), order 2 with `B(h) = e**h - 1` ("bh2"),
predicting the data, on `x = (1 - sigma) data + sigma noise`: the sampler that Wan is published with.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qdit_jax.diffusion.coefficients import in_sampling_order
from qdit_jax.diffusion.flow_matching import chosen_sigmas
from qdit_jax.diffusion.posterior import Coefficients, DenoiseFn, Latents
from qdit_jax.diffusion.samplers import Step, evaluated
from qdit_jax.diffusion.velocity_flow import (
    SIT_TIMES,
    FlowTimes,
    check_units,
    timesteps_of,
    toward_data,
)
from qdit_jax.types import Condition, Numbers

FIRST = 1 - 1e-6  # the noise level in place of 1, whose half logarithmic SNR is infinite
TRAINED = 1000  # timesteps of training, in which published code counts whole ones


class UniPCRow(NamedTuple):
    """Coefficients of a step; m is predicted data, "last" and "before" are one and two steps ago.

    Corrected: `x_c = kept x + last_x x_last + last_m m_last + past (m_before - m_last) + new (m -
    m_last)`. Predicted: `x' = x_weight x_c + m_weight m + change (m_last - m)`.
    """

    timestep: Coefficients
    sigma: Coefficients
    kept: Coefficients
    last_x: Coefficients
    last_m: Coefficients
    past: Coefficients
    new: Coefficients
    x_weight: Coefficients
    m_weight: Coefficients
    change: Coefficients


class UniPCState(NamedTuple):
    """The corrected latents of the last step, and the data predicted one and two steps ago."""

    x: Array
    data: Array
    data_before: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class UniPC:
    """The multi-step sampler; see the module."""

    table: UniPCRow
    stochastic: bool = dataclasses.field(default=False, metadata={"static": True})
    velocity_to: str = dataclasses.field(default="data", metadata={"static": True})

    def initial_state(self, x: Latents) -> UniPCState:
        """Returns zeros, which the first step does not read."""
        return UniPCState(*(jnp.zeros_like(x) for _ in UniPCState._fields))

    def step(
        self,
        denoise_fn: DenoiseFn,
        x: Latents,
        condition: Condition,
        row: UniPCRow,
        noise: Latents | None,
        state: UniPCState,
    ) -> Step:
        """Returns one iteration: corrects `x`, then predicts the next one."""
        velocity_fn = toward_data(denoise_fn, self.velocity_to)
        velocity = evaluated(velocity_fn, x, row.timestep, condition)
        data = x + velocity * row.sigma
        corrected = (
            row.kept * x
            + row.last_x * state.x
            + row.last_m * state.data
            + row.past * (state.data_before - state.data)
            + row.new * (data - state.data)
        )
        x_next = row.x_weight * corrected + row.m_weight * data + row.change * (state.data - data)
        output = velocity if self.velocity_to == "data" else -velocity
        after = UniPCState(corrected, data, state.data)
        after = jax.tree.map(lambda leaf: leaf.astype(x.dtype), after)
        return Step(x, row.timestep, output, data, x_next, after)


def unipc(
    steps: int = 50,
    *,
    shift: float | int | None = None,
    spacing: str | None = None,
    sigmas: Numbers | None = None,
    flow_times: FlowTimes = SIT_TIMES,
    velocity_to: str = "data",
) -> UniPC:
    """Returns the sampler over shifted noise levels.

    A first level of 1 is lowered by 1e-6, as published. A network whose time counts the steps of
    training (`flow_times` such as `(1000.0, 0.0)`) is called at whole timesteps, rounded down from
    `1000 sigma` as published; others get their time as it is.

    Args:
        shift: 1 (the default) for none.
        spacing: of the levels before the shift: `"unipc"` (the default, diffusers') or `"wan"`
            (the authors'), or another one of `flow_match_sigmas`.
        sigmas: the levels themselves, `steps + 1` from 1 to 0, in place of a shift and a spacing.
        flow_times: the network's own time at noise, and at the data.
        velocity_to: where its velocity points, `"data"` or `"noise"`.

    Raises:
        TypeError: if `steps` is not a whole number.
        ValueError: if an option is not understood.
    """
    check_units(flow_times, velocity_to)
    levels = chosen_sigmas(steps, sigmas, shift, spacing, "unipc")
    if levels[0] > FIRST:
        levels = np.append(levels[0] - (1 - FIRST), levels[1:])
    at = levels[:-1]
    if abs(flow_times[0] - flow_times[1]) > 1:
        at = np.floor(at * TRAINED) / TRAINED
    timestep = timesteps_of(1 - at, flow_times)
    table = unipc_table(timestep, levels)
    return UniPC(in_sampling_order(table, backwards=False), velocity_to=velocity_to)


def unipc_table(timestep: Float[np.ndarray, " S"], sigmas: Float[np.ndarray, " S1"]) -> UniPCRow:
    """Returns the rows of noise levels that descend from below 1 to 0."""
    # Float32 before anything else, as published: near 1 the rounding of the level matters.
    sigmas = sigmas.astype(np.float32).astype(np.float64)
    count = len(timestep)
    with np.errstate(divide="ignore"):
        half_log_snr = np.log1p(-sigmas) - np.log(sigmas)
    h = np.diff(half_log_snr)  # [S], the last one infinite
    x_weight = sigmas[1:] / sigmas[:-1]
    m_weight = -(1 - sigmas[1:]) * np.expm1(-h)
    second = np.arange(count) % max(count - 1, 1) > 0  # all but the first and the last step
    before = np.ones(count)  # (half log-SNR one step ago - now) / h, where it is used
    before[1:][second[1:]] = (-h[:-1] / h[1:])[second[1:]]
    change = np.where(second, 0.5 * m_weight / before, 0.0)
    past, new = corrector_weights(h[:-1], before[:-1], second[:-1])
    corrects = np.arange(count) > 0
    return UniPCRow(
        timestep=timestep,
        sigma=sigmas[:-1],
        kept=np.where(corrects, 0.0, 1.0),
        last_x=np.append(0.0, x_weight[:-1]),
        last_m=np.append(0.0, m_weight[:-1]),
        past=np.append(0.0, m_weight[:-1] * past),
        new=np.append(0.0, m_weight[:-1] * new),
        x_weight=x_weight,
        m_weight=m_weight,
        change=change,
    )


def corrector_weights(
    h: Float[np.ndarray, " S"], before: Float[np.ndarray, " S"], second: np.ndarray
) -> tuple[Float[np.ndarray, " S"], Float[np.ndarray, " S"]]:
    """Returns the shares of the earlier and of the new change of the data in a corrected step.

    They solve `a + b = k / P` and `r a + b = 2 (k / -h - 1/2) / P` with `P = e**-h - 1` and `k = P
    / -h - 1`, and the earlier share is `a / r`; a first-order step has 0 and 1/2.
    """
    p = np.expm1(-h)
    k = p / -h - 1
    total, weighted = k / p, 2 * (k / -h - 0.5) / p
    r = np.where(second, before, 0.0)  # never 1: it is negative
    a = (total - weighted) / (1 - r)
    past = np.where(second, a / np.where(second, before, 1.0), 0.0)
    return past, np.where(second, total - a, 0.5)
