"""What every kernel for products in groups refuses, whatever the machine.

Such kernels take integer numerics: integers on both sides, whose scales and zero points belong to groups of
input channels, computed from the inputs as they come.
"""

from __future__ import annotations

from qdit_jax.kernels.level_reasons import integers_reason, stored_reason
from qdit_jax.kernels.product import Product
from qdit_jax.quant import effective_group_size


def is_in_groups(product: Product) -> bool:
    """Returns whether both sides are quantized, weights with one level of scales."""
    return product.act is not None and not product.weight.has_levels


def grouped_input_reason(product: Product, multiple: int) -> str | None:
    """Returns what is wrong with the inputs, whose groups have to be multiples of some channels."""
    reason, spec = integers_reason(product), product.act_spec
    if reason is not None or spec is None:
        return reason
    if spec.unsigned or spec.shift:
        return "it takes inputs with a zero point or symmetric signed ones, without a shift."
    return group_reason(product, spec.group_size, multiple, "inputs")


def grouped_weight_reason(product: Product, multiple: int) -> str | None:
    """Returns what is wrong with the weights."""
    weight = product.weight
    if weight.fmt is not None:
        return f"it takes integers as weights, not {weight.fmt.name}."
    if weight.has_levels:
        return "it takes one level of scales, and the weights have two."
    reason = group_reason(product, weight.group_size, multiple, "weights")
    return reason or stored_reason(product)


def group_reason(product: Product, group_size: int, multiple: int, what: str) -> str | None:
    """Returns that groups are neither multiples of some channels nor all of them, if it is so."""
    num_channels = product.x_shape[-1]
    size = effective_group_size(num_channels, group_size)
    if size % multiple and size != num_channels:
        return f"it takes {what} in groups that are multiples of {multiple}, not of {size}."
    return None
