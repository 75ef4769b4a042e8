"""What a network's inputs look like along its sampling trajectories."""

from qdit_jax.calibration.hessians import empty_hessians, input_hessians
from qdit_jax.calibration.items import Items, authors_steps, collect_items
from qdit_jax.calibration.recording import (
    calibrate,
    conditional_and_null,
    default_sampler,
    trajectory,
)
from qdit_jax.calibration.statistics import Stats

__all__ = [
    "Items",
    "Stats",
    "authors_steps",
    "calibrate",
    "collect_items",
    "conditional_and_null",
    "default_sampler",
    "empty_hessians",
    "input_hessians",
    "trajectory",
]
