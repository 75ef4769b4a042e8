"""Other people's Flax networks, of linen and of NNX."""

from qdit_jax.adapters.linen import quantize_linen
from qdit_jax.adapters.nnx import quantize_nnx
from qdit_jax.adapters.report import NetworkReport

__all__ = ["NetworkReport", "quantize_linen", "quantize_nnx"]
