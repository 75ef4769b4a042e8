"""Ways to quantize a network, and the exact input transforms that they use."""

from qdit_jax.methods.folds import fold_inputs, producers

__all__ = ["fold_inputs", "producers"]
