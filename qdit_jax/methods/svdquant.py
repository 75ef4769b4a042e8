"""SVDQuant: smoothing, a low-rank branch in 16 bits, and what is left in 4 bits."""

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

METHOD = Method(
    name="svdquant",
    paper="SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models, "
    "arXiv:2411.05007",
    idea="Smooths each input, takes 32 singular directions of the kernel into a branch of 16 bits, and "
    "rounds the rest by GPTQ.",
    runtime_cost="Two thin products of 16 bits per layer, of rank 32 (less below 1024 channels), beside the quantized one.",
    hardware="Integer dots of 4 or 8 bits, and 16-bit dots for the branch.",
    needs={"items": spread_items},
    prepare=(
        ChooseTransforms(smoothing(ALPHAS), branch=weight_branch()),
        static_ranges,
    ),
    apply=partial(fit_rounding, round_fn=gptq),
    settings={"group_size": 64, "symmetric": True},
)
