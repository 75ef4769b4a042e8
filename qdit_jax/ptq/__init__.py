"""The transform from a parameter tree to a quantised one, and what it needs."""

from qdit_jax.ptq.recipe import LayerSpec, Recipe, Rule, layer_paths
from qdit_jax.ptq.stats import Stats, collect_stats, input_ranges
from qdit_jax.ptq.transform import LayerPlan, plan, quantize_params, sqnr_db

__all__ = [
    "LayerPlan",
    "LayerSpec",
    "Recipe",
    "Rule",
    "Stats",
    "collect_stats",
    "input_ranges",
    "layer_paths",
    "plan",
    "quantize_params",
    "sqnr_db",
]
