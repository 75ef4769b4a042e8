"""PTQ4DM: static activations, calibrated on normally distributed timesteps."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from qdit_jax.calibration import Items
from qdit_jax.checkpoint import Checkpoint
from qdit_jax.methods.data import CalibrationData, sampled_items
from qdit_jax.methods.method import Method
from qdit_jax.methods.rtn import apply
from qdit_jax.methods.static_ranges import PER_TENSOR, PER_TENSOR_HARDWARE, static_ranges
from qdit_jax.types import ProgressFn, untold

MEAN = 0.4  # of the timesteps, as a share of the process; the paper takes at most one half
PER_SAMPLE = 4


def normal_items(
    checkpoint: Checkpoint, data: CalibrationData, progress_fn: ProgressFn = untold
) -> Items:
    """Returns items at timesteps drawn from N(0.4 T, T/2), clipped to the process, null included."""
    random = np.random.default_rng(data.seed)

    def choose(index: Int[np.ndarray, " B"], num_steps: int) -> Int[np.ndarray, "B M"]:
        noise = random.normal(MEAN, 0.5, (len(index), PER_SAMPLE)).clip(0, 1)
        return np.round((1 - noise) * (num_steps - 1)).astype(int)  # step 0 is pure noise

    return sampled_items(checkpoint, data, {"choose_fn": choose}, progress_fn)


METHOD = Method(
    name="ptq4dm",
    paper="Post-training Quantization on Diffusion Models, arXiv:2211.15736",
    idea="Gives each layer's input one static range, with the least squared error on inputs at "
    "normally distributed timesteps, and each output channel one scale. Weights are rounded to "
    "nearest.",
    runtime_cost="None: static ranges are constants.",
    hardware=PER_TENSOR_HARDWARE.format(ranges="one static range per input"),
    needs={"items": normal_items},
    prepare=(static_ranges,),
    apply=apply,
    settings=PER_TENSOR,
)
