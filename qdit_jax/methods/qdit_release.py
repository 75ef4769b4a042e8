"""What the Q-DiT release does when it quantizes, which is not all that its paper says.

Its ranges need not contain 0, its GPTQ reads some group scales from uncompensated weights, a block
and its adaLN are one stage, and its calibration has one step of each trajectory and never the null
class. Nothing is held out. It quantizes the adaLN weights too: a recipe says so with
`with_part("adaln", "w4a16")` (`--adaln w4a16`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from qdit_jax.methods.data import CalibrationData, qdit_release_items
from qdit_jax.methods.fitting import fit_rounding, refuse_levels
from qdit_jax.methods.method import Method
from qdit_jax.ptq import by_block_qdit_release
from qdit_jax.quant import qdit_release_gptq, ranges
from qdit_jax.recipes import LayerSpec


def check(specs: Mapping[str, LayerSpec], data: CalibrationData) -> None:
    """Raises `ValueError` if other stages or scales are asked for than the release's."""
    refuse_levels(specs, data)
    if data.stages is not None:
        raise ValueError(
            f"stages={data.stages!r}: method 'qdit_release' has the release's own stages; leave "
            "stages (--stages) out, or use another method such as qdit_release_gptq."
        )


METHOD = Method(
    name="qdit_release",
    paper="Q-DiT: Accurate Post-Training Quantization for Diffusion Transformers, arXiv:2406.17343 "
    "(the released code)",
    idea="Does what the Q-DiT release does: its ranges, its GPTQ block by block, and its "
    "calibration inputs, without a held-out check.",
    runtime_cost="Minimum and maximum of every group of each token's channels, before each product.",
    check=check,
    needs={"items": qdit_release_items},
    apply=partial(
        fit_rounding, round_fn=qdit_release_gptq, stages_fn=by_block_qdit_release, holdout=0.0
    ),
    settings={"range_fn": ranges.qdit_release_gptq, "act_range_fn": ranges.qdit_release},
)
