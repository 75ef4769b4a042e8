"""How much an error at each timestep changes the final sample, measured."""

from __future__ import annotations

import dataclasses

from qdit_jax.allocation.rollout_settings import Rollouts
from qdit_jax.allocation.schedule_error import ROLLOUTS, error_of_levels
from qdit_jax.allocation.steps import Measure, step_errors
from qdit_jax.calibration import Stats, TimestepWeights
from qdit_jax.checkpoint import Checkpoint
from qdit_jax.ptq import quantize_params
from qdit_jax.quant import Level
from qdit_jax.recipes import OverTime, Recipe
from qdit_jax.types import Key, ProgressFn, untold


def measured_timestep_weights(
    checkpoint: Checkpoint,
    key: Key,
    *,
    recipe: Recipe,
    rollouts: Rollouts = ROLLOUTS,
    stats: Stats | None = None,
    progress_fn: ProgressFn = untold,
) -> TimestepWeights:
    """Returns weights of timesteps by the effect of quantization there on the final sample.

    One step at a time is run by the network rounded to nearest, all others in full precision, from
    the same noise: S rollouts. The weight is the squared error of the final latents, 1 on average.

    Args:
        checkpoint: full precision.
        recipe: of the quantized network.
        rollouts: sampler and samples, one batch by default.
        stats: as of `quantize_params`.
        progress_fn: told of every rollout.

    Raises:
        ValueError: as `quantize_params`, or if no kernel is quantized or samples are not finite.
    """
    if rollouts.state is not None:
        raise ValueError("rollouts.state has no effect: weights of timesteps are not resumed.")
    has_acts = any(spec.act for spec in recipe.resolve(checkpoint.params).values())
    full: Level = (16, 16 if has_acts else None)
    weight_bits, act_bits = zip(full, (None, None), strict=True)
    both = OverTime((1.0, 0.0), act_bits, weight_bits)
    recipe = dataclasses.replace(recipe, over_time=both)
    params = quantize_params(checkpoint.params, recipe=recipe, stats=stats)
    rounded = dataclasses.replace(checkpoint, params=params, recipe=recipe)
    levels: tuple[Level, Level] = (full, (None, None))
    error_fn = error_of_levels(rounded, key, levels, rollouts)
    errors = step_errors(Measure(error_fn, progress_fn=progress_fn))
    return TimestepWeights.from_effects(error_fn.timesteps, errors[:, 1])
