"""Quantising a Flax linen network that was written by somebody else.

`nn.Dense`, `nn.DenseGeneral` and `nn.Einsum` layers, those inside attention modules included, are
intercepted while the network is traced; its code stays as it is. Their parameters change as those
of our own networks do: a `kernel` becomes a `QTensor`, an `act_quant` entry appears beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import core, traverse_util
from flax import linen as nn

from qdit_jax.adapters.linen_layout import (
    KernelLayout,
    contraction_of,
    layout_from_bias,
    quantizable,
)
from qdit_jax.calibration import Stats
from qdit_jax.kernels import NUMERICS, quantized_matmul
from qdit_jax.ptq import act_quantizer
from qdit_jax.quant import QTensor, WeightSpec, quantize
from qdit_jax.recipes import Recipe


def quantize_linen(
    model: nn.Module,
    params: Any,
    recipe: Recipe,
    *,
    example_args: tuple[Any, ...] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    numerics: str = "simulated",
    stats: Stats | None = None,
    quantize_fn: Callable[[Any, WeightSpec], QTensor] = quantize,
) -> tuple[Callable[..., Any], Any]:
    """Returns `(apply_fn, params)`: `model.apply` for quantised parameters, and these.

    `apply_fn({"params": params}, x)` is a pure function: jit it, scan over it, shard it. Jit
    `apply_fn` itself, not `model.apply`: the latter knows nothing of quantised leaves. Groups run
    along the input axes of a kernel taken together, in the kernel's order. Layers are named by
    their path, such as `encoder/attention/query`; a layer that is the whole network is `""`.

    Args:
        params: the `"params"` collection; partitioning boxes are taken off.
        recipe: which layers, and to what. Embedding tables, convolutions and norms stay.
        example_args: arguments of a call, arrays or abstract; the network is traced with them
            to learn its layers. Needed where a bias does not tell inputs from outputs: kernels
            of more than two axes without one, or stacked by `nn.scan`.
        example_kwargs: keyword arguments of that call, such as `{"deterministic": True}`.
        numerics: `"simulated"` or `"integer"`, as in `quantized_matmul`.
        stats: statistics by layer, for static activations only.
        quantize_fn: `(kernel [K, N], spec) -> QTensor`.

    Raises:
        ValueError: if a rule matches no layer, a layer's kernel is no matrix that can be
            quantised, or the layout of a kernel cannot be told.
    """
    if numerics not in NUMERICS:
        raise ValueError(f"numerics={numerics!r} is not known; use one of {', '.join(NUMERICS)}.")
    flat = traverse_util.flatten_dict(core.unfreeze(nn.unbox(params)))
    kernels = {path[:-1]: leaf for path, leaf in flat.items() if path[-1] == "kernel"}
    traced = (
        traced_layouts(model, params, example_args, dict(example_kwargs or {}))
        if example_args or example_kwargs
        else None
    )
    names = {"/".join(path): path for path in (kernels if traced is None else traced)}
    check_rules(recipe, list(names))
    for name, path in names.items():
        spec = recipe.get(name)
        if spec is None:
            continue
        layout = traced[path] if traced is not None else guessed_layout(name, path, flat)
        if isinstance(layout, str):
            raise ValueError(f"{name or type(model).__name__} cannot be quantised: {layout}")
        if isinstance(kernels[path], QTensor):
            raise ValueError(f"{name} is quantised already; start from full precision.")
        if spec.act is not None:
            flat[(*path, "act_quant")] = act_quantizer(name, spec.act, stats)
        if spec.weight is not None:
            flat[(*path, "kernel")] = quantized_kernel(
                kernels[path], layout, spec.weight, quantize_fn
            )

    def apply_fn(variables: Any, *args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(interceptor(numerics)):
            return model.apply(variables, *args, **kwargs)

    return apply_fn, traverse_util.unflatten_dict(flat)


def check_rules(recipe: Recipe, names: list[str]) -> None:
    """Raises `ValueError` if a rule of `recipe` matches none of the layers `names`."""
    for rule in recipe.rules:
        if not any(rule.matches(name) for name in names):
            raise ValueError(
                f"recipe {recipe.name!r}: the pattern {rule.layers!r} matches no layer; "
                f"the layers are {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}."
            )


def traced_layouts(
    model: nn.Module, params: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[tuple[str, ...], KernelLayout | str]:
    """Returns the layout of every layer that a call meets, or why it has none, by path."""
    found: dict[tuple[str, ...], KernelLayout | str] = {}

    def record(next_fun: Any, call_args: Any, call_kwargs: Any, context: Any) -> Any:
        module = context.module
        if context.method_name == "__call__" and quantizable(module):
            out = next_fun(*call_args, **call_kwargs)
            kernel = module.get_variable("params", "kernel")
            shape = jnp.shape(nn.unbox(kernel))
            try:
                ways = contraction_of(module, *call_args, **call_kwargs)
                found[module.scope.path] = KernelLayout(shape, ways.k_batch, ways.k_in, ways.k_out)
            except ValueError as error:
                found[module.scope.path] = str(error)
            return out
        return next_fun(*call_args, **call_kwargs)

    abstract = jax.eval_shape(lambda tree: tree, params)

    def call(tree: Any, arguments: Any) -> Any:
        with nn.intercept_methods(record):
            return model.apply({"params": tree}, *arguments, **kwargs)

    jax.eval_shape(call, abstract, args)
    return found


def guessed_layout(name: str, path: tuple[str, ...], flat: dict[Any, Any]) -> KernelLayout:
    """Returns the layout that a kernel and its bias suggest; it is checked in the first call."""
    layout = layout_from_bias(flat[(*path, "kernel")], flat.get((*path, "bias")))
    if layout is None:
        shape = flat[(*path, "kernel")].shape
        raise ValueError(
            f"{name}: its kernel {shape} and bias do not tell inputs from outputs; pass "
            "example_args=(x, ...), arguments that the network is called with."
        )
    return layout


def quantized_kernel(
    kernel: Any, layout: KernelLayout, spec: WeightSpec, quantize_fn: Callable
) -> QTensor:
    """Returns a kernel as a `QTensor` `[K, N]`, stacked and batch axes leading."""
    matrices = layout.matrices(jnp.asarray(kernel))
    lead = matrices.shape[:-2]
    if not lead:
        return quantize_fn(matrices, spec)
    parts = [quantize_fn(m, spec) for m in matrices.reshape(-1, *matrices.shape[-2:])]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves).reshape(*lead, *leaves[0].shape), *parts)


def interceptor(numerics: str) -> Callable[..., Any]:
    """Returns the interceptor that computes layers with quantised parameters."""

    def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__" or module.scope is None:
            return next_fun(*args, **kwargs)
        kernel, act = optional(module, "kernel"), optional(module, "act_quant")
        if act is None and not isinstance(kernel, QTensor):
            return next_fun(*args, **kwargs)
        name = "/".join(module.scope.path)
        if not quantizable(module):
            raise ValueError(
                f"{name} is a {type(module).__name__}; only nn.Dense, nn.DenseGeneral and nn.Einsum "
                "can be quantised: leave it out with a recipe's rule that has no spec."
            )
        try:
            return product(module, kernel, act, numerics, *args, **kwargs)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    return intercept


def optional(module: nn.Module, name: str) -> Any:
    return module.get_variable("params", name) if module.has_variable("params", name) else None


def product(
    module: Any, kernel: Any, act: Any, numerics: str, *args: Any, **kwargs: Any
) -> jax.Array:
    """Returns what `module` would, computed with its quantised parameters."""
    ways = contraction_of(module, *args, **kwargs)
    bias = nn.unbox(optional(module, "bias")) if module.use_bias else None
    like_kernel = jnp.zeros((), module.param_dtype)
    inputs = args[0] if args else kwargs["inputs"]
    x, _, bias = module.promote_dtype(inputs, like_kernel, bias, dtype=module.dtype)
    rows = ways.rows(x)  # [B, T, K]
    if isinstance(kernel, QTensor):
        ways.check_kernel(kernel, x.shape)

        def multiply(one: Any, weight: Any) -> Any:
            return quantized_matmul(one, weight, act, numerics)
    else:
        layout = KernelLayout(kernel.shape, ways.k_batch, ways.k_in, ways.k_out)
        kernel = layout.matrices(nn.unbox(kernel)).astype(x.dtype)

        def multiply(one: Any, weight: Any) -> Any:
            return jnp.matmul(act(one), weight, precision=module.precision)

    y = (
        jax.vmap(multiply)(rows, kernel)
        if ways.k_batch
        else multiply(rows.reshape(rows.shape[1:]), kernel)[None]
    )
    y = ways.result(y, x.shape)
    if bias is not None:
        y = y + jnp.reshape(bias, ways.bias_shape(y.shape))
    return y
