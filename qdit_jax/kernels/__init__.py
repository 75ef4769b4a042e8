"""One product: quantised activations times a packed kernel."""

from qdit_jax.kernels.matmul import EXECUTIONS, quantized_matmul, unsupported_reason

__all__ = ["EXECUTIONS", "quantized_matmul", "unsupported_reason"]
