"""ViDiT-Q: smoothing by the first timesteps, then a Hadamard rotation, per-token activations."""

from __future__ import annotations

import dataclasses

import numpy as np
from flax import linen as nn
from jaxtyping import Int

from qdit_jax.calibration import Items
from qdit_jax.methods.choosing import ChooseTransforms
from qdit_jax.methods.data import CalibrationData, spread_items
from qdit_jax.methods.method import Method
from qdit_jax.methods.report import Report
from qdit_jax.methods.rotating import Rotate
from qdit_jax.methods.rtn import apply
from qdit_jax.methods.scales import smoothing
from qdit_jax.methods.static_ranges import static_ranges
from qdit_jax.recipes import Recipe
from qdit_jax.types import Params

FIRST = 0.25  # the share of items, those of the greatest timesteps, whose ranges make the scales
SMOOTH = ChooseTransforms(smoothing((0.5,), one_sided=False), leave=False)


def smooth_first_steps(
    params: Params, *, model: nn.Module, recipe: Recipe, data: CalibrationData, report: Report
) -> tuple[Params, CalibrationData]:
    """Returns `params` smoothed by the items nearest to pure noise, and `data`."""
    items = data.items
    assert items is not None
    chosen = nearest_to_noise(items)
    x, timestep, condition = items.taken(chosen)
    early = items._replace(x=x, timestep=timestep, condition=condition, sample=items.sample[chosen])
    first = dataclasses.replace(data, items=early, holdout=0)
    smoothed, _ = SMOOTH(params, model=model, recipe=recipe, data=first, report=report)
    return smoothed, data


def nearest_to_noise(items: Items) -> Int[np.ndarray, " M"]:
    """Returns the numbers of the items of the first timesteps, in whose direction time ever runs.

    The items of a trajectory stand in the order of sampling.
    """
    own = items.timestep[items.sample == items.sample[0]]
    falls = own[0] >= own.mean()
    order = np.argsort(-items.timestep if falls else items.timestep, kind="stable")
    return order[: max(2, int(len(order) * FIRST))]


METHOD = Method(
    name="vidit_q",
    paper="ViDiT-Q: Efficient and Accurate Quantization of Diffusion Transformers for Image and Video "
    "Generation, arXiv:2406.02540",
    idea="Smooths each input by its ranges at the first timesteps of sampling, with exponents of one "
    "half, rotates it by a Hadamard matrix, and quantizes activations per token. Weights are rounded "
    "to nearest; the paper's mixed precision is the search's part here.",
    runtime_cost="A Hadamard product of all channels of each token, and a product per channel where no "
    "fold takes the scales.",
    hardware="Integer dots of 8 or 4 bits: a scale per group of weights, one per token of inputs.",
    needs={"items": spread_items},
    prepare=(smooth_first_steps, Rotate("hadamard"), static_ranges),
    apply=apply,
    settings={"act_group_size": 0},
)
