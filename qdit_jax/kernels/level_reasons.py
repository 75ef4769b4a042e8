"""What every kernel of one int8 dot over all input channels refuses, whatever the machine.

Such kernels take integer numerics with one symmetric scale per token, and weights that are int8 levels or
symmetric codes per channel.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from qdit_jax.kernels.product import Product
from qdit_jax.quant import QTensor, effective_group_size, ranges

MOST_CHANNELS = 131071  # an int32 sum holds this many products of -128 by -128
NEWEST_REFUSED = (0, 11)
DTYPES = ("float32", "bfloat16")
SUB = 32  # input channels that have one step and one offset

ReasonFn = Callable[[Product], str | None]


def first_of(*reasons: ReasonFn) -> ReasonFn:
    """Returns the first sentence that one of `reasons` has of a product, or None if none has."""

    def reason(product: Product) -> str | None:
        found = (one(product) for one in reasons)
        return next((sentence for sentence in found if sentence is not None), None)

    return reason


def version_reason() -> str | None:
    """Returns what is wrong with JAX itself."""
    if jax.__version_info__[:2] <= NEWEST_REFUSED:
        return f"it needs JAX 0.12 or newer, and this is {jax.__version__}."
    return None


def split_reason(backend: str) -> str | None:
    """Returns why a Pallas kernel cannot run on `backend`, if XLA would have to split it over devices.

    The mesh on which a program is traced says that nothing is left to split: every axis is manual, as inside of
    `shard_map`, or one device long. Without a mesh, arguments may lie on all devices that JAX sees.
    """
    mesh = jax.sharding.get_abstract_mesh()
    left = [size for axis, size in mesh.shape.items() if axis not in mesh.manual_axes]
    is_on_one = bool(mesh.axis_names) and all(size == 1 for size in left)
    if jax.default_backend() != backend or jax.device_count() == 1 or is_on_one:
        return None
    return "XLA cannot split it over several devices; use shard_map, or set a mesh of one device."


def integers_reason(product: Product) -> str | None:
    """Returns why the inputs are no integers whose scales are computed as they come."""
    spec = product.act_spec
    if product.numerics == "integer" and spec is not None and spec.fmt is not None:
        return f"it takes integers as inputs, not {spec.fmt.name}."
    return dynamic_reason(product)


def dynamic_reason(product: Product) -> str | None:
    """Returns why the inputs are no elements whose scales are computed as they come."""
    spec = product.act_spec
    if product.numerics != "integer" or spec is None:
        return f"it computes integer numerics, not {product.numerics}."
    if spec.mode != "dynamic":
        return "it computes scales from the inputs, and these have calibrated ones."
    if product.dtype not in DTYPES:
        return f"it takes inputs in {' or '.join(DTYPES)}, not in {product.dtype}."
    return None


def is_in_levels(product: Product) -> bool:
    """Returns whether inputs are quantized, and weights have two levels of scales."""
    return product.act is not None and product.weight.has_levels


def input_reason(product: Product) -> str | None:
    """Returns what is wrong with the inputs."""
    reason, spec = integers_reason(product), product.act_spec
    if reason is not None or spec is None:
        return reason
    if not spec.symmetric or spec.unsigned or spec.shift:
        return "it takes symmetric signed inputs without a shift."
    if (reason := token_reason(product)) is not None:
        return reason
    if not isinstance(spec.range_fn, ranges.MinMax):
        return f"it takes the range rule minmax for inputs, not {spec.range_fn.name}."
    return None


def token_reason(product: Product) -> str | None:
    """Returns that inputs have more than one scale per token, if it is so."""
    spec, num_channels = product.act_spec, product.x_shape[-1]
    if spec is None or effective_group_size(num_channels, spec.group_size) == num_channels:
        return None
    return f"it takes one scale per token, and the inputs have groups of {spec.group_size}."


def weight_reason(product: Product) -> str | None:
    """Returns what is wrong with the weights."""
    weight, num_channels = product.weight, product.x_shape[-1]
    if weight.fmt is not None:
        return f"its levels are a step times a code, which {weight.fmt.name} has not."
    size = effective_group_size(num_channels, weight.group_size)
    if not weight.has_levels and (size != num_channels or not weight.symmetric):
        return "it takes two levels of scales, or symmetric weights with one scale per channel."
    if num_channels > MOST_CHANNELS:
        return f"an int32 sum holds {MOST_CHANNELS} products of bytes, and K is {num_channels}."
    return stored_reason(product)


def stored_reason(product: Product) -> str | None:
    """Returns what is wrong with how the codes and scales of the weights are stored."""
    weight, num_channels = product.weight, product.x_shape[-1]
    size = effective_group_size(num_channels, weight.group_size)
    if weight.channel_group != 1:
        return f"it takes a scale per output channel, and channel_group is {weight.channel_group}."
    if size % SUB and size != num_channels:
        return f"it takes groups that are multiples of {SUB}, not of {size}."
    if isinstance(weight, QTensor) and len(weight.codes.shape) != 2:
        return "it takes one kernel at a time, and this is a stack; use vmap or scan."
    return None
