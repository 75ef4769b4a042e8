"""What every kernel for quantized weights and 16-bit inputs refuses, whatever the machine."""

from __future__ import annotations

from qdit_jax.kernels.level_reasons import stored_reason
from qdit_jax.kernels.product import Product


def is_alone(product: Product) -> bool:
    """Returns whether weights alone are quantized."""
    return product.act is None


def alone_reason(product: Product) -> str | None:
    """Returns what is wrong with the inputs, or with the format of the weights or how they are stored."""
    if product.act is not None:
        return "it takes inputs that are not quantized."
    if product.dtype != "bfloat16":
        return f"it takes inputs in bfloat16, not in {product.dtype}."
    if product.weight.fmt is not None:
        return f"it takes integer weights, not {product.weight.fmt.name}."
    return stored_reason(product)
