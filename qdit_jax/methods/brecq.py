"""BRECQ: rounding learned over whole blocks."""

from __future__ import annotations

from qdit_jax.methods.data import spread_items
from qdit_jax.methods.method import Method
from qdit_jax.methods.reconstruction import check_stages, reconstruct_blocks

METHOD = Method(
    name="brecq",
    paper="BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction, "
    "arXiv:2102.05426",
    idea="Learns by gradient descent whether each weight is rounded up or down, for all layers of a "
    "block at a time, so that the block's output on calibration inputs changes least. The paper "
    "weighs that change by squared gradients; here all of it weighs the same.",
    runtime_cost="None: codes and scales are those of rtn.",
    check=check_stages,
    needs={"items": spread_items},
    apply=reconstruct_blocks,
)
