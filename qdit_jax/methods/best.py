"""Our own default: input coordinates by held-out error, then GPTQ."""

from __future__ import annotations

from functools import partial

import numpy as np
from jaxtyping import Float

from qdit_jax.methods.branches import closest_branch, input_branch, is_worth, weight_branch
from qdit_jax.methods.choosing import ChooseTransforms
from qdit_jax.methods.data import spread_items
from qdit_jax.methods.fitting import fit_rounding
from qdit_jax.methods.method import Method
from qdit_jax.methods.scales import ALPHAS, smoothing
from qdit_jax.methods.static_ranges import static_ranges
from qdit_jax.quant import LowRank, gptq, num_groups
from qdit_jax.recipes import LayerSpec

# A branch costs bytes and two thin products, three if it is of the inputs. Beside products in groups it has to gain
# 1 dB; beside one dot a layer, which is taken to be fast, it may be of the kernel alone and has to gain 3.
SHARE, SHARE_OF_ONE_DOT = 0.8, 0.5


def is_one_dot(spec: LayerSpec, num_channels: int) -> bool:
    """Returns whether a layer is one dot over all of its input channels: one scale per token and output channel."""
    weight, act = spec.weight, spec.act
    if weight is None or act is None:
        return False
    has_one = weight.scale_levels == 2 or num_groups(num_channels, weight.group_size) == 1
    return has_one and num_groups(num_channels, act.group_size) == 1


def branch(
    kernel: Float[np.ndarray, "K N"],
    rows: Float[np.ndarray, "M K"],
    held_out: Float[np.ndarray, "H K"],
    spec: LayerSpec,
) -> LowRank | None:
    """Returns a layer's branch, see `BranchFn`; None if it is not worth what it costs."""
    one_dot = is_one_dot(spec, len(kernel))
    rule = weight_branch() if one_dot else closest_branch(weight_branch(), input_branch())
    found = rule(kernel, rows, held_out, spec)
    share = SHARE_OF_ONE_DOT if one_dot else SHARE
    return found if is_worth(found, share, kernel, held_out, spec) else None


METHOD = Method(
    name="best",
    paper="",
    idea="Scales, shifts or rotates each layer's input if that lowers its output error on held-out "
    "inputs, adds a low-rank branch of its kernel or its inputs where that lowers the error by a fifth (beside "
    "one dot a layer: of its kernel, where it halves the error), then rounds by GPTQ on the inputs of the "
    "quantized network.",
    runtime_cost="One product per channel where no fold takes a scale; a block Hadamard product, and two or "
    "three thin products of 16 bits, where a layer gains from them.",
    hardware="Integer dots of 8 or 4 bits, a scale per group; 16-bit dots for branches.",
    needs={"items": spread_items},
    prepare=(
        ChooseTransforms(
            smoothing(ALPHAS),
            shifts=True,
            rotations=("regular",),
            branch=branch,
        ),
        static_ranges,
    ),
    apply=partial(fit_rounding, round_fn=gptq),
)
