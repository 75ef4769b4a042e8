"""What the kernel of `tpu_levels` refuses, and why: the next row of the table takes it.

Dimensions: K input channels.
"""

from __future__ import annotations

from importlib.util import find_spec

import jax
import jax.numpy as jnp

from qdit_jax.kernels.product import Product
from qdit_jax.kernels.tpu_blocks import STRIP, VMEM_LIMIT, chosen_blocks, sizes_of
from qdit_jax.quant import QTensor, effective_group_size, ranges

MOST_CHANNELS = 131071  # an int32 sum holds this many products of -128 by -128
NEWEST_REFUSED = (0, 11)
DTYPES = ("float32", "bfloat16")
# As `Device.device_kind` names them: those that the kernel was compiled for.
KINDS = ("TPU v5 lite", "TPU v5e", "TPU v5", "TPU v5p", "TPU v6 lite", "TPU v6e")


def levels_reason(product: Product) -> str | None:
    """Returns why the kernel cannot compute `product`, one sentence, or None if it can."""
    return (
        machine_reason(product)
        or input_reason(product)
        or weight_reason(product)
        or size_reason(product)
    )


def machine_reason(product: Product) -> str | None:
    """Returns what the machine lacks."""
    if product.platform != "tpu":
        return "it runs on TPUs only."
    if find_spec("libtpu") is None:
        return "libtpu is not installed."
    if jax.__version_info__[:2] <= NEWEST_REFUSED:
        return f"it needs JAX 0.12 or newer, and this is {jax.__version__}."
    if jax.default_backend() != "tpu":
        return None  # compiled for a TPU that is elsewhere
    kind = jax.devices()[0].device_kind
    if kind not in KINDS:
        return f"it was compiled for TPU v5e, v5p and v6e, and this is {kind}."
    return split_reason()


def split_reason() -> str | None:
    """Returns why a Pallas kernel cannot run here, if XLA would have to split it over devices."""
    mesh = jax.sharding.get_abstract_mesh()
    is_on_one = bool(mesh.axis_names) and len(mesh.manual_axes) == len(mesh.axis_names)
    if jax.default_backend() != "tpu" or jax.device_count() == 1 or is_on_one:
        return None
    return "XLA cannot split it over several devices; use one device, or shard_map."


def input_reason(product: Product) -> str | None:
    """Returns what is wrong with the inputs."""
    spec = product.act_spec
    if product.numerics != "integer" or spec is None:
        return f"it computes integer numerics, not {product.numerics}."
    if spec.fmt is not None:
        return f"it takes integers as inputs, not {spec.fmt.name}."
    if spec.mode != "dynamic":
        return "it computes scales from the inputs, and these have calibrated ones."
    if not spec.symmetric or spec.unsigned or spec.shift:
        return "it takes symmetric signed inputs without a shift."
    if effective_group_size(product.x_shape[-1], spec.group_size) != product.x_shape[-1]:
        return f"it takes one scale per token, and the inputs have groups of {spec.group_size}."
    if not isinstance(spec.range_fn, ranges.MinMax):
        return f"it takes the range rule minmax for inputs, not {spec.range_fn.name}."
    if product.dtype not in DTYPES:
        return f"it takes inputs in {' or '.join(DTYPES)}, not in {product.dtype}."
    return None


def weight_reason(product: Product) -> str | None:
    """Returns what is wrong with the weights."""
    weight, num_channels = product.weight, product.x_shape[-1]
    if weight.fmt is not None:
        return f"its levels are a step times a code, which {weight.fmt.name} has not."
    size = effective_group_size(num_channels, weight.group_size)
    if not weight.has_levels and (size != num_channels or not weight.symmetric):
        return "it takes two levels of scales, or symmetric weights with one scale per channel."
    if weight.channel_group != 1:
        return f"it takes a scale per output channel, and channel_group is {weight.channel_group}."
    if size % STRIP and size != num_channels:
        return f"it takes groups that are multiples of {STRIP}, not of {size}."
    if isinstance(weight, QTensor) and len(weight.codes.shape) != 2:
        return "it takes one kernel at a time, and this is a stack; use vmap or scan."
    return None


def size_reason(product: Product) -> str | None:
    """Returns what does not fit."""
    num_channels = product.x_shape[-1]
    if num_channels > MOST_CHANNELS:
        return f"an int32 sum holds {MOST_CHANNELS} products of bytes, and K is {num_channels}."
    itemsize = jnp.dtype(product.dtype).itemsize
    sizes = sizes_of(product.x_shape, product.weight, itemsize)
    if sizes.num_rows > 0 and chosen_blocks(sizes) is None:
        return f"a block of K = {num_channels} needs more than {VMEM_LIMIT >> 20} MiB of VMEM."
    return None
