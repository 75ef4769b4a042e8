"""Our own default: input coordinates by held-out error, then GPTQ."""

from __future__ import annotations

from functools import partial

from qdit_jax.methods.choosing import ChooseTransforms
from qdit_jax.methods.data import spread_items
from qdit_jax.methods.fitting import fit_rounding
from qdit_jax.methods.method import Method
from qdit_jax.methods.scales import ALPHAS, smoothing
from qdit_jax.methods.static_ranges import static_ranges
from qdit_jax.quant import gptq

METHOD = Method(
    name="best",
    paper="",
    idea="Scales, shifts or rotates each layer's input if that lowers its output error on held-out "
    "inputs, then rounds by GPTQ on the inputs of the quantized network.",
    runtime_cost="One product per channel where no fold takes a scale, and a block Hadamard product "
    "where a layer gains from one.",
    needs={"items": spread_items},
    prepare=(
        ChooseTransforms(smoothing(ALPHAS), shifts=True, rotations=("regular",)),
        static_ranges,
    ),
    apply=partial(fit_rounding, round_fn=gptq),
)
