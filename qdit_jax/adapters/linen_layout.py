"""The axes of a linen layer's kernel, from its bias or from a call."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn

from qdit_jax.adapters.layout import Contraction, KernelLayout, as_tuple, of_axes, of_einsum
from qdit_jax.quant import QTensor
from qdit_jax.types import AbstractArray, AnyArray

LAYERS = (nn.Dense, nn.DenseGeneral, nn.Einsum)


def layout_from_bias(
    kernel: AbstractArray | QTensor,
    bias: AbstractArray | None,
    query: AbstractArray | QTensor | None = None,
) -> KernelLayout | None:
    """Returns the layout of a kernel, inferred from its bias; None if that leaves it open.

    A kernel of two axes is `[K, N]`. A bias of several axes is the outputs of `nn.DenseGeneral`; one
    of a single axis may be a convolution's, except in attention, where the kernel `query` `[D, H, h]`
    beside it shows that the kernel is `[H, h, N]`.
    """
    shape = tuple(kernel.shape)
    axes = tuple(range(len(shape)))
    if len(shape) == 2:
        return KernelLayout(shape, (), axes[:1], axes[1:])
    if bias is None:
        return None
    num_outputs = len(bias.shape)
    if not 0 < num_outputs < len(shape) or shape[-num_outputs:] != tuple(bias.shape):
        return None
    if num_outputs == 1:
        told = query is not None and tuple(query.shape[1:]) == shape[:-1]
    else:
        told = bias.shape[0] != shape[0]  # otherwise both may be stacked by nn.scan
    return KernelLayout(shape, (), axes[:-num_outputs], axes[-num_outputs:]) if told else None


def contraction_of(
    module: nn.Module, inputs: AnyArray, einsum_str: str | None = None
) -> Contraction:
    """Returns the product of one of `LAYERS` for its input.

    Raises:
        ValueError: if the layer has a `dot_general` of its own, or computes no product of matrices.
    """
    if getattr(module, "dot_general", None) or getattr(module, "dot_general_cls", None):
        raise ValueError("it has a dot_general of its own.")
    if isinstance(module, nn.Einsum):
        return of_einsum(module.einsum_str or einsum_str, jnp.ndim(inputs), tuple(module.shape))
    if isinstance(module, nn.Dense):
        return of_axes(jnp.ndim(inputs), (-1,), (), (module.features,))
    return of_axes(
        jnp.ndim(inputs),
        as_tuple(module.axis),
        as_tuple(module.batch_dims),
        as_tuple(module.features),
    )
