"""The product of a linen layer whose kernel or input is quantized."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors
from flax import linen as nn
from jax.typing import DTypeLike

from qdit_jax.adapters.linen_layout import LAYERS, contraction_of
from qdit_jax.adapters.product import KernelOrigin, MultiplyFn, multiplier
from qdit_jax.quant import QTensor
from qdit_jax.types import AnyArray

ONLY = "only nn.Dense, nn.DenseGeneral and nn.Einsum can be quantized"
WEIGHT_CHANGERS = (nn.WeightNorm, nn.SpectralNorm)


def is_layer(context: nn.module.InterceptorContext) -> bool:
    """Whether the intercepted method is the `__call__` of one of `LAYERS` itself.

    A subclass with a `__call__` of its own is not a layer; its call of `super().__call__` is one.
    """
    method = getattr(context.orig_method, "func", context.orig_method)
    return any(inspect.unwrap(cls.__call__) is method for cls in LAYERS)


def optional(module: nn.Module, name: str) -> Any:
    """Returns a parameter of a module without its partitioning box, or None if it has none."""
    if not module.has_variable("params", name):
        return None
    return nn.unbox(module.get_variable("params", name))


def layer_name(module: nn.Module) -> str:
    path = () if module.scope is None else module.scope.path
    return "/".join(path) or type(module).__name__


def interceptor(numerics: str, traced: bool = True) -> Callable[..., Any]:
    """Returns the interceptor, for `nn.intercept_methods`, that computes quantized layers.

    Args:
        numerics: as in `quantized_matmul`.
        traced: whether a trace has shown that the quantized kernels reach their layers; if not,
            modules of other classes that own one are refused.
    """

    def intercept(
        next_fun: Callable[..., object],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> object:
        module = context.module
        if context.method_name != "__call__" or module.scope is None:
            return next_fun(*args, **kwargs)
        if not traced and isinstance(module, WEIGHT_CHANGERS):
            return unchanged_weights(next_fun, module, args, kwargs)
        kernel, act = optional(module, "kernel"), optional(module, "act_quant")
        if act is None and not isinstance(kernel, QTensor):
            return next_fun(*args, **kwargs)
        if is_layer(context):
            try:
                layout = origin_of(module).layout if isinstance(kernel, QTensor) else None
                multiply = multiplier(kernel, act, numerics, module.precision, layout)
                return product(module, multiply, kernel_dtype(module, kernel), args, kwargs)
            except ValueError as error:
                raise ValueError(f"{layer_name(module)}: {error}") from error
        if not traced:
            raise ValueError(
                f"{layer_name(module)} is a {type(module).__name__}; {ONLY}: leave it out with a "
                "recipe's rule that has no spec, or pass example_args=(x, ...) to quantize_linen."
            )
        return next_fun(*args, **kwargs)

    return intercept


def unchanged_weights(
    next_fun: Callable[..., object],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> object:
    """Returns the output of a module that changes the weights of another, such as `nn.WeightNorm`.

    Raises:
        ValueError: if it fails, as it does with quantized weights.
    """
    try:
        return next_fun(*args, **kwargs)
    except (errors.FlaxError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{layer_name(module)} is a {type(module).__name__}, which cannot be computed. If a "
            "kernel that it changes was quantized, leave it out with a recipe's rule that has no "
            "spec, or pass example_args=(x, ...) to quantize_linen, which then leaves it. "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


def kernel_dtype(module: nn.Module, kernel: AnyArray | QTensor) -> DTypeLike:
    """Returns the dtype of a layer's kernel before it was quantized.

    Raises:
        ValueError: if `kernel_origin` is missing beside the kernel.
    """
    return origin_of(module).dtype if isinstance(kernel, QTensor) else kernel.dtype


def origin_of(module: nn.Module) -> KernelOrigin:
    origin = optional(module, "kernel_origin")
    if origin is None:
        raise ValueError(
            "its quantized kernel came without the entry 'kernel_origin' that lies beside it; "
            "give the layer all of its parameters, as quantize_linen returned them."
        )
    return origin


def product(
    module: nn.Module,
    multiply_fn: MultiplyFn,
    dtype: DTypeLike,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> jax.Array:
    """Returns the output of `module`, with its rows and kernel multiplied by `multiply_fn`.

    Args:
        multiply_fn: `(rows [B, T, K], contraction) -> [B, T, N]`.
        dtype: of the kernel in full precision.
    """
    ways = contraction_of(module, *args, **kwargs)
    bias = optional(module, "bias") if module.use_bias else None
    inputs = args[0] if args else kwargs["inputs"]
    x, _, bias = module.promote_dtype(inputs, jnp.zeros((), dtype), bias, dtype=module.dtype)
    result = getattr(module, "preferred_element_type", None) or x.dtype
    rows = ways.rows(x.astype(jnp.promote_types(x.dtype, result)))  # [B, T, K]
    y = ways.result(multiply_fn(rows, ways), x.shape).astype(result)
    if bias is not None:
        y = y + jnp.reshape(bias, ways.bias_shape(y.shape))
    return y
