"""What the kernel of `tpu_levels` refuses, and why: the next row of the table takes it."""

from __future__ import annotations

from importlib.util import find_spec

import jax
import jax.numpy as jnp

from qdit_jax.kernels.level_reasons import levels_reason, split_reason, version_reason
from qdit_jax.kernels.product import Product
from qdit_jax.kernels.tpu_blocks import VMEM_LIMIT, chosen_blocks, sizes_of

# As `Device.device_kind` names them: those that the kernel was compiled for.
KINDS = ("TPU v5 lite", "TPU v5e", "TPU v5", "TPU v5p", "TPU v6 lite", "TPU v6e")


def machine_reason(product: Product) -> str | None:
    """Returns what the machine lacks."""
    if product.platform != "tpu":
        return "it runs on TPUs only."
    if find_spec("libtpu") is None:
        return "libtpu is not installed."
    if (reason := version_reason()) is not None:
        return reason
    if jax.default_backend() != "tpu":
        return None  # compiled for a TPU that is elsewhere
    kind = jax.devices()[0].device_kind
    if kind not in KINDS:
        return f"it was compiled for TPU v5e, v5p and v6e, and this is {kind}."
    return split_reason("tpu")


def size_reason(product: Product) -> str | None:
    """Returns what does not fit."""
    itemsize = jnp.dtype(product.dtype).itemsize
    sizes = sizes_of(product.x_shape, product.weight, itemsize)
    if sizes.num_rows > 0 and chosen_blocks(sizes) is None:
        num_channels = product.x_shape[-1]
        return f"a block of K = {num_channels} needs more than {VMEM_LIMIT >> 20} MiB of VMEM."
    return None


tpu_reason = levels_reason(machine_reason, size_reason)
