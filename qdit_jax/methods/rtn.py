"""Rounding to nearest: every weight to the closest point of its group's grid."""

from __future__ import annotations

from typing import Any

from flax import linen as nn

from qdit_jax.methods.data import CalibrationData
from qdit_jax.methods.method import Method
from qdit_jax.methods.report import Report
from qdit_jax.ptq import quantize_checkpoint, quantize_params
from qdit_jax.recipes import Recipe


def apply(
    params: Any, *, model: nn.Module, recipe: Recipe, data: CalibrationData, report: Report
) -> Any:
    """Returns `params` rounded to nearest; only static activations look at `data`."""
    return quantize_params(params, recipe=recipe, stats=data.stats, on_layer=report.weights)


METHOD = Method(
    name="rtn",
    paper="",
    idea="Rounds every weight to the nearest point of its group's grid.",
    runtime_cost="None beside the recipe's activation quantizers.",
    apply=apply,
    stream=quantize_checkpoint,
)
