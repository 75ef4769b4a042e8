"""QuaRot: randomized Hadamard rotations of whole inputs, then GPTQ."""

from __future__ import annotations

from functools import partial

from qdit_jax.methods.data import spread_items
from qdit_jax.methods.fitting import fit_rounding
from qdit_jax.methods.method import Method
from qdit_jax.methods.rotating import Rotate
from qdit_jax.methods.static_ranges import static_ranges
from qdit_jax.quant import gptq

METHOD = Method(
    name="quarot",
    paper="QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs, arXiv:2404.00456",
    idea="Rotates every input by a Hadamard matrix of all its channels with random signs, and rounds "
    "by GPTQ. In a diffusion transformer no rotation can be folded away: the modulation of each block "
    "differs by sample.",
    runtime_cost="A Hadamard product of all channels of each token, before it is quantized.",
    hardware="Integer dots of 8 or 4 bits: a scale per group of weights, one per token of inputs.",
    needs={"items": spread_items},
    prepare=(Rotate("hadamard"), static_ranges),
    apply=partial(fit_rounding, round_fn=gptq),
    settings={"act_group_size": 0},
)
