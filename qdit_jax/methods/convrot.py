"""ConvRot: block-wise regular Hadamard rotations, without calibration."""

from __future__ import annotations

from qdit_jax.methods.method import Method
from qdit_jax.methods.rotating import Rotate
from qdit_jax.methods.rtn import apply

METHOD = Method(
    name="convrot",
    paper="ConvRot: Rotation-Based Plug-and-Play 4-bit Quantization for Diffusion Transformers, "
    "arXiv:2512.03673",
    idea="Rotates every input by a regular Hadamard matrix of 256 channels, or of the largest power "
    "of 4 that divides their number, so that outliers spread over their block; looks at no data. "
    "Weights are rounded to nearest.",
    runtime_cost="A product of each token with the block's matrix, before it is quantized.",
    hardware="Integer dots of 8 or 4 bits: a scale per group of weights, one per token of inputs.",
    prepare=(Rotate("regular"),),
    apply=apply,
    settings={"act_group_size": 0},
)
