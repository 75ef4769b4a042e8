"""What every kernel of FP8 elements refuses, whatever the machine.

Such kernels take integer numerics: FP8 on both sides, one dynamic scale per token and one scale per output channel.
"""

from __future__ import annotations

from qdit_jax.kernels.level_reasons import dynamic_reason, stored_reason, token_reason
from qdit_jax.kernels.product import Product
from qdit_jax.quant import ActSpec, QTensor, WeightSpec, effective_group_size


def is_in_fp8(product: Product) -> bool:
    """Returns whether both sides are quantized, one of them to FP8."""
    spec = product.act_spec
    return spec is not None and (is_fp8(spec) or is_fp8(product.weight))


def fp8_input_reason(product: Product) -> str | None:
    """Returns what is wrong with the inputs."""
    spec = product.act_spec
    if product.numerics == "integer" and spec is not None and not is_fp8(spec):
        return f"it takes FP8 with float scales as inputs, not {title(spec)}."
    return dynamic_reason(product) or token_reason(product)


def fp8_weight_reason(product: Product) -> str | None:
    """Returns what is wrong with the weights."""
    weight, num_channels = product.weight, product.x_shape[-1]
    if not is_fp8(weight):
        return f"it takes FP8 with float scales as weights, not {title(weight)}."
    size = effective_group_size(num_channels, weight.group_size)
    if size != num_channels:
        return f"it takes one scale per output channel, and the weights have groups of {size}."
    return stored_reason(product)


def is_fp8(spec: ActSpec | WeightSpec | QTensor) -> bool:
    """Returns whether elements are FP8, and their scales floats."""
    fmt = spec.fmt
    return fmt is not None and fmt.float8_dtype is not None and fmt.block_scale == "float"


def title(spec: ActSpec | WeightSpec | QTensor) -> str:
    """Returns the elements in words."""
    return f"{spec.bits}-bit integers" if spec.fmt is None else spec.fmt.name
