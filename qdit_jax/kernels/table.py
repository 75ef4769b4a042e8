"""The table of implementations: the first that fits a product computes it."""

from __future__ import annotations

from qdit_jax.kernels.gpu_reasons import GPU_FP8, GPU_GROUPS, GPU_LEVELS, GPU_WEIGHTS
from qdit_jax.kernels.product import Implementation
from qdit_jax.kernels.tpu_groups import TPU_GROUPS
from qdit_jax.kernels.tpu_levels import TPU_LEVELS
from qdit_jax.kernels.tpu_weights import TPU_WEIGHTS
from qdit_jax.kernels.xla_order import XLA, XLA_CPU

# In order of preference.
IMPLEMENTATIONS: dict[str, Implementation] = {
    entry.name: entry
    for entry in (
        *(XLA_CPU, GPU_LEVELS, GPU_GROUPS, GPU_WEIGHTS, GPU_FP8),
        *(TPU_LEVELS, TPU_GROUPS, TPU_WEIGHTS, XLA),
    )
}
