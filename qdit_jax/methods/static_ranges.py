"""The part that gives static activation quantizers the ranges of the network at hand.

A network whose inputs have new coordinates has other ranges than the one that was calibrated.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from flax import linen as nn

from qdit_jax.calibration import item_statistics
from qdit_jax.methods.data import CalibrationData
from qdit_jax.methods.report import Report
from qdit_jax.quant import ranges
from qdit_jax.recipes import Recipe
from qdit_jax.types import Params

# Preset settings of the methods that give each output channel one scale and each input one static
# range, both by least squared error.
PER_TENSOR: dict[str, Any] = {
    "group_size": 0,
    "act_mode": "static",
    "range_fn": ranges.mse(),
    "act_range_fn": ranges.mse(),
}
# What their fast execution needs.
PER_TENSOR_HARDWARE = (
    "Integer dots of 8 or 4 bits over all input channels: a scale per output channel, {ranges}. The "
    "kernels here compute ranges from their inputs, so XLA multiplies."
)


def static_ranges(
    params: Params, *, model: nn.Module, recipe: Recipe, data: CalibrationData, report: Report
) -> tuple[Params, CalibrationData]:
    """Returns `params`, and `data` with the statistics of their inputs if the recipe needs any."""
    static = [s.act for s in recipe.resolve(params).values() if s.act and s.act.mode == "static"]
    items = data.items
    if not static or items is None:
        return params, data
    per_timestep = any(act.per_timestep for act in static)
    counts = np.unique(items.timestep, return_counts=True)[1] if per_timestep else [len(items.x)]
    report.total(sum(-(-int(n) // min(data.batch_size, int(n))) for n in counts))
    stats = item_statistics(
        model,
        params,
        items,
        per_timestep=per_timestep,
        batch_size=data.batch_size,
        progress_fn=report.progress_fn,
    )
    return params, dataclasses.replace(data, stats=stats)
