"""Which sampling steps get few bits: one step lowered at a time, then an exact knapsack.

The error of final samples is close to the sum of what each lowered step alone does (TMPDiff,
arXiv:2603.14062), so S paired rollouts per lower precision predict all schedules.

Dimensions: S steps, L levels (bits), J batches, B samples per batch, H, W, C one latent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from qdit_jax.allocation.knapsack import solve
from qdit_jax.allocation.objectives import taken
from qdit_jax.allocation.rollouts import Rollout, Seeds, seeds
from qdit_jax.allocation.searching import Rollouts
from qdit_jax.checkpoint import Checkpoint
from qdit_jax.ptq import schedule_act_bits
from qdit_jax.quant import OVER_TIME, ActQuant, bits_over_time
from qdit_jax.recipes import OverTime, check_act_bits
from qdit_jax.sampling import check_diffusion_model, sampler_timesteps
from qdit_jax.types import Condition, Key, Params

ROLLOUTS = Rollouts(num_batches=1)


@dataclasses.dataclass(frozen=True, eq=False)
class ChosenSteps:
    """A schedule of activation bits, and what it was chosen from.

    Errors are mean squared differences of final latents from those at the most bits throughout,
    over the mean square of the latter.

    Attributes:
        over_time: the schedule, for `schedule_act_bits` or a `Recipe`.
        levels: the bits that could be chosen, `L` of them.
        errors: `[S, L]`, of each step alone at each level.
        predicted: sum of the chosen entries of `errors`.
        measured: the schedule's error, on the same samples.
        mean_bits: of the schedule, per step.
    """

    over_time: OverTime
    levels: tuple[int | None, ...]
    errors: Float[np.ndarray, "S L"]
    predicted: float
    measured: float
    mean_bits: float


@dataclasses.dataclass(frozen=True, eq=False)
class ScheduleError:
    """`act_bits [S] -> error`: of a schedule against the most bits throughout, on fixed samples.

    All schedules run in one compiled program: the level of every step is data.
    """

    rollout: Rollout
    params: Params
    levels: tuple[int | None, ...]
    data: Seeds
    reference: list[Float[np.ndarray, "B *shape"]] = dataclasses.field(default_factory=list)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Returns the timesteps of the sampler, `[S]`."""
        return sampler_timesteps(self.rollout.sampler)

    @property
    def costs(self) -> list[float]:
        """Returns the bits of each level; for a quantizer's own, the mean over the tree's."""
        nodes = jax.tree.leaves(self.params, is_leaf=lambda node: isinstance(node, ActQuant))
        own = np.mean([node.spec.bits for node in nodes if isinstance(node, ActQuant)])
        return [float(own if bits is None else bits) for bits in self.levels]

    def finals(self, act_bits: Sequence[int | None]) -> list[Float[np.ndarray, "B *shape"]]:
        """Returns the final latents of every batch under a schedule."""
        table = bits_over_time(self.timesteps, act_bits, self.levels)
        params = {**self.params, OVER_TIME: table}
        batches = range(len(self.data[0]))
        return [
            np.asarray(final_latents(self.rollout, params, *taken(self.data, j))) for j in batches
        ]

    def __call__(self, act_bits: Sequence[int | None]) -> float:
        """Returns the schedule's error.

        Raises:
            ValueError: if it is not finite.
        """
        if not self.reference:
            most = self.levels[int(np.argmax(self.costs))]
            self.reference.extend(self.finals([most] * len(self.timesteps)))
        reference = np.stack(self.reference).astype(np.float64)
        gap = np.square(np.stack(self.finals(act_bits)) - reference).mean()
        error = float(gap / np.square(reference).mean())
        if not np.isfinite(error):
            raise ValueError(f"the samples at act_bits={list(act_bits)} are not finite.")
        return error


@jax.jit
def final_latents(
    rollout: Rollout, params: Params, noise: Array, condition: Condition, key: Key
) -> Array:
    """Returns the latents `[B, H, W, C]` after the last step."""
    return rollout(params, noise, condition, key)


def schedule_error(
    checkpoint: Checkpoint,
    key: Key,
    *,
    act_bits: Sequence[int | None] = (None, 16),
    rollouts: Rollouts = ROLLOUTS,
) -> ScheduleError:
    """Returns the function that measures schedules of a quantized checkpoint; see `choose_steps`.

    Raises:
        ValueError: as `choose_steps`.
    """
    check_diffusion_model(checkpoint.model)
    levels = tuple(dict.fromkeys(act_bits))
    for bits in levels:
        check_act_bits(bits)
    if len(levels) < 2:
        raise ValueError(f"act_bits={list(act_bits)} leave no choice; give two or more.")
    rollout = rollouts.rollout(checkpoint, guided=checkpoint.model.has_null)
    # Also checks that every quantizer can have these bits.
    whole = OverTime(tuple(map(float, range(len(levels)))), levels)
    params = schedule_act_bits(checkpoint, whole).params
    data = seeds(
        checkpoint.model,
        key,
        rollouts.num_batches,
        rollouts.batch_size,
        conditions=rollouts.conditions,
    )
    params = {name: entry for name, entry in params.items() if name != OVER_TIME}
    return ScheduleError(rollout, params, levels, data)


def choose_steps(
    checkpoint: Checkpoint,
    key: Key,
    *,
    mean_bits: float | int,
    act_bits: Sequence[int | None] = (None, 16),
    rollouts: Rollouts = ROLLOUTS,
    progress_fn: Callable[[int], Any] | None = None,
) -> ChosenSteps:
    """Returns the schedule of activation bits with the least summed error within a budget.

    Measures each step alone at each lower precision, S (L - 1) rollouts, and solves the knapsack
    exactly; then measures the chosen schedule.

    Args:
        checkpoint: quantized, activations included; its weights stay as they are.
        key: of the samples' noise.
        mean_bits: at most so many bits of activations on average over the steps. With levels of
            `low` and `high` bits, a share `s` of low steps is `high - s * (high - low)`.
        act_bits: the levels; None are the checkpoint's own bits, 16 is no quantizer.
        rollouts: sampler and samples, one batch by default.
        progress_fn: called with 1 after every rollout; there are `S (L - 1) + 2`.

    Raises:
        ValueError: if there are fewer than two levels, no activation is quantized or one cannot
            have these bits, the budget is below the fewest bits, or samples are not finite.
    """
    error_fn = schedule_error(checkpoint, key, act_bits=act_bits, rollouts=rollouts)
    levels, costs, timesteps = error_fn.levels, error_fn.costs, error_fn.timesteps
    if not np.isfinite(mean_bits) or mean_bits < min(costs):
        raise ValueError(f"mean_bits={mean_bits} is below the fewest bits, {min(costs):g}.")
    report = progress_fn or (lambda count: None)
    most = levels[int(np.argmax(costs))]
    highest: list[int | None] = [most] * len(timesteps)
    error_fn(highest)
    report(1)
    errors = np.zeros((len(timesteps), len(levels)))
    for step in range(len(timesteps)):
        for number, bits in enumerate(levels):
            if bits == most:
                continue
            errors[step, number] = error_fn([*highest[:step], bits, *highest[step + 1 :]])
            report(1)
    table = [np.array(costs)] * len(timesteps)
    found = solve(list(errors), table, float(mean_bits * len(timesteps)), slack=1e-9)
    chosen = tuple(levels[i] for i in found.assignment)
    measured = error_fn(chosen)
    report(1)
    over_time = OverTime(timesteps, chosen)
    mean = found.cost / len(timesteps)
    return ChosenSteps(over_time, levels, errors, found.error, measured, mean)
