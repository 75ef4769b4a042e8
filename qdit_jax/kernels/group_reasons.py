"""What every kernel for products in groups refuses, whatever the machine.

Such kernels take integer numerics: integers on both sides, whose scales and zero points belong to groups of
input channels, computed from the inputs as they come.
"""

from __future__ import annotations

from qdit_jax.kernels.level_reasons import DTYPES, stored_reason
from qdit_jax.kernels.product import Product
from qdit_jax.quant import effective_group_size


def grouped_input_reason(product: Product, multiple: int) -> str | None:
    """Returns what is wrong with the inputs, whose groups have to be multiples of some channels."""
    spec = product.act_spec
    if product.numerics != "integer" or spec is None:
        return f"it computes integer numerics, not {product.numerics}."
    if spec.fmt is not None:
        return f"it takes integers as inputs, not {spec.fmt.name}."
    if spec.mode != "dynamic":
        return "it computes scales from the inputs, and these have calibrated ones."
    if spec.unsigned or spec.shift:
        return "it takes inputs with a zero point or symmetric signed ones, without a shift."
    num_channels = product.x_shape[-1]
    size = effective_group_size(num_channels, spec.group_size)
    if size % multiple and size != num_channels:
        return f"it takes inputs in groups that are multiples of {multiple}, not of {size}."
    if product.dtype not in DTYPES:
        return f"it takes inputs in {' or '.join(DTYPES)}, not in {product.dtype}."
    return None


def grouped_weight_reason(product: Product, multiple: int) -> str | None:
    """Returns what is wrong with the weights."""
    weight = product.weight
    if weight.fmt is not None:
        return f"it takes integers as weights, not {weight.fmt.name}."
    if weight.has_levels:
        return "it takes one level of scales, and the weights have two."
    num_channels = product.x_shape[-1]
    size = effective_group_size(num_channels, weight.group_size)
    if size % multiple and size != num_channels:
        return f"it takes weights in groups that are multiples of {multiple}, not of {size}."
    return stored_reason(product)
