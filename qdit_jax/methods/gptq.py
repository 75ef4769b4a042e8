"""GPTQ in its robust form: each rounding error is compensated by the channels not yet rounded."""

from __future__ import annotations

from functools import partial

from qdit_jax.methods.data import spread_items
from qdit_jax.methods.fitting import fit_rounding
from qdit_jax.methods.method import Method
from qdit_jax.quant import gptq

METHOD = Method(
    name="gptq",
    paper="GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, "
    "arXiv:2210.17323",
    idea="Rounds one input channel after another and lets the channels not yet rounded make up for "
    "the error on calibration inputs; a layer that does not gain on held-out inputs keeps rounding "
    "to nearest.",
    runtime_cost="None: codes and scales are those of rtn.",
    needs={"items": spread_items},
    apply=partial(fit_rounding, round_fn=gptq),
)
