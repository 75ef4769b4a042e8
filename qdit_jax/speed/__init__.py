"""Time: of a step of the sampler and of single layers, measured on this machine."""

from qdit_jax.speed.contenders import recipe_named
from qdit_jax.speed.layers import BATCH, layer_table
from qdit_jax.speed.predicted import Predicted, predicted
from qdit_jax.speed.records import Records
from qdit_jax.speed.steps import BATCHES, NUM_ROUNDS, RECIPES, Bench, Row, bench
from qdit_jax.speed.timing import Call, Taken, TimeFn, interleaved, ratio, taken

__all__ = [
    "BATCH",
    "BATCHES",
    "NUM_ROUNDS",
    "RECIPES",
    "Bench",
    "Call",
    "Predicted",
    "Records",
    "Row",
    "Taken",
    "TimeFn",
    "bench",
    "interleaved",
    "layer_table",
    "predicted",
    "ratio",
    "recipe_named",
    "taken",
]
