"""Recipes: which layer of a network is quantized, and to what."""

from qdit_jax.recipes.recipe import (
    LayerSpec,
    Recipe,
    Rule,
    layer_paths,
    operand_paths,
    part_names,
    part_pattern,
)

__all__ = [
    "LayerSpec",
    "Recipe",
    "Rule",
    "layer_paths",
    "operand_paths",
    "part_names",
    "part_pattern",
]
