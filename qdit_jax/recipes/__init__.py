"""Recipes: which layer of a network is quantized, and to what."""

from qdit_jax.recipes.named import DEFAULT_METHOD, NAMED, NamedPreset, measured_presets
from qdit_jax.recipes.names import layer_paths, operand_paths, part_names, part_pattern
from qdit_jax.recipes.other_weights import at_weight_bits, other_weights
from qdit_jax.recipes.over_time import OverTime, bits_named, check_act_bits
from qdit_jax.recipes.recipe import Recipe
from qdit_jax.recipes.rules import TRANSFORMS, LayerSpec, Rule, rotated_block

__all__ = [
    "DEFAULT_METHOD",
    "NAMED",
    "TRANSFORMS",
    "LayerSpec",
    "NamedPreset",
    "OverTime",
    "Recipe",
    "Rule",
    "at_weight_bits",
    "bits_named",
    "check_act_bits",
    "layer_paths",
    "measured_presets",
    "operand_paths",
    "other_weights",
    "part_names",
    "part_pattern",
    "rotated_block",
]
