"""The row of `gpu_levels`: what the kernel refuses, and why. The next row of the table takes it."""

from __future__ import annotations

from importlib.util import find_spec

import jax

from qdit_jax.kernels.gpu_check import wrong_here
from qdit_jax.kernels.gpu_levels import levels_matmul
from qdit_jax.kernels.gpu_tiles import RUN
from qdit_jax.kernels.gpu_words import BITS
from qdit_jax.kernels.level_reasons import levels_reason, split_reason, version_reason
from qdit_jax.kernels.product import Implementation, Product

PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
CAPABILITY = "9.0"  # of Hopper, whose instructions no other GPU has


def machine_reason(product: Product) -> str | None:
    """Returns what the machine lacks."""
    if product.platform != "cuda":
        return "it runs on NVIDIA GPUs only."
    if not any(find_spec(plugin) for plugin in PLUGINS):
        return "JAX's plugin for CUDA is not installed."
    if (reason := version_reason()) is not None:
        return reason
    if jax.default_backend() != "gpu":
        return None  # compiled for a GPU that is elsewhere
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", "unknown")
    if capability != CAPABILITY:
        return (
            f"it was compiled for Hopper (compute capability {CAPABILITY}), and this is "
            f"{device.device_kind} ({capability})."
        )
    return split_reason("gpu") or wrong_here()


def size_reason(product: Product) -> str | None:
    """Returns what it cannot unpack."""
    if product.weight.bits not in BITS:
        return f"it unpacks {' and '.join(map(str, BITS))} bits, not {product.weight.bits}."
    num_channels = product.x_shape[-1]
    if num_channels % RUN:
        return f"it takes input channels in runs of {RUN}, and K is {num_channels}."
    return None


gpu_reason = levels_reason(machine_reason, size_reason)
GPU_LEVELS = Implementation("gpu_levels", levels_matmul, gpu_reason, levels_matmul)
