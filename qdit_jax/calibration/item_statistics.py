"""Calibration statistics from single inputs of a network, in place of whole trajectories.

Dimensions: I items, S timesteps, M tokens.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from qdit_jax.calibration.collect import add_call, empty_state, stats_of
from qdit_jax.calibration.items import Items
from qdit_jax.calibration.recording import observe_call
from qdit_jax.calibration.statistics import HALVES, Stats
from qdit_jax.sampling import filled_batch
from qdit_jax.types import Params, Progress, ProgressFn, untold


def item_statistics(
    model: nn.Module,
    params: Params,
    items: Items,
    *,
    per_timestep: bool = False,
    num_tokens: int = 16,
    batch_size: int = 8,
    progress_fn: ProgressFn = untold,
) -> Stats:
    """Returns the ranges of all layers' inputs on `items`, and `num_tokens` inputs from each batch.

    Args:
        per_timestep: ranges for every timestep that items have, each from its items alone; else one
            range for all, at the mean timestep.
        progress_fn: called with 1 after every batch.

    Raises:
        ValueError: if an input is not finite.
    """
    steps = np.unique(items.timestep)[::-1] if per_timestep else np.array([items.timestep.mean()])
    state = empty_state({})
    state["timesteps"] = steps.astype(np.float32)
    for number, step in enumerate(steps):
        chosen = np.flatnonzero(items.timestep == step) if per_timestep else np.arange(len(items.x))
        size = min(batch_size, len(chosen))
        for call, start in enumerate(range(0, len(chosen), size)):
            x, timestep, condition = items.taken(chosen[filled_batch(start, size, len(chosen))])
            found = observe_call(
                params,
                jnp.asarray(x),
                jnp.asarray(timestep, jnp.float32),
                condition,
                model=model,
                hessians=None,
                num_tokens=num_tokens,
            )
            add_call(state, found, HALVES[0], number, len(steps), call)
            progress_fn(Progress(1))
    return stats_of(state)
