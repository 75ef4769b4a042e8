"""Which layers of a network a recipe names, and what goes into them on calibration items."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

from qdit_jax.calibration import Items, LayerInputs, layer_inputs
from qdit_jax.methods.data import HOLDOUT, CalibrationData
from qdit_jax.methods.report import Report
from qdit_jax.models import rows_per_sample
from qdit_jax.ptq import held_out_items
from qdit_jax.recipes import LayerSpec, Recipe
from qdit_jax.types import Params

NUM_ROWS = 512  # inputs of a layer that are kept


def linear_specs(params: Params, model: nn.Module, recipe: Recipe) -> dict[str, LayerSpec]:
    """Returns the specs of the linear layers that a recipe names; not of tables and operands.

    Raises:
        ValueError: if one has a kernel and is no `models.Linear`, which alone knows its leaves.
    """
    flat = flatten_dict(params, sep="/")
    linear = rows_per_sample(model)
    found = {p: s for p, s in recipe.resolve(params).items() if f"{p}/kernel" in flat}
    if other := sorted(set(found) - set(linear)):
        raise ValueError(
            f"{other[0]} is not a linear layer of this network's forward pass, so its input cannot be "
            "given other coordinates; leave it out of the recipe (--layers)."
        )
    return found


def fitted_and_held_out(
    params: Params, model: nn.Module, paths: Sequence[str], data: CalibrationData, report: Report
) -> dict[str, tuple[LayerInputs, LayerInputs]]:
    """Returns the inputs of layers on the items to fit to, and on those held out (all, if none is).

    They are the full-precision network's.
    """
    items = data.items
    assert isinstance(items, Items)
    held_out = held_out_items(items, HOLDOUT if data.holdout is None else data.holdout)
    sides = [np.flatnonzero(~held_out), np.flatnonzero(held_out)]
    sides = [side for side in sides if len(side)]
    report.total(sum(-(-len(side) // min(data.batch_size, len(side))) for side in sides))
    found = [
        layer_inputs(
            model,
            params,
            items,
            side,
            paths,
            num_rows=NUM_ROWS,
            batch_size=data.batch_size,
            progress_fn=report.progress_fn,
        )
        for side in sides
    ]
    return {path: (found[0][path], found[-1][path]) for path in paths}
