"""The product of quantized activations and a packed kernel, and attention."""

from qdit_jax.kernels import gpu_fp8, gpu_groups, gpu_levels, gpu_tiles, gpu_weights, tpu_blocks
from qdit_jax.kernels.attention import (
    ATTENTION_IMPLEMENTATIONS,
    attention,
    attentions_used,
    call_shapes,
    checked_mask,
)
from qdit_jax.kernels.attention_call import AttentionShapes
from qdit_jax.kernels.epilogue import GELU, Gated, activated, followed
from qdit_jax.kernels.matmul import (
    expected,
    fused_matmul,
    implementation_of,
    passed_over,
    quantized_matmul,
    unsupported_reason,
)
from qdit_jax.kernels.product import (
    NUMERICS,
    PLATFORMS,
    Implementation,
    Numerics,
    Product,
    layer_numerics,
)
from qdit_jax.kernels.prologue import Mapped, Modulated, Pending, normalized, plain
from qdit_jax.kernels.running import ready
from qdit_jax.kernels.segments import segments
from qdit_jax.kernels.table import IMPLEMENTATIONS
from qdit_jax.kernels.units import unit_of
from qdit_jax.kernels.usage import implementations_used, quantized_layers

__all__ = [
    "ATTENTION_IMPLEMENTATIONS",
    "GELU",
    "IMPLEMENTATIONS",
    "NUMERICS",
    "PLATFORMS",
    "AttentionShapes",
    "Gated",
    "Implementation",
    "Mapped",
    "Modulated",
    "Numerics",
    "Pending",
    "Product",
    "activated",
    "attention",
    "attentions_used",
    "call_shapes",
    "checked_mask",
    "expected",
    "followed",
    "fused_matmul",
    "gpu_fp8",
    "gpu_groups",
    "gpu_levels",
    "gpu_tiles",
    "gpu_weights",
    "implementation_of",
    "implementations_used",
    "layer_numerics",
    "normalized",
    "passed_over",
    "plain",
    "quantized_layers",
    "quantized_matmul",
    "ready",
    "segments",
    "tpu_blocks",
    "unit_of",
    "unsupported_reason",
]
