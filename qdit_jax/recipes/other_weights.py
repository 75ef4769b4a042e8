"""What a recipe's schedule says of weights: which kernels have other bits, and all of them at those."""

from __future__ import annotations

import dataclasses

from qdit_jax.quant import UNQUANTIZED
from qdit_jax.recipes.names import layer_paths
from qdit_jax.recipes.recipe import Recipe
from qdit_jax.recipes.rules import LayerSpec
from qdit_jax.types import Params


def other_weights(params: Params, recipe: Recipe, bits: int) -> dict[str, LayerSpec]:
    """Returns the layers whose kernels are to be held at other bits too, with their specs there.

    Raises:
        ValueError: if one has a number format, whose bits are fixed.
    """
    layers, found = set(layer_paths(params)), {}
    for path, spec in recipe.resolve(params).items():
        if spec.weight is None or path not in layers:
            continue
        if spec.weight.fmt is not None and bits != UNQUANTIZED:
            raise ValueError(
                f"{path} has format {spec.weight.fmt.name!r}, which over_time cannot give {bits} "
                f"bits; use {UNQUANTIZED} (the kernel as it was), or integers in the recipe."
            )
        if spec.weight.bits != bits:
            weight = None if bits == UNQUANTIZED else dataclasses.replace(spec.weight, bits=bits)
            found[path] = dataclasses.replace(spec, weight=weight)
    return found


def at_weight_bits(recipe: Recipe, bits: int) -> Recipe:
    """Returns the recipe with other bits for all weights that it quantizes, and no schedule."""
    rules = tuple(
        rule
        if rule.spec.weight is None or rule.spec.weight.fmt is not None
        else dataclasses.replace(
            rule,
            spec=dataclasses.replace(
                rule.spec, weight=dataclasses.replace(rule.spec.weight, bits=bits)
            ),
        )
        for rule in recipe.rules
    )
    return dataclasses.replace(recipe, rules=rules, over_time=None)
