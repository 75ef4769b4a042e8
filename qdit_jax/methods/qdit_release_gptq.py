"""The GPTQ of the Q-DiT release, rounding alone: calibration, stages and the check are ours."""

from __future__ import annotations

from functools import partial

from qdit_jax.methods.data import spread_items
from qdit_jax.methods.fitting import fit_rounding, refuse_levels
from qdit_jax.methods.method import Method
from qdit_jax.quant import qdit_release_gptq, ranges

METHOD = Method(
    name="qdit_release_gptq",
    paper="Q-DiT: Accurate Post-Training Quantization for Diffusion Transformers, arXiv:2406.17343 "
    "(the released code)",
    idea="Rounds with the GPTQ of the Q-DiT release, on the inputs and with the held-out check of "
    "gptq, to see what the rounding alone contributes.",
    runtime_cost="None: codes and scales are those of rtn.",
    check=refuse_levels,
    needs={"items": spread_items},
    apply=partial(fit_rounding, round_fn=qdit_release_gptq),
    settings={"range_fn": ranges.qdit_release_gptq},
)
