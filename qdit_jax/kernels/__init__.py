"""One product: quantised activations times a packed kernel."""

from qdit_jax.kernels.matmul import quantized_matmul, unsupported_reason

__all__ = ["quantized_matmul", "unsupported_reason"]
