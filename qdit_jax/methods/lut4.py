"""LUT4: weights as 16 learned values, rounded to int8 levels, times a scale per channel.

The values are centroids of Lloyd's algorithm (k-means of one dimension), see `quant.codebooks`.
"""

from __future__ import annotations

from qdit_jax.methods.method import Method
from qdit_jax.methods.rtn import apply

METHOD = Method(
    name="lut4",
    paper="",
    idea="Learns 16 values for each kernel and stores each weight as one of them times its group's whole "
    "number, rounded to 8-bit levels of the output channel; looks at no data.",
    runtime_cost="A table lookup per weight before the product.",
    hardware="One int8 dot over all input channels: inputs have a scale per token.",
    apply=apply,
    settings={
        "group_size": 16,
        "weight_format": "lut4",
        "act_group_size": 0,
        "act_symmetric": True,
    },
)
