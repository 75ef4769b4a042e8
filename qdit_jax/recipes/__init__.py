"""Recipes: which layer of a network is quantized, and to what."""

from qdit_jax.recipes.recipe import (
    BLOCK_LINEARS,
    PARTS,
    TABLE,
    LayerSpec,
    Recipe,
    Rule,
    layer_paths,
)

__all__ = ["BLOCK_LINEARS", "PARTS", "TABLE", "LayerSpec", "Recipe", "Rule", "layer_paths"]
