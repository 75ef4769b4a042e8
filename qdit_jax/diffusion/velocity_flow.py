"""The probability-flow ODE of a velocity: Euler's or Heun's rule over intervals of time.

Dimension letters: S = number of steps, B, H, W, C = a batch of latents.

Samplers count time from 0 at noise to 1 at the data and follow velocities that point to the data;
`x = (1 - time) noise + time data`, and the noise level is `sigma = 1 - time`.  A network has units
and a direction of its own, `models.Network.flow_times` and `velocity_to`: it is called with its own
timesteps (`timesteps_of`), and its velocity is turned in one place (`toward_data`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Array, Float, Num

from qdit_jax.diffusion.coefficients import FlowRow, in_sampling_order
from qdit_jax.diffusion.posterior import DenoiseFn, Latents
from qdit_jax.diffusion.samplers import Step, evaluated
from qdit_jax.errors import check_counts
from qdit_jax.types import AnyArray, Condition, Numbers

# (velocity_fn, x, velocity, condition, row) -> x at the interval's end; velocity_fn and row in time
# from 0 at noise to 1 at the data
SolveFn = Callable[[DenoiseFn, Latents, Latents, Condition, FlowRow], Latents]
FlowTimes = tuple[float, float]  # a network's time at noise, and at the data
SIT_TIMES: FlowTimes = (0.0, 1.0)
DIRECTIONS = ("data", "noise")


def timesteps_of(times: Float[AnyArray, " S"], flow_times: FlowTimes) -> Float[AnyArray, " S"]:
    """Returns a network's timesteps at `times`, which run from 0 at noise to 1 at the data."""
    at_noise, at_data = flow_times
    return at_noise + (at_data - at_noise) * times


def check_units(flow_times: FlowTimes, velocity_to: str) -> None:
    """Raises `ValueError` unless these describe the times and the direction of a velocity."""
    found = np.asarray(flow_times, np.float64)
    if found.shape != (2,) or not np.isfinite(found).all() or found[0] == found[1]:
        raise ValueError(
            f"flow_times={flow_times} are not supported; give the network's time at noise and its "
            "time at the data, such as (1000.0, 0.0)."
        )
    if velocity_to not in DIRECTIONS:
        raise ValueError(
            f"velocity_to={velocity_to!r} is not known; use 'data', or 'noise' where the network's "
            "velocity points from the data to the noise."
        )


def toward_data(denoise_fn: DenoiseFn, velocity_to: str) -> DenoiseFn:
    """Returns `denoise_fn` with its velocity pointing to the data, in the dtype of `x`."""

    def velocity_fn(x: Latents, timestep: Num[Array, " B"], condition: Condition) -> Latents:
        velocity = denoise_fn(x, timestep, condition)
        if velocity.shape != x.shape:
            raise ValueError(
                f"the model returned {velocity.shape} for latents {x.shape}; a flow needs a "
                "velocity of the same shape."
            )
        velocity = velocity.astype(x.dtype)
        return velocity if velocity_to == "data" else -velocity

    return velocity_fn


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Flow:
    """The probability-flow ODE of a model that predicts a velocity between noise and data."""

    table: FlowRow
    solve_fn: SolveFn = dataclasses.field(metadata={"static": True})
    stochastic: bool = dataclasses.field(default=False, metadata={"static": True})
    flow_times: FlowTimes = dataclasses.field(default=SIT_TIMES, metadata={"static": True})
    velocity_to: str = dataclasses.field(default="data", metadata={"static": True})

    def step(
        self,
        denoise_fn: DenoiseFn,
        x: Latents,
        condition: Condition,
        row: FlowRow,
        noise: Latents | None,
    ) -> Step:
        """Returns one iteration from `x` over the interval `row`."""
        turned = toward_data(denoise_fn, self.velocity_to)
        velocity = evaluated(turned, x, row.timestep, condition)

        def velocity_fn(x: Latents, time: Num[Array, " B"], condition: Condition) -> Latents:
            return turned(x, timesteps_of(time, self.flow_times), condition)

        at_noise, at_data = self.flow_times
        times = FlowRow(*((timestep - at_noise) / (at_data - at_noise) for timestep in row))
        x_next = self.solve_fn(velocity_fn, x, velocity, condition, times)
        output = velocity if self.velocity_to == "data" else -velocity
        return Step(x, row.timestep, output, x + velocity * (1 - times.timestep), x_next)


def euler(
    velocity_fn: DenoiseFn, x: Latents, velocity: Latents, condition: Condition, row: FlowRow
) -> Latents:
    """Returns `x` at the interval's end by Euler's rule: first order, one evaluation."""
    return x + velocity * (row.timestep_next - row.timestep)


def heun(
    velocity_fn: DenoiseFn, x: Latents, velocity: Latents, condition: Condition, row: FlowRow
) -> Latents:
    """Returns `x` at the interval's end by Heun's rule: second order, two evaluations."""
    guess = euler(velocity_fn, x, velocity, condition, row)
    end = evaluated(velocity_fn, guess, row.timestep_next, condition)
    return x + (velocity + end) * (row.timestep_next - row.timestep) / 2


def flow_over(
    times: Float[np.ndarray, " S1"], solve_fn: SolveFn, flow_times: FlowTimes, velocity_to: str
) -> Flow:
    """Returns the sampler over intervals between `times`, for a network of these units."""
    check_units(flow_times, velocity_to)
    at_noise, at_data = (float(time) for time in flow_times)
    timesteps = timesteps_of(times, (at_noise, at_data))
    rows = in_sampling_order(FlowRow(timesteps[:-1], timesteps[1:]), backwards=False)
    return Flow(rows, solve_fn, flow_times=(at_noise, at_data), velocity_to=velocity_to)


def flow(
    steps: int = 50,
    *,
    solve_fn: SolveFn = euler,
    edges: Numbers | None = None,
    flow_times: FlowTimes = SIT_TIMES,
    velocity_to: str = "data",
) -> Flow:
    """Returns the sampler of a velocity model, `steps` equal intervals of time from 0 to 1.

    Time is 0 at noise and 1 at data, and by default reaches the model so, as in SiT
    (arXiv:2401.08740). `edges`, ascending from 0 to 1, are the ends of the intervals in place of
    equal ones.

    Differs from SiT's script, whose number of steps counts the ends of the intervals: its fixed
    grid of N points is `flow(N - 1)`.

    Args:
        flow_times: the network's own time at noise, and at the data.
        velocity_to: where its velocity points, `"data"` or `"noise"`.

    Raises:
        TypeError: if `steps` is not a whole number.
        ValueError: if `steps` is not positive or does not fit `edges`, or the network's units are
            none.
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
    return flow_over(times, solve_fn, flow_times, velocity_to)
