"""Time: of a step of the sampler and of single layers, measured on this machine."""

from qdit_jax.speed.conditions import random_condition
from qdit_jax.speed.contenders import recipe_named
from qdit_jax.speed.devices import DEVICES, HERE, Device, devices_named
from qdit_jax.speed.layers import BATCH, layer_table
from qdit_jax.speed.predicted import Predicted, abstract_checkpoint, predicted
from qdit_jax.speed.records import Records
from qdit_jax.speed.rows import SLOW, Bench, Row
from qdit_jax.speed.steps import BATCHES, NUM_ROUNDS, RECIPES, bench
from qdit_jax.speed.timing import Call, Taken, TimeFn, interleaved, ratio, taken

__all__ = [
    "BATCH",
    "BATCHES",
    "DEVICES",
    "HERE",
    "NUM_ROUNDS",
    "RECIPES",
    "SLOW",
    "Bench",
    "Call",
    "Device",
    "Predicted",
    "Records",
    "Row",
    "Taken",
    "TimeFn",
    "abstract_checkpoint",
    "bench",
    "devices_named",
    "interleaved",
    "layer_table",
    "predicted",
    "random_condition",
    "ratio",
    "recipe_named",
    "taken",
]
