"""What a network's inputs look like along its sampling trajectories."""

from qdit_jax.calibration.hessians import empty_hessians, input_hessians
from qdit_jax.calibration.item_statistics import item_statistics
from qdit_jax.calibration.items import Items, check_items, collect_items, qdit_release_steps
from qdit_jax.calibration.layer_inputs import LayerInputs, layer_inputs
from qdit_jax.calibration.recording import (
    calibrate,
    conditional_and_null,
    default_sampler,
    parts_folder,
    trajectory,
)
from qdit_jax.calibration.statistics import Stats, check_layer
from qdit_jax.calibration.timestep_weights import TimestepWeights
from qdit_jax.errors import earlier_names
from qdit_jax.sampling import PUBLISHED, guidance_record, own_guidance

__all__ = [
    "PUBLISHED",
    "Items",
    "LayerInputs",
    "Stats",
    "TimestepWeights",
    "calibrate",
    "check_items",
    "check_layer",
    "collect_items",
    "conditional_and_null",
    "default_sampler",
    "empty_hessians",
    "guidance_record",
    "input_hessians",
    "item_statistics",
    "layer_inputs",
    "own_guidance",
    "parts_folder",
    "qdit_release_steps",
    "trajectory",
]

__getattr__ = earlier_names(__name__, {"authors_steps": "qdit_release_steps"})
