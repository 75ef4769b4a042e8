"""Which layers of a network a recipe names, and what goes into them on calibration items."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

from qdit_jax.calibration import Items, LayerInputs, layer_inputs
from qdit_jax.methods.data import HOLDOUT, CalibrationData
from qdit_jax.methods.input_transforms import Place
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
    params: Params,
    model: nn.Module,
    places: Sequence[Place],
    data: CalibrationData,
    report: Report,
) -> dict[str, tuple[LayerInputs, LayerInputs]]:
    """Returns the inputs of places on the items to fit to, and on those held out (all, if none is).

    They are the full-precision network's, by the place's first layer. Of layers that share a map but
    read different rows, as the outputs of a joint attention, the rows are joined.
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
            [path for place in places for path in place.layers],
            num_rows=NUM_ROWS,
            batch_size=data.batch_size,
            progress_fn=report.progress_fn,
        )
        for side in sides
    ]
    joined = [
        {place.layers[0]: joined_inputs([side[path] for path in place.layers]) for place in places}
        for side in found
    ]
    return {first: (joined[0][first], joined[-1][first]) for first in joined[0]}


def joined_inputs(inputs: Sequence[LayerInputs]) -> LayerInputs:
    """Returns the inputs of layers as of one; those that are the same count once."""
    first = inputs[0]
    different = [first, *(x for x in inputs[1:] if not np.array_equal(x.rows, first.rows))]
    if len(different) == 1:
        return first
    return LayerInputs(
        np.min([x.low for x in different], axis=0),
        np.max([x.high for x in different], axis=0),
        np.mean([x.mean_abs for x in different], axis=0),
        np.concatenate([x.rows for x in different]),
    )
