"""Our own default: input coordinates by held-out error, then GPTQ."""

from __future__ import annotations

from functools import partial

from qdit_jax.methods.branches import weight_branch
from qdit_jax.methods.choosing import ChooseTransforms
from qdit_jax.methods.data import spread_items
from qdit_jax.methods.fitting import fit_rounding
from qdit_jax.methods.method import Method
from qdit_jax.methods.scales import ALPHAS, smoothing
from qdit_jax.methods.static_ranges import static_ranges
from qdit_jax.quant import gptq

# A branch costs bytes and two thin products, so it has to gain 3 dB.
BRANCH_SHARE = 0.5

METHOD = Method(
    name="best",
    paper="",
    idea="Scales, shifts or rotates each layer's input if that lowers its output error on held-out "
    "inputs, adds a low-rank branch where that halves the error once more, then rounds by GPTQ on the "
    "inputs of the quantized network.",
    runtime_cost="One product per channel where no fold takes a scale; a block Hadamard product or two "
    "thin products of 16 bits where a layer gains from them.",
    hardware="Integer dots of 8 or 4 bits, a scale per group; 16-bit dots for branches.",
    needs={"items": spread_items},
    prepare=(
        ChooseTransforms(
            smoothing(ALPHAS),
            shifts=True,
            rotations=("regular",),
            branch=weight_branch(),
            branch_share=BRANCH_SHARE,
        ),
        static_ranges,
    ),
    apply=partial(fit_rounding, round_fn=gptq),
)
