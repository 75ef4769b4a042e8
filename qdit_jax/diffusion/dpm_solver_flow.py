"""DPM-Solver++ (2M) of a velocity: the second-order multi-step solver, on a flow's noise levels.

Dimension letters: S = number of steps, S1 = S + 1 ends of steps, B = batch.

Lu et al., arXiv:2211.01095, on the predicted data of `x = (1 - sigma) data + sigma noise`: the sampler
that Sana is published with. With `l = ln((1 - sigma) / sigma)`, a step of length h in l is
`x' = sigma'/sigma x - (1 - sigma') (e**-h - 1) (m + (m - m_last) h / (2 h_last))`.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qdit_jax.diffusion.coefficients import in_sampling_order
from qdit_jax.diffusion.flow_matching import chosen_sigmas
from qdit_jax.diffusion.posterior import Coefficients, DenoiseFn, Latents
from qdit_jax.diffusion.samplers import Step, evaluated
from qdit_jax.diffusion.unipc_flow import FIRST, TRAINED
from qdit_jax.diffusion.velocity_flow import (
    SIT_TIMES,
    FlowTimes,
    check_units,
    timesteps_of,
    toward_data,
)
from qdit_jax.types import Condition, Numbers


class FlowSolverRow(NamedTuple):
    """Coefficients of a step: `x' = x_weight x + data_weight m + change (m - m_last)`."""

    timestep: Coefficients
    sigma: Coefficients
    x_weight: Coefficients
    data_weight: Coefficients
    change: Coefficients


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FlowSolver:
    """The multi-step sampler; its state is the data predicted in the last step."""

    table: FlowSolverRow
    stochastic: bool = dataclasses.field(default=False, metadata={"static": True})
    velocity_to: str = dataclasses.field(default="data", metadata={"static": True})

    def initial_state(self, x: Latents) -> Latents:
        """Returns zeros, which the first step does not read."""
        return jnp.zeros_like(x)

    def step(
        self,
        denoise_fn: DenoiseFn,
        x: Latents,
        condition: Condition,
        row: FlowSolverRow,
        noise: Latents | None,
        state: Latents,
    ) -> Step:
        """Returns one iteration from `x` and the data predicted before."""
        velocity_fn = toward_data(denoise_fn, self.velocity_to)
        velocity = evaluated(velocity_fn, x, row.timestep, condition)
        data = x + velocity * row.sigma
        x_next = row.x_weight * x + row.data_weight * data + row.change * (data - state)
        output = velocity if self.velocity_to == "data" else -velocity
        return Step(x, row.timestep, output, data, jnp.asarray(x_next), data.astype(x.dtype))


def flow_dpm_solver_pp(
    steps: int = 20,
    *,
    shift: float | int | None = None,
    spacing: str | None = None,
    sigmas: Numbers | None = None,
    flow_times: FlowTimes = SIT_TIMES,
    velocity_to: str = "data",
) -> FlowSolver:
    """Returns the sampler over shifted noise levels.

    A first level of 1 is lowered by 1e-6: its half logarithmic SNR is infinite. A network whose time
    counts the steps of training (`flow_times` such as `(1000.0, 0.0)`) is called at whole timesteps,
    rounded down from `1000 sigma` as published; others get their time as it is.

    Args:
        shift: 1 (the default) for none.
        spacing: of the levels before the shift, `"dpm"` by default; see `flow_match_sigmas`.
        sigmas: the levels themselves, `steps + 1` from 1 to 0, in place of a shift and a spacing.
        flow_times: the network's own time at noise, and at the data.
        velocity_to: where its velocity points, `"data"` or `"noise"`.

    Raises:
        TypeError: if `steps` is not a whole number.
        ValueError: if an option is not understood.
    """
    check_units(flow_times, velocity_to)
    levels = chosen_sigmas(steps, sigmas, shift, spacing, "dpm")
    if levels[0] > FIRST:
        levels = np.append(FIRST, levels[1:])
    at = levels[:-1]
    if abs(flow_times[0] - flow_times[1]) > 1:
        at = np.floor(at * TRAINED) / TRAINED
    table = solver_table(timesteps_of(1 - at, flow_times), levels)
    return FlowSolver(in_sampling_order(table, backwards=False), velocity_to=velocity_to)


def solver_table(
    timestep: Float[np.ndarray, " S"], sigmas: Float[np.ndarray, " S1"]
) -> FlowSolverRow:
    """Returns the rows of noise levels that descend from below 1 to 0."""
    with np.errstate(divide="ignore"):
        h = np.diff(np.log1p(-sigmas) - np.log(sigmas))  # [S], the last one infinite
    data_weight = -(1 - sigmas[1:]) * np.expm1(-h)
    ratio = np.where(np.isinf(h), 0.0, h)  # h / h_last, 0 in the first and the last step
    ratio[1:] /= h[:-1]
    ratio[0] = 0.0
    return FlowSolverRow(
        timestep=timestep,
        sigma=sigmas[:-1],
        x_weight=sigmas[1:] / sigmas[:-1],
        data_weight=data_weight,
        change=data_weight * ratio / 2,
    )
