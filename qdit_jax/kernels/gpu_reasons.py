"""The rows of the kernels for NVIDIA GPUs: what each refuses, and why. The next row of the table takes it."""

from __future__ import annotations

from importlib.util import find_spec

import jax

from qdit_jax.kernels.gpu_check import GROUPS, LEVELS, WEIGHTS, Check, wrong_here
from qdit_jax.kernels.gpu_groups import groups_matmul
from qdit_jax.kernels.gpu_levels import levels_matmul
from qdit_jax.kernels.gpu_tiles import RUN, SUB
from qdit_jax.kernels.gpu_weights import weights_matmul
from qdit_jax.kernels.gpu_words import BITS
from qdit_jax.kernels.group_reasons import grouped_input_reason, grouped_weight_reason
from qdit_jax.kernels.level_reasons import (
    ReasonFn,
    levels_reason,
    split_reason,
    version_reason,
)
from qdit_jax.kernels.product import Implementation, Product
from qdit_jax.kernels.weight_reasons import alone_reason

PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
CAPABILITY = "9.0"  # of Hopper, whose instructions no other GPU has


def machine_reason(product: Product, check: Check) -> str | None:
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
    return split_reason("gpu") or wrong_here(check)


def on_hopper(check: Check) -> ReasonFn:
    """Returns `machine_reason` of one kernel."""
    return lambda product: machine_reason(product, check)


def size_reason(product: Product) -> str | None:
    """Returns what a kernel cannot unpack."""
    if product.weight.bits not in BITS:
        return f"it unpacks {' and '.join(map(str, BITS))} bits, not {product.weight.bits}."
    num_channels = product.x_shape[-1]
    if num_channels % RUN:
        return f"it takes input channels in runs of {RUN}, and K is {num_channels}."
    return None


def groups_reason(product: Product) -> str | None:
    """Returns why the kernel in groups cannot compute a product, one sentence, or None if it can."""
    return (
        machine_reason(product, GROUPS)
        or grouped_input_reason(product, SUB)
        or grouped_weight_reason(product, SUB)
        or size_reason(product)
    )


def weights_reason(product: Product) -> str | None:
    """Returns why the kernel of `gpu_weights` cannot compute a product, one sentence, or None if it can."""
    return machine_reason(product, WEIGHTS) or alone_reason(product) or size_reason(product)


gpu_reason = levels_reason(on_hopper(LEVELS), size_reason)
GPU_LEVELS = Implementation("gpu_levels", levels_matmul, gpu_reason, levels_matmul)
GPU_GROUPS = Implementation("gpu_groups", groups_matmul, groups_reason, groups_matmul)
GPU_WEIGHTS = Implementation("gpu_weights", weights_matmul, weights_reason, weights_matmul)
