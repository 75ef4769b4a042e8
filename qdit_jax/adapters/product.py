"""The product of a layer whose kernel or input is quantized, of any kind of Flax layer.

Dimensions: K input channels, N output channels, B products at once (batch axes of the kernel),
T rows of one product.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qdit_jax.adapters.layout import Contraction, KernelLayout
from qdit_jax.calibration import Stats
from qdit_jax.kernels import quantized_matmul
from qdit_jax.ptq import act_quantizer
from qdit_jax.quant import ActQuant, ActSpec, QTensor, WeightSpec
from qdit_jax.types import AnyArray

# (rows [B, T, K], contraction) -> [B, T, N]
MultiplyFn = Callable[[Array, Contraction], Array]
Weights = TypeVar("Weights", Array, QTensor)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class KernelOrigin:
    """The axes of a quantized kernel before it was a matrix, and its dtype, for dtype promotion.

    It stands beside the kernel as `kernel_origin`, a leaf without arrays.
    """

    layout: KernelLayout
    dtype: str


def multiplier(
    kernel: AnyArray | QTensor,
    act: ActQuant | None,
    numerics: str,
    precision: jax.lax.PrecisionLike,
    layout: KernelLayout | None,
) -> MultiplyFn:
    """Returns `(rows [B, T, K], contraction) -> [B, T, N]` with quantized parameters.

    Args:
        numerics: as in `quantized_matmul`.
        precision: of a product of a kernel that stays in full precision.
        layout: of a quantized kernel before it was a matrix.
    """

    def quantized(rows: Float[Array, "T K"], weight: QTensor) -> Float[Array, "T N"]:
        return quantized_matmul(rows, weight, act, numerics=numerics)

    def plain(rows: Float[Array, "T K"], weight: Float[Array, "K N"]) -> Float[Array, "T N"]:
        assert act is not None
        return jnp.matmul(act(rows), weight, precision=precision)

    def multiply_all(rows: Float[Array, "B T K"], ways: Contraction) -> Float[Array, "B T N"]:
        if isinstance(kernel, QTensor):
            assert layout is not None
            ways.check_kernel(kernel, rows.shape[-1], layout)
            return per_batch(quantized, rows, kernel, ways)
        used = KernelLayout(kernel.shape, ways.k_batch, ways.k_in, ways.k_out)
        return per_batch(plain, rows, used.matrices(kernel).astype(rows.dtype), ways)

    return multiply_all


def per_batch(
    multiply_fn: Callable[[Array, Weights], Array],
    rows: Float[Array, "B T K"],
    weights: Weights,
    ways: Contraction,
) -> Float[Array, "B T N"]:
    """Returns `multiply_fn(rows, weights)`, mapped over the batch axis if the kernel has one."""
    if ways.k_batch:
        return jax.vmap(multiply_fn)(rows, weights)
    return multiply_fn(rows.reshape(rows.shape[1:]), weights)[None]


def unfit(kernel: Any) -> str | None:
    """Returns why no kernel of this dtype or size can be quantized, or None if it can."""
    if isinstance(kernel, QTensor):
        return None
    if not jnp.issubdtype(kernel.dtype, jnp.floating):
        return f"its kernel is {kernel.dtype}, not floating point"
    return f"its kernel {tuple(kernel.shape)} is empty" if 0 in kernel.shape else None


def quantized_kernel(
    kernel: Any, layout: KernelLayout, spec: WeightSpec, quantize_fn: Callable
) -> QTensor:
    """Returns a kernel as a `QTensor` `[K, N]`, stacked and batch axes leading."""
    matrices = layout.matrices(kernel)
    lead = matrices.shape[:-2]
    if not lead:
        return quantize_fn(matrices, spec)
    parts = [quantize_fn(m, spec) for m in matrices.reshape(-1, *matrices.shape[-2:])]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves).reshape(*lead, *leaves[0].shape), *parts)


def input_quantizer(
    name: str, spec: ActSpec | None, is_stack: bool, stats: Stats | None
) -> ActQuant | None:
    """Returns the quantizer of a layer's input, if it has one.

    Raises:
        ValueError: if it is static and the layer is a stack, or lacks statistics.
    """
    if spec is None:
        return None
    if is_stack and spec.mode == "static":
        raise ValueError(
            f"{name} is a stack of layers, of which statistics cannot tell one from another; use "
            "mode='dynamic' for its input."
        )
    return act_quantizer(name, spec, stats)
