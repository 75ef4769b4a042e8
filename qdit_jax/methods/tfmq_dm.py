"""TFMQ-DM: a static range for every timestep, and AdaRound."""

from __future__ import annotations

from functools import partial

from qdit_jax.methods.data import spread_items
from qdit_jax.methods.fitting import fit_rounding
from qdit_jax.methods.method import Method
from qdit_jax.methods.static_ranges import PER_TENSOR, PER_TENSOR_HARDWARE, static_ranges
from qdit_jax.quant import adaround

METHOD = Method(
    name="tfmq_dm",
    paper="TFMQ-DM: Temporal Feature Maintenance Quantization for Diffusion Models, arXiv:2311.16503",
    idea="Gives each layer's input a static range for every timestep, one per tensor, and each output "
    "channel one scale; rounds layer by layer with AdaRound. The layers that see the timestep and the "
    "condition alone make a stage of their own, before the blocks; each is rounded by the error of its "
    "own output. The paper's joint loss over all outputs of its temporal information block is left out.",
    runtime_cost="None: the ranges of a timestep are constants, picked once per step.",
    hardware=PER_TENSOR_HARDWARE.format(ranges="one static range per input and timestep"),
    needs={"items": spread_items},
    prepare=(static_ranges,),
    apply=partial(fit_rounding, round_fn=adaround),
    settings={**PER_TENSOR, "per_timestep": True},
)
