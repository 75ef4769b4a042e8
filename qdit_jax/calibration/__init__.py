"""What a network's inputs look like along its sampling trajectories."""

from qdit_jax.calibration.hessians import empty_hessians, input_hessians, layers_in_order
from qdit_jax.calibration.items import Items, authors_steps, collect_items
from qdit_jax.calibration.recording import calibrate, default_sampler, trajectories
from qdit_jax.calibration.row_counts import rows_per_sample
from qdit_jax.calibration.statistics import Stats, input_ranges

__all__ = [
    "Items",
    "Stats",
    "authors_steps",
    "calibrate",
    "collect_items",
    "default_sampler",
    "empty_hessians",
    "input_hessians",
    "input_ranges",
    "layers_in_order",
    "rows_per_sample",
    "trajectories",
]
