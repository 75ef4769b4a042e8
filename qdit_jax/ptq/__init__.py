"""The transform from a parameter tree to a quantised one, and what it needs."""

from qdit_jax.ptq.by_columns import sqnr_db
from qdit_jax.ptq.in_order import (
    RoundedLayer,
    by_block,
    by_block_authors,
    by_layer,
    quantize_in_order,
)
from qdit_jax.ptq.promises import Precision, precision_of, precision_warning
from qdit_jax.ptq.recipe import LayerSpec, Recipe, Rule, layer_paths
from qdit_jax.ptq.stats import Stats, input_ranges
from qdit_jax.ptq.transform import LayerPlan, plan, quantize_params

__all__ = [
    "LayerPlan",
    "LayerSpec",
    "Precision",
    "Recipe",
    "RoundedLayer",
    "Rule",
    "Stats",
    "by_block",
    "by_block_authors",
    "by_layer",
    "input_ranges",
    "layer_paths",
    "plan",
    "precision_of",
    "precision_warning",
    "quantize_in_order",
    "quantize_params",
    "sqnr_db",
]
