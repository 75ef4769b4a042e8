"""The rows of the kernels for NVIDIA GPUs: what each refuses, and why. The next row of the table takes it."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import jax
from jaxtyping import Array

from qdit_jax.kernels.call import matmul_of
from qdit_jax.kernels.fp8_reasons import fp8_input_reason, fp8_weight_reason, is_in_fp8
from qdit_jax.kernels.gpu_check import FP8, GROUPS, LEVELS, WEIGHTS, Check, wrong_here
from qdit_jax.kernels.gpu_fp8 import fp8_fused
from qdit_jax.kernels.gpu_groups import groups_fused
from qdit_jax.kernels.gpu_levels import levels_fused
from qdit_jax.kernels.gpu_tiles import RUN, SUB
from qdit_jax.kernels.gpu_weights import weights_fused
from qdit_jax.kernels.gpu_words import BITS
from qdit_jax.kernels.group_reasons import grouped_input_reason, grouped_weight_reason, is_in_groups
from qdit_jax.kernels.level_reasons import (
    ReasonFn,
    first_of,
    input_reason,
    is_in_levels,
    split_reason,
    version_reason,
    weight_reason,
)
from qdit_jax.kernels.product import Implementation, Product, ready_alone
from qdit_jax.kernels.weight_reasons import alone_reason, is_alone
from qdit_jax.quant import ActSpec, QTensor, readied

ReadyFn = Callable[[QTensor, ActSpec | None], QTensor]

PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
INSIDE = ("weights", "sums")  # what no kernel here writes to memory
CAPABILITY = "9.0"  # of Hopper, whose instructions no other GPU has


def platform_reason(product: Product) -> str | None:
    """Returns that a program is not compiled for an NVIDIA GPU, if it is so."""
    return None if product.platform == "cuda" else "it runs on NVIDIA GPUs only."


def machine_reason(check: Check) -> str | None:
    """Returns what the machine lacks."""
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


def size_reason(product: Product) -> str | None:
    """Returns what a kernel cannot unpack."""
    if product.weight.bits not in BITS:
        return f"it unpacks {' and '.join(map(str, BITS))} bits, not {product.weight.bits}."
    num_channels = product.x_shape[-1]
    if num_channels % RUN:
        return f"it takes input channels in runs of {RUN}, and K is {num_channels}."
    return None


def row(
    name: str,
    run_fused: Callable[..., tuple[Array, ...]],
    check: Check,
    *reasons: ReasonFn,
    meant_for: Callable[[Product], bool],
    ready_fn: ReadyFn,
    kind: str | None = None,
) -> Implementation:
    """Returns the row of a kernel, which refuses by the platform, the machine, and then by `reasons`."""
    fit, run = first_of(*reasons, size_reason), matmul_of(run_fused)
    return Implementation(
        name,
        run,
        first_of(platform_reason, lambda _: machine_reason(check), fit),
        run,
        misfit_reason=first_of(platform_reason, fit),
        inside=INSIDE,
        run_fused=run_fused,
        ready_fn=ready_fn,
        kind=kind,
        meant_for=lambda product: platform_reason(product) is None and meant_for(product),
    )


def ready_in_groups(q: QTensor, spec: ActSpec | None) -> QTensor:
    """Returns a kernel with the sums that the zero points of inputs need, if these have some."""
    return readied(q, with_sums=spec is not None and not spec.symmetric)


GPU_LEVELS = row(
    *("gpu_levels", levels_fused, LEVELS, input_reason, weight_reason),
    meant_for=is_in_levels,
    ready_fn=ready_alone,
)
GPU_GROUPS = row(
    *("gpu_groups", groups_fused, GROUPS),
    lambda product: grouped_input_reason(product, SUB),
    lambda product: grouped_weight_reason(product, SUB),
    meant_for=lambda product: is_in_groups(product) and not is_in_fp8(product),
    ready_fn=ready_in_groups,
)
GPU_WEIGHTS = row(
    *("gpu_weights", weights_fused, WEIGHTS, alone_reason),
    meant_for=is_alone,
    ready_fn=ready_alone,
)
GPU_FP8 = row(
    *("gpu_fp8", fp8_fused, FP8, fp8_input_reason, fp8_weight_reason),
    meant_for=is_in_fp8,
    ready_fn=ready_alone,
    kind="float8",
)
