"""Our own default: input coordinates by held-out error, then GPTQ."""

from __future__ import annotations

from functools import partial

import numpy as np

from qdit_jax.methods.branches import closest_branch, input_branch, weight_branch
from qdit_jax.methods.choosing import ChooseTransforms
from qdit_jax.methods.data import spread_items
from qdit_jax.methods.fitting import fit_rounding
from qdit_jax.methods.method import Method
from qdit_jax.methods.scales import ALPHAS, smoothing
from qdit_jax.methods.static_ranges import static_ranges
from qdit_jax.quant import LowRank, gptq
from qdit_jax.recipes import LayerSpec

# A branch costs bytes and two thin products, so it has to gain 3 dB; with so few bits that each layer's error
# shows, 1 dB, and it may be of the inputs, which takes a third product.
FEW_BITS = 3
SHARE, SHARE_OF_FEW_BITS = 0.5, 0.8


def has_few_bits(spec: LayerSpec) -> bool:
    """Returns whether a layer's weights have `FEW_BITS` or fewer."""
    return spec.weight is not None and spec.weight.bits <= FEW_BITS


def branch(
    kernel: np.ndarray, rows: np.ndarray, held_out: np.ndarray, spec: LayerSpec
) -> LowRank | None:
    """Returns a layer's branch, see `BranchFn`: of its kernel, or with few bits of its inputs if that is closer."""
    rule = (
        closest_branch(weight_branch(), input_branch()) if has_few_bits(spec) else weight_branch()
    )
    return rule(kernel, rows, held_out, spec)


def branch_share(spec: LayerSpec) -> float:
    """Returns the share of a layer's squared error that its branch may leave."""
    return SHARE_OF_FEW_BITS if has_few_bits(spec) else SHARE


METHOD = Method(
    name="best",
    paper="",
    idea="Scales, shifts or rotates each layer's input if that lowers its output error on held-out "
    "inputs, adds a low-rank branch where that halves the error once more (with 3 bits or fewer: lowers it by a "
    "fifth), then rounds by GPTQ on the inputs of the quantized network.",
    runtime_cost="One product per channel where no fold takes a scale; a block Hadamard product or two "
    "thin products of 16 bits (three with 3 bits) where a layer gains from them.",
    hardware="Integer dots of 8 or 4 bits, a scale per group; 16-bit dots for branches.",
    needs={"items": spread_items},
    prepare=(
        ChooseTransforms(
            smoothing(ALPHAS),
            shifts=True,
            rotations=("regular",),
            branch=branch,
            share_fn=branch_share,
        ),
        static_ranges,
    ),
    apply=partial(fit_rounding, round_fn=gptq),
)
