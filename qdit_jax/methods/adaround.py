"""AdaRound: learns for each weight whether to round it up or down."""

from __future__ import annotations

from functools import partial

from qdit_jax.methods.data import spread_items
from qdit_jax.methods.fitting import fit_rounding
from qdit_jax.methods.method import Method
from qdit_jax.quant import adaround

METHOD = Method(
    name="adaround",
    paper="Up or Down? Adaptive Rounding for Post-Training Quantization, arXiv:2004.10568",
    idea="Learns by gradient descent whether each weight is rounded up or down, so that the layer's "
    "output on calibration inputs changes least.",
    runtime_cost="None: codes and scales are those of rtn.",
    needs={"items": spread_items},
    apply=partial(fit_rounding, round_fn=adaround),
)
