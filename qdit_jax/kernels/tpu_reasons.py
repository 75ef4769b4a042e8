"""What the kernels for TPUs refuse, and why: the next row of the table takes it."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import jax
import jax.numpy as jnp
from jaxtyping import Array

from qdit_jax.kernels.call import matmul_of
from qdit_jax.kernels.group_reasons import grouped_input_reason, grouped_weight_reason
from qdit_jax.kernels.level_reasons import (
    ReasonFn,
    first_of,
    input_reason,
    split_reason,
    version_reason,
    weight_reason,
)
from qdit_jax.kernels.product import Implementation, Product, ready_alone
from qdit_jax.kernels.tpu_blocks import (
    STRIP,
    VMEM_LIMIT,
    Sizes,
    chosen_blocks,
    groups_sizes,
    sizes_of,
    weights_sizes,
)
from qdit_jax.kernels.weight_reasons import alone_reason
from qdit_jax.quant import ranges

# As `Device.device_kind` names them: those that the kernel was compiled for.
KINDS = ("TPU v5 lite", "TPU v5e", "TPU v5", "TPU v5p", "TPU v6 lite", "TPU v6e")


def platform_reason(product: Product) -> str | None:
    """Returns that a program is not compiled for a TPU, if it is so."""
    return None if product.platform == "tpu" else "it runs on TPUs only."


def machine_reason() -> str | None:
    """Returns what the machine lacks."""
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
    return blocks_reason(sizes_of(product.x_shape, product.weight, itemsize))


def blocks_reason(sizes: Sizes) -> str | None:
    """Returns that no block fits, if it is so."""
    if sizes.num_rows > 0 and chosen_blocks(sizes) is None:
        return (
            f"a block of K = {sizes.num_channels} needs more than {VMEM_LIMIT >> 20} MiB of VMEM."
        )
    return None


def row(
    name: str,
    run_fused: Callable[..., tuple[Array, ...]],
    inside: tuple[str, ...],
    *reasons: ReasonFn,
    meant_for: Callable[[Product], bool],
) -> Implementation:
    """Returns the row of a kernel, which refuses by the platform, the machine, and then by `reasons`."""
    run = matmul_of(run_fused)
    return Implementation(
        name,
        run,
        first_of(platform_reason, lambda _: machine_reason(), *reasons),
        run,
        run_fused=run_fused,
        misfit_reason=first_of(platform_reason, *reasons),
        inside=inside,
        ready_fn=ready_alone,
        meant_for=lambda product: platform_reason(product) is None and meant_for(product),
    )


def levels_reason(product: Product) -> str | None:
    """Returns what the kernel of `tpu_levels` cannot compute of a product."""
    return input_reason(product) or weight_reason(product) or size_reason(product)


def weights_reason(product: Product) -> str | None:
    """Returns what the kernel of `tpu_weights` cannot compute of a product."""
    return alone_reason(product) or blocks_reason(weights_sizes(product.x_shape, product.weight))


def groups_reason(product: Product) -> str | None:
    """Returns what the kernel of `tpu_groups` cannot compute of a product."""
    itemsize = jnp.dtype(product.dtype).itemsize
    return (
        grouped_input_reason(product, STRIP)
        or groups_range_reason(product)
        or grouped_weight_reason(product, STRIP)
        or blocks_reason(groups_sizes(product.x_shape, product.weight, itemsize, product.act_spec))
    )


def groups_range_reason(product: Product) -> str | None:
    """Returns what the kernel cannot compute of scales and zero points."""
    spec, weight = product.act_spec, product.weight
    if spec is not None and not isinstance(spec.range_fn, ranges.MinMax):
        return f"it takes the range rule minmax for inputs, not {spec.range_fn.name}."
    if weight.bits > 7 and not weight.symmetric:
        return f"it takes zero points of at most 7 bits, and the weights have {weight.bits}."
    return None
