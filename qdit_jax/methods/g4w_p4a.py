"""G4W+P4A: weights by GPTQ in groups, activations as PTQ4DM; the baseline of the Q-DiT paper."""

from __future__ import annotations

from functools import partial

from qdit_jax.methods.fitting import fit_rounding
from qdit_jax.methods.method import Method
from qdit_jax.methods.ptq4dm import normal_items
from qdit_jax.methods.static_ranges import static_ranges
from qdit_jax.quant import gptq, ranges

METHOD = Method(
    name="g4w_p4a",
    paper="A baseline of Q-DiT, arXiv:2406.17343",
    idea="Rounds weights in groups of 128 by GPTQ and gives each layer's input one static range, as "
    "PTQ4DM does.",
    runtime_cost="None: static ranges are constants.",
    hardware="Integer dots of 8 or 4 bits: a scale per group of weights, one static range per input. The "
    "kernels here compute ranges from their inputs, so XLA multiplies.",
    needs={"items": normal_items},
    prepare=(static_ranges,),
    apply=partial(fit_rounding, round_fn=gptq),
    settings={
        "group_size": 128,
        "act_group_size": 0,
        "act_mode": "static",
        "act_range_fn": ranges.mse(),
    },
)
