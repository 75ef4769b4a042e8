"""Rotations that look at no data, and the step that gives one to every layer."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from qdit_jax.methods.data import CalibrationData
from qdit_jax.methods.input_transforms import Place, Transform, matrix_of, transformed
from qdit_jax.methods.network_inputs import linear_specs
from qdit_jax.methods.report import Report
from qdit_jax.quant import Rotation, regular_size, whole_size
from qdit_jax.recipes import Recipe
from qdit_jax.types import Params


def rotation_of(kind: str, num_channels: int, seed: int = 0) -> Rotation | None:
    """Returns a rotation that looks at no data; None where its blocks would have size 1.

    Args:
        kind: `"regular"`, a regular Hadamard matrix of 256, 64, 16 or 4 channels per block, or
            `"hadamard"`, one of all channels (of the largest block that there is one for) with
            random signs.
        seed: of the signs.
    """
    if kind == "regular":
        size = regular_size(num_channels)
        return Rotation("regular", size) if size > 1 else None
    size = whole_size(num_channels)
    signs = np.random.default_rng(seed).choice(np.array([-1, 1], np.int8), num_channels)
    return Rotation("hadamard", size, jnp.asarray(signs)) if size > 1 else None


@dataclasses.dataclass(frozen=True)
class Rotate:
    """Rotates the input of every layer that a recipe quantizes; looks at no data.

    Attributes:
        kind: see `rotation_of`.
    """

    kind: str

    def __call__(
        self,
        params: Params,
        *,
        model: nn.Module,
        recipe: Recipe,
        data: CalibrationData,
        report: Report,
    ) -> tuple[Params, CalibrationData]:
        """Returns `params` of the same function with rotated inputs, and `data`."""
        for path in linear_specs(params, model, recipe):
            width = len(matrix_of(params, [path]))
            rotation = rotation_of(self.kind, width, data.seed)
            params = transformed(params, Place((path,), folded=False), Transform(rotation=rotation))
        return params, data
