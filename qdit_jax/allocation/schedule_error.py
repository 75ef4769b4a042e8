"""The error of final samples under a schedule of bits, all schedules in one compiled program.

Dimensions: S steps, L levels (bits), J batches, B samples per batch, H, W, C one latent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Float

from qdit_jax.allocation.objectives import taken
from qdit_jax.allocation.rollout_settings import Rollouts
from qdit_jax.allocation.rollouts import Rollout, Seeds, seeds
from qdit_jax.allocation.step_levels import (
    AnyLevel,
    as_level,
    bits_of_levels,
    checked_levels,
    level_text,
    widest,
)
from qdit_jax.checkpoint import Checkpoint
from qdit_jax.ptq import schedule_act_bits
from qdit_jax.quant import OVER_TIME, UNQUANTIZED, levels_over_time
from qdit_jax.recipes import OverTime, check_act_bits
from qdit_jax.sampling import check_diffusion_model, sampler_timesteps
from qdit_jax.types import Condition, Key, Params

ROLLOUTS = Rollouts(num_batches=1)
ACT_BITS = (None, UNQUANTIZED)


@dataclasses.dataclass(frozen=True, eq=False)
class ScheduleError:
    """`levels [S] -> error`: of a schedule against the most bits throughout, on fixed samples.

    All schedules run in one compiled program: the level of every step is data, and each level a branch.
    A level is the bits of activations, or a pair: of weights and activations. Of pairs, the most bits
    of either side need not be a level; they are a branch of their own then.
    """

    rollout: Rollout
    params: Params
    levels: tuple[AnyLevel, ...]
    data: Seeds
    reference: list[Float[np.ndarray, "B *shape"]] = dataclasses.field(default_factory=list)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Returns the timesteps of the sampler, `[S]`."""
        return sampler_timesteps(self.rollout.sampler)

    @property
    def costs(self) -> list[float]:
        """Returns what each level costs: bits of activations, of a pair the product of its bits.

        That is the bit operations of one multiply-add, 16 bits where a side is not quantized.
        """
        bits = bits_of_levels(self.params, self.levels)
        return [
            weights * acts if isinstance(level, tuple) else acts
            for level, (weights, acts) in zip(self.levels, bits, strict=True)
        ]

    @property
    def most(self) -> AnyLevel:
        """Returns the most bits, which errors are measured against; see `widest`."""
        return widest(self.params, self.levels)

    def finals(self, chosen: Sequence[AnyLevel]) -> list[Float[np.ndarray, "B *shape"]]:
        """Returns the final latents of every batch under a schedule."""
        levels = list(dict.fromkeys(as_level(level) for level in (*self.levels, self.most)))
        table = levels_over_time(self.timesteps, [as_level(level) for level in chosen], levels)
        params = {**self.params, OVER_TIME: table}
        batches = range(len(self.data[0]))
        return [
            np.asarray(final_latents(self.rollout, params, *taken(self.data, j))) for j in batches
        ]

    def __call__(self, chosen: Sequence[AnyLevel]) -> float:
        """Returns the schedule's error.

        Raises:
            ValueError: if it is not finite.
        """
        if not self.reference:
            self.reference.extend(self.finals([self.most] * len(self.timesteps)))
        reference = np.stack(self.reference).astype(np.float64)
        gap = np.square(np.stack(self.finals(chosen)) - reference).mean()
        error = float(gap / np.square(reference).mean())
        if not np.isfinite(error):
            names = " ".join(map(level_text, chosen))
            raise ValueError(f"the samples at the levels {names} are not finite.")
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
    act_bits: Sequence[int | None] | None = None,
    levels: Sequence[str | AnyLevel] | None = None,
    rollouts: Rollouts = ROLLOUTS,
) -> ScheduleError:
    """Returns the function that measures schedules of a quantized checkpoint; see `choose_steps`.

    Raises:
        ValueError: as `choose_steps`.
    """
    if levels is not None:
        if act_bits is not None:
            raise ValueError(
                f"act_bits={list(act_bits)} have no effect beside levels, which say the bits of "
                "activations too; leave one of both out."
            )
        found = checked_levels(checkpoint.params, levels)
        return error_of_levels(checkpoint, key, found, rollouts)
    table = checkpoint.params.get(OVER_TIME)
    if table is not None and table.weight_bits is not None:
        raise ValueError(
            "the checkpoint's weights change over time, which a schedule of activations alone would "
            "undo; choose both by levels such as w4a8 and w8a8, or take that away first: "
            "schedule_act_bits(checkpoint, None)."
        )
    act_bits = ACT_BITS if act_bits is None else act_bits
    of_acts = tuple(dict.fromkeys(act_bits))
    for bits in of_acts:
        check_act_bits(bits)
    if len(of_acts) < 2:
        raise ValueError(f"act_bits={list(act_bits)} leave no choice; give two or more.")
    return error_of_levels(checkpoint, key, of_acts, rollouts)


def error_of_levels(
    checkpoint: Checkpoint, key: Key, levels: tuple[AnyLevel, ...], rollouts: Rollouts
) -> ScheduleError:
    """Returns the function that measures schedules of `levels`.

    Raises:
        ValueError: if the checkpoint cannot have these bits.
    """
    check_diffusion_model(checkpoint.model)
    if rollouts.data is not None:
        raise ValueError("rollouts.data has no effect: schedules of bits fit nothing to inputs.")
    rollout = rollouts.rollout(checkpoint, guided=checkpoint.model.has_null)
    # Also checks that every quantizer and kernel can have these bits.
    weight_bits, act_bits = zip(*map(as_level, levels), strict=True)
    whole = OverTime(tuple(map(float, range(len(levels)))), act_bits, weight_bits)
    params = schedule_act_bits(checkpoint, whole).params
    data = seeds(
        checkpoint.model,
        key,
        rollouts.num_batches,
        rollouts.batch_size,
        conditions=rollouts.conditions,
        shape=rollouts.shape,
    )
    params = {name: entry for name, entry in params.items() if name != OVER_TIME}
    return ScheduleError(rollout, params, levels, data)
