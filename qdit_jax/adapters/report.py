"""What of a network was quantized, what was left although a rule of the recipe matched, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from qdit_jax.quant import QTensor
from qdit_jax.recipes import LayerSpec, Recipe

VECTORS = ("bias", "scale")  # vectors of a layer, which have a leading axis once stacked
SHOWN = 8


@dataclasses.dataclass(frozen=True)
class NetworkReport:
    """The layers that a recipe's rules matched.

    Attributes:
        quantized: their paths.
        left: path to reason, of the layers and parameters that stay in full precision.
    """

    quantized: tuple[str, ...]
    left: Mapping[str, str]

    def __str__(self) -> str:
        matched = len(self.quantized) + len(self.left)
        head = (
            f"{len(self.quantized)} of the {matched} layers that the recipe matches are quantized"
        )
        return f"{head}; left: {listed(self.left)}" if self.left else f"{head}."


def listed(reasons: Mapping[str, str], verb: str = "") -> str:
    """Returns the first few of `reasons`, `path verb: reason`, in one line."""
    shown = [f"{name or 'the network'}{verb}: {why}" for name, why in list(reasons.items())[:SHOWN]]
    more = f"; and {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else ""
    return "; ".join(shown) + more


def other_parameters(
    flat: Mapping[tuple[str, ...], Any], recipe: Recipe, kinds: Mapping[tuple[str, ...], str]
) -> dict[str, str]:
    """Returns, by path, why parameters other than kernels are left although a rule matches.

    Vectors are not listed: norms' and biases. A table of `nn.Embed` has its layer's path.

    Args:
        kinds: the classes of the modules that a trace has called, by path.
    """
    left = {}
    for path, leaf in flat.items():
        if path[-1] == "kernel" or path[-1] in VECTORS or not is_matrix(leaf):
            continue
        layer, name = "/".join(path[:-1]), "/".join(path)
        if not asked(recipe, layer, name):
            continue
        if path[-1] == "embedding":
            left[layer] = "a table of embeddings is looked up, not multiplied by"
        else:
            kind = f" of class {kinds[path[:-1]]}" if path[:-1] in kinds else ""
            left[name] = f"a parameter {path[-1]!r}{kind} is not the kernel of a linear layer"
    return left


def is_matrix(leaf: object) -> bool:
    if isinstance(leaf, QTensor) or not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        return False
    return len(leaf.shape) >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating)


def asked(recipe: Recipe, *names: str) -> bool:
    """Whether the last rule that matches one of `names` has a spec."""
    for rule in reversed(recipe.rules):
        if any(rule.matches(name) for name in names):
            return rule.spec != LayerSpec()
    return False


def check_rules(recipe: Recipe, names: list[str], left: Mapping[str, str]) -> None:
    """Raises `ValueError` if a rule of `recipe` matches no layer, or none that can be quantized.

    Args:
        names: the layers.
        left: why layers and parameters stay in full precision, by path.
    """
    able = [name for name in names if name not in left]
    for rule in recipe.rules:
        refused = {name: why for name, why in left.items() if rule.matches(name)}
        if any(rule.matches(name) for name in able):
            continue
        if refused and rule.spec != LayerSpec():
            raise ValueError(
                f"recipe {recipe.name!r}: the pattern {rule.layers!r} matches no layer that can be "
                f"quantized: {listed(refused, ' cannot be quantized')}."
            )
        if not refused:
            raise ValueError(
                f"recipe {recipe.name!r}: the pattern {rule.layers!r} matches no layer; "
                f"the layers are {', '.join(able[:8])}{', ...' if len(able) > 8 else ''}."
            )
