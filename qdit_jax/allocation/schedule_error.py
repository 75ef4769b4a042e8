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
from qdit_jax.checkpoint import Checkpoint
from qdit_jax.ptq import schedule_act_bits
from qdit_jax.quant import OVER_TIME, UNQUANTIZED, ActQuant, Level, QTensor, levels_over_time
from qdit_jax.recipes import OverTime, check_act_bits
from qdit_jax.sampling import check_diffusion_model, sampler_timesteps
from qdit_jax.types import Condition, Key, Params

ROLLOUTS = Rollouts(num_batches=1)
# Bits of activations, or of weights and activations.
AnyLevel = int | Level | None


@dataclasses.dataclass(frozen=True, eq=False)
class ScheduleError:
    """`levels [S] -> error`: of a schedule against the most bits throughout, on fixed samples.

    All schedules run in one compiled program: the level of every step is data. A level is the bits of
    activations, or a pair: of weights and activations.
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
        """Returns the bits of each level, of both sides where it is a pair.

        For a quantizer's or kernel's own bits, that is the mean over the tree's.
        """
        is_leaf = lambda node: isinstance(node, ActQuant | QTensor)  # noqa: E731
        nodes = jax.tree.leaves(self.params, is_leaf=is_leaf)
        acts = [node.spec.bits for node in nodes if isinstance(node, ActQuant)]
        kernels = [node.bits for node in nodes if isinstance(node, QTensor)]
        own = [np.mean(bits or [UNQUANTIZED]) for bits in (kernels, acts)]

        def cost(level: AnyLevel) -> float:
            sides = list(zip(as_level(level), own, strict=True))
            chosen = sides if isinstance(level, tuple) else sides[1:]
            return float(sum(mean if bits is None else bits for bits, mean in chosen))

        return [cost(level) for level in self.levels]

    @property
    def most(self) -> AnyLevel:
        """Returns the level of the most bits, which errors are measured against."""
        return self.levels[int(np.argmax(self.costs))]

    def finals(self, chosen: Sequence[AnyLevel]) -> list[Float[np.ndarray, "B *shape"]]:
        """Returns the final latents of every batch under a schedule."""
        levels = [as_level(level) for level in self.levels]
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
            raise ValueError(f"the samples at act_bits={list(chosen)} are not finite.")
        return error


def as_level(level: AnyLevel) -> Level:
    """Returns a level as the bits of weights and activations."""
    return level if isinstance(level, tuple) else (None, level)


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
    table = checkpoint.params.get(OVER_TIME)
    if table is not None and table.weight_bits is not None:
        raise ValueError(
            "the checkpoint's weights change over time, which a schedule of activations alone would "
            "undo; take that away first: schedule_act_bits(checkpoint, None)."
        )
    levels = tuple(dict.fromkeys(act_bits))
    for bits in levels:
        check_act_bits(bits)
    if len(levels) < 2:
        raise ValueError(f"act_bits={list(act_bits)} leave no choice; give two or more.")
    return error_of_levels(checkpoint, key, [(None, bits) for bits in levels], levels, rollouts)


def error_of_levels(
    checkpoint: Checkpoint,
    key: Key,
    pairs: Sequence[Level],
    levels: tuple[AnyLevel, ...],
    rollouts: Rollouts,
) -> ScheduleError:
    """Returns the function that measures schedules of `levels`, which `pairs` are in full.

    Raises:
        ValueError: if the checkpoint cannot have these bits.
    """
    check_diffusion_model(checkpoint.model)
    if rollouts.data is not None:
        raise ValueError("rollouts.data has no effect: schedules of bits fit nothing to inputs.")
    rollout = rollouts.rollout(checkpoint, guided=checkpoint.model.has_null)
    # Also checks that every quantizer and kernel can have these bits.
    weight_bits, act_bits = zip(*pairs, strict=True)
    whole = OverTime(tuple(map(float, range(len(pairs)))), act_bits, weight_bits)
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
