"""Calibrated rounding (GPTQ, AdaRound) of whole networks.

Dimensions: I items, B batch, K input channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jaxtyping import Bool, Float

from qdit_jax.calibration import (
    Items,
    Stats,
    TimestepWeights,
    check_items,
    empty_hessians,
    input_hessians,
)
from qdit_jax.models import Family, family_of, layers_in_order
from qdit_jax.ptq.sequential import RoundedLayer, RoundFn, by_block, quantize_in_order
from qdit_jax.quant import gptq
from qdit_jax.recipes import Recipe
from qdit_jax.sampling import Denoiser, filled_batch
from qdit_jax.types import Progress, ProgressFn, untold

# (layer paths in the network's order, its family) -> stages.
StagesFn = Callable[[Sequence[str], Family], list[list[str]]]


def round_params(
    model: nn.Module,
    params: Any,
    items: Items,
    *,
    recipe: Recipe,
    round_fn: RoundFn = gptq,
    stages_fn: StagesFn = by_block,
    holdout: float | int = 0.25,
    stats: Stats | None = None,
    batch_size: int = 8,
    timestep_weights: TimestepWeights | None = None,
    on_layer: Callable[[RoundedLayer], None] | None = None,
    progress_fn: ProgressFn = untold,
) -> Any:
    """Returns `params` quantized by `recipe`, each layer fitted to inputs from the quantized network.

    The network runs once on all items for every stage, up to the stage's layers, with the stages
    before it quantized and the activation quantizers working; no activation outlives a batch. Full
    precision parameters, one stage's Hessians (`quantize_in_order` says how large) and the
    activations of one batch are what memory holds.

    Args:
        items: from `collect_items`.
        round_fn: `quant.gptq`, `quant.qdit_release_gptq`, `quant.adaround`, or any like them.
        stages_fn: `ptq.by_block`, `by_layer` or, as the Q-DiT release, `by_block_qdit_release`.
        holdout: the share of trajectories on whose items a layer's output error is compared with
            that of rounding to nearest, which is kept where it is better; 0 for no check.
        stats: calibration statistics, for static activation scales only.
        timestep_weights: how much an item counts by its timestep, in the Hessians that layers are
            fitted to and in those that check them; all the same if None.
        progress_fn: called with 1 after every batch; there are `num_batches(...)` of them.

    Raises:
        ValueError: as `quantize_in_order`, or if an item is not finite, or `holdout` leaves nothing
            on one of the sides.
    """
    check_items(items)
    weights = item_weights(items, timestep_weights)
    fitted, held_out = sides_of(items, holdout, weights)
    apply = partial(model.apply, {"params": params})
    stages = stages_fn(layers_in_order(apply, *model.example_inputs()), family_of(model))

    def hessians_fn(params: Any, paths: Sequence[str]) -> Any:
        denoise_fn = Denoiser(params, model)
        given = (paths, batch_size, progress_fn, weights)
        found = hessians_of(denoise_fn, items, fitted, *given)
        if not held_out.any():
            return found, None
        return found, hessians_of(denoise_fn, items, held_out, *given)

    return quantize_in_order(
        params,
        recipe=recipe,
        hessians_fn=hessians_fn,
        round_fn=round_fn,
        stages=stages,
        stats=stats,
        on_layer=on_layer,
    )


def held_out_items(items: Items, share: float | int) -> np.ndarray:
    """Returns which items are held out, `[I]`: those of every so many-th trajectory.

    Raises:
        ValueError: if there are too few trajectories for the share, or it is not in [0, 1).
    """
    if share == 0:
        return np.zeros(len(items.sample), bool)
    if not 0 < share < 1:
        raise ValueError(f"holdout={share} is not a share; use a number from 0 up to 1.")
    order = np.unique(items.sample, return_inverse=True)[1]
    held_out = np.floor((order + 1) * share) > np.floor(order * share)
    if held_out.all() or not held_out.any():
        raise ValueError(
            f"holdout={share} of {order.max() + 1} trajectories leaves one side empty; use more "
            "samples, or holdout=0 for no check."
        )
    return held_out


def item_weights(items: Items, timestep_weights: TimestepWeights | None) -> Float[np.ndarray, " I"]:
    """Returns how much each item counts: 1 unless timesteps have weights."""
    if timestep_weights is None:
        return np.ones(len(items.sample), np.float32)
    return timestep_weights.at(items.timestep)


def sides_of(
    items: Items, share: float | int, weights: Float[np.ndarray, " I"]
) -> tuple[Bool[np.ndarray, " I"], Bool[np.ndarray, " I"]]:
    """Returns which items are fitted to and which are held out; those of weight 0 are neither.

    Raises:
        ValueError: as `held_out_items`, or if one side has no weight.
    """
    held_out = held_out_items(items, share)
    sides = (~held_out & (weights > 0), held_out & (weights > 0))
    if not sides[0].any() or (held_out.any() and not sides[1].any()):
        raise ValueError(
            "timestep_weights leave no inputs to fit to, or none to check on; give more timesteps a "
            "weight above 0."
        )
    return sides


def hessians_of(
    denoise_fn: Denoiser,
    items: Items,
    chosen: np.ndarray,
    paths: Sequence[str],
    batch_size: int,
    progress_fn: ProgressFn = untold,
    weights: Float[np.ndarray, " I"] | None = None,
) -> dict[str, jax.Array]:
    """Returns the Hessian `[K, K]` of every path's inputs over the chosen items, float32.

    `weights` says how much each item counts; None is 1 for all.
    """
    weights = np.ones(len(items.sample), np.float32) if weights is None else weights
    sums = empty_hessians(flatten_dict(denoise_fn.params, sep="/"), paths)
    for batch, weight in batches_of(np.flatnonzero(chosen), batch_size):
        sums = added(sums, denoise_fn, *items.taken(batch), weight * weights[batch])
        jax.block_until_ready(sums)
        progress_fn(Progress(1))
    return sums


def batches_of(numbers: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields item numbers in batches of one size, and weights: 0 for those that fill the last up."""
    size = min(batch_size, len(numbers))
    for start in range(0, len(numbers), size):
        weight = (np.arange(start, start + size) < len(numbers)).astype(np.float32)
        yield numbers[filled_batch(start, size, len(numbers))], weight


def num_batches(
    items: Items,
    holdout: float | int,
    batch_size: int,
    num_stages: int,
    timestep_weights: TimestepWeights | None = None,
) -> int:
    """Returns how often `round_params` calls its `progress_fn`."""
    sides = sides_of(items, holdout, item_weights(items, timestep_weights))
    counts = [n for n in (int(side.sum()) for side in sides) if n]
    return num_stages * sum(-(-n // min(batch_size, n)) for n in counts)


@partial(jax.jit, donate_argnums=0)
def added(
    sums: dict[str, Any], denoise_fn: Denoiser, x: Any, timestep: Any, condition: Any, weight: Any
) -> dict[str, Any]:
    """Returns `sums` with one batch's Hessians added; its paths are those of `sums`."""
    apply = partial(denoise_fn, jnp.asarray(x), timestep, condition)
    return input_hessians(apply, sums, weight)
