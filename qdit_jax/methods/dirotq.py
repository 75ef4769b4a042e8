"""DiRotQ: the directions in which an input varies most stay in 16 bits."""

from __future__ import annotations

from functools import partial

from qdit_jax.methods.branches import input_branch
from qdit_jax.methods.choosing import ChooseTransforms
from qdit_jax.methods.data import spread_items
from qdit_jax.methods.fitting import fit_rounding
from qdit_jax.methods.method import Method
from qdit_jax.methods.static_ranges import static_ranges
from qdit_jax.quant import gptq

METHOD = Method(
    name="dirotq",
    paper="DiRotQ, arXiv:2605.16732",
    idea="Multiplies the 32 directions in which a layer's input varies most in 16 bits, quantizes the "
    "input without them, and rounds the kernel by GPTQ. The paper's dense rotation of the rest is "
    "left out: its run-time form here is that of a low-rank branch.",
    runtime_cost="Three thin products of 16 bits per layer, of rank 32 (less below 1024 channels), beside the quantized one.",
    hardware="Integer dots of 4 or 8 bits, and 16-bit dots for the branch.",
    needs={"items": spread_items},
    prepare=(ChooseTransforms(branch=input_branch()), static_ranges),
    apply=partial(fit_rounding, round_fn=gptq),
    settings={"group_size": 64},
)
