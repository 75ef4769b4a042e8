"""Fits the transforms and branches of a space's choices, once, before a search measures any."""

from __future__ import annotations

import dataclasses

import numpy as np

from qdit_jax.allocation.coordinates import Coordinates
from qdit_jax.allocation.journal import Journal
from qdit_jax.allocation.records import Store
from qdit_jax.allocation.space import Space
from qdit_jax.checkpoint import Checkpoint
from qdit_jax.methods import CalibrationData, Report, fitted_choices, spread_items
from qdit_jax.types import Progress, ProgressFn, untold

TOLD = 8  # layers between two lines of progress


def fitted_coordinates(
    checkpoint: Checkpoint,
    space: Space,
    data: CalibrationData | None = None,
    *,
    store: Store | None = None,
    progress_fn: ProgressFn = untold,
) -> dict[str, Coordinates]:
    """Returns the coordinates of all layers that have choices with a transform or a branch, by path.

    `qdit.quantize(checkpoint, method="best", recipe=...)` of an assignment's recipe makes the same
    transforms and branches from the same data.

    Args:
        data: what they are fitted to; items that it lacks are sampled as methods sample them.
        store: keeps them; a search that was stopped reads them back.
    """
    if not asks_for_fits(space):
        return {}
    asked = {layer.path for layer in space.layers if any(spec.asks_for for spec in layer.choices)}
    journal = Journal(store)
    found = journal.step(
        "coordinates", lambda: computed(checkpoint, space, data, asked, progress_fn)
    )
    return {path: Coordinates.of_arrays(part_of(found, path)) for path in sorted(asked)}


def asks_for_fits(space: Space) -> bool:
    """Returns whether a layer has a choice with a transform or a branch."""
    return any(spec.asks_for for layer in space.layers for spec in layer.choices)


def computed(
    checkpoint: Checkpoint,
    space: Space,
    data: CalibrationData | None,
    asked: set[str],
    progress_fn: ProgressFn,
) -> dict[str, np.ndarray]:
    """Returns the arrays of all coordinates, each layer's under its path."""
    data = CalibrationData() if data is None else data
    if data.items is None:
        progress_fn(Progress(text="sampling the inputs that transforms and branches are fitted to"))
        data = dataclasses.replace(data, items=spread_items(checkpoint, data))
    choices = {layer.path: layer.choices for layer in space.layers}
    every = fitted_choices(
        checkpoint.params, model=checkpoint.model, choices=choices, data=data, report=Report()
    )
    arrays: dict[str, np.ndarray] = {}
    for number, (path, fitted) in enumerate(every, start=1):
        if path in asked:
            coordinates = Coordinates.of(fitted)
            arrays |= {f"{path}:{name}": value for name, value in coordinates.arrays().items()}
        if number % TOLD == 0 or number == len(choices):
            text = f"fitted transforms and branches of {number} of {len(choices)} layers"
            progress_fn(Progress(text=text))
    return arrays


def part_of(arrays: dict[str, np.ndarray], path: str) -> dict[str, np.ndarray]:
    """Returns one layer's arrays by their own names."""
    return {k.removeprefix(f"{path}:"): v for k, v in arrays.items() if k.startswith(f"{path}:")}
