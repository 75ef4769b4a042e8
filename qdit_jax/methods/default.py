"""The method that a recipe gets where nobody names one."""

from __future__ import annotations

from qdit_jax.recipes import DEFAULT_METHOD, NAMED, Recipe

OF_OTHER_FORMATS = "smoothquant"  # GPTQ, and so `best`, rounds to integer codes


def method_for(recipe: str | Recipe) -> str:
    """Returns the method that a preset is meant for; `best` for other recipes of integer weights.

    A recipe of other number formats gets the method of the preset that is named as the format.
    """
    if isinstance(recipe, str):
        return NAMED[recipe].method if recipe in NAMED else DEFAULT_METHOD
    weights = (rule.spec.weight for rule in recipe.rules)
    fmt = next((weight.fmt for weight in weights if weight and weight.fmt is not None), None)
    if fmt is None:
        return DEFAULT_METHOD
    return NAMED[fmt.name].method if fmt.name in NAMED else OF_OTHER_FORMATS
