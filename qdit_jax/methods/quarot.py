"""QuaRot: randomized Hadamard rotations of whole inputs, then GPTQ.

Differs from QuaRot, which folds the part of a rotation that stays within heads into v and turns across heads
at run time: here attention's output is turned at run time as a whole. Where the numbers of heads and of their
channels are powers of 2 that is the same matrix. The part within heads alone would cost nothing, and spreads
outliers less.
"""

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
    idea="Rotates every input by a Hadamard matrix of all its channels with random signs, and rounds by "
    "GPTQ. Rotations of the residual stream are not folded away as in a language model: the modulation of "
    "each block scales its channels, for each sample differently. Of the rotation of attention's output the "
    "paper folds the part within heads into v; here it is a product at run time as a whole.",
    runtime_cost="A Hadamard product of all channels of each token, before it is quantized.",
    hardware="Integer dots of 8 or 4 bits: a scale per group of weights, one per token of inputs.",
    needs={"items": spread_items},
    prepare=(Rotate("hadamard"), static_ranges),
    apply=partial(fit_rounding, round_fn=gptq),
    settings={"act_group_size": 0},
)
