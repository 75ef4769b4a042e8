"""What a small network goes through on its whole road: shared by the tests of images, prompts and videos."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tiny_models import output, quantized_layers

import qdit_jax as qdit
from qdit_jax.methods import CalibrationData
from qdit_jax.sampling import checkpoint_sampler

STEPS = 2
GROUP = 8


def relative(a, b) -> float:
    """Returns the error of `a` against `b` in the norm of `b`."""
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)))


def outputs(checkpoint: qdit.Checkpoint, items: Any) -> np.ndarray:
    """Returns what a network makes of the inputs that were collected for it."""
    return np.asarray(
        output(checkpoint.model, checkpoint.params, *jax.tree.map(jnp.asarray, items[:3]))
    )


def collected(checkpoint: qdit.Checkpoint, conditions: Any) -> Any:
    """Returns inputs of a network, of 8 trajectories."""
    return qdit.collect_items(
        checkpoint,
        jax.random.key(0),
        8,
        conditions=conditions,
        sampler=checkpoint_sampler(checkpoint, STEPS),
        batch_size=4,
    )


def calibrated(checkpoint: qdit.Checkpoint, conditions: Any) -> Any:
    """Returns the statistics of 3 trajectories, seen with the conditions and with the null ones."""
    stats = qdit.calibrate(
        checkpoint,
        jax.random.key(1),
        3,
        conditions=conditions,
        sampler=checkpoint_sampler(checkpoint, STEPS),
        batch_size=3,
    )
    assert set(stats.halves) == {"conditional", "null"}
    return stats


def rounded(checkpoint: qdit.Checkpoint, preset: str = "w4a8") -> qdit.Checkpoint:
    """Returns a checkpoint rounded to nearest."""
    recipe = qdit.Recipe.preset(preset, checkpoint, group_size=GROUP)
    params = qdit.quantize_params(checkpoint.params, recipe=recipe)
    return dataclasses.replace(checkpoint, params=params, recipe=recipe)


def check_method(
    checkpoint: qdit.Checkpoint, items: Any, method: str, layers: set[str], most: float
) -> None:
    """A method quantizes these layers, and the output moves, at most so far."""
    recipe = qdit.Recipe.preset("w4a8", checkpoint, group_size=GROUP)
    data = CalibrationData(items=items, batch_size=8)
    result = qdit.quantize(checkpoint, method, recipe, data=data)
    assert quantized_layers(result.params) == layers
    assert 0 < relative(outputs(result, items), outputs(checkpoint, items)) < most


def check_files(small: qdit.Checkpoint, items: Any, folder: Path) -> None:
    """What is saved as a folder, and exported as a file, computes the same to the bit."""
    for name in ("folder", "file.safetensors"):
        qdit.save(folder / name, small)
        read = qdit.load(folder / name)
        assert (read.model, read.recipe) == (small.model, small.recipe)
        np.testing.assert_array_equal(outputs(read, items), outputs(small, items))


def check_verified(
    small: qdit.Checkpoint, full: qdit.Checkpoint, conditions: Any, num_layers: int
) -> None:
    """`qdit.verify` finds nothing wrong, and looks at every layer."""
    found = qdit.verify(
        small,
        against=full,
        conditions=conditions,
        num_samples=2,
        steps=STEPS,
        batch_size=2,
        timing=False,
    )
    assert found.passed
    assert len(found.layers) == num_layers
