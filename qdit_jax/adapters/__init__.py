"""Other people's Flax networks."""

from qdit_jax.adapters.linen import quantize_linen

__all__ = ["quantize_linen"]
