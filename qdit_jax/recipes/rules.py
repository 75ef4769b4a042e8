"""One rule of a recipe: a pattern of layer paths, and what they are quantized to."""

from __future__ import annotations

import dataclasses
import re

from qdit_jax.errors import check_pattern
from qdit_jax.quant import ActSpec, WeightSpec

# Stands for a part of whatever family the parameters turn out to be, as in `part:blocks`.
PART = "part:"


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What one layer's kernel and input are quantized to; None leaves that side as it is."""

    weight: WeightSpec | None = None
    act: ActSpec | None = None


@dataclasses.dataclass(frozen=True)
class Rule:
    """The spec of every layer whose whole path matches the regular expression `layers`."""

    layers: str
    spec: LayerSpec

    def __post_init__(self) -> None:
        check_pattern("layers", self.layers)

    def matches(self, path: str) -> bool:
        if self.layers.startswith(PART):
            raise ValueError(
                f"layers={self.layers!r} stands for layers of a family; bind the recipe to "
                "parameters first: recipe.bound(params)."
            )
        return re.fullmatch(self.layers, path) is not None
