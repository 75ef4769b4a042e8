"""Quantizing a Flax NNX network that was written by somebody else.

`nnx.Linear`, `nnx.LinearGeneral`, `nnx.Einsum` and `nnx.LoRALinear` layers, those inside attention
modules and `nnx.LoRA` included, are replaced by layers of `nnx_layers`; its code stays as it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from flax import linen, nnx

from qdit_jax.adapters.layout import KernelLayout
from qdit_jax.adapters.nnx_layers import (
    PackedParam,
    QuantizedLayer,
    kind_of,
    layout_of,
)
from qdit_jax.adapters.nnx_walk import Found, found_in
from qdit_jax.adapters.product import KernelOrigin, input_quantizer, quantized_kernel, unfit
from qdit_jax.adapters.report import NetworkReport, check_rules, other_parameters
from qdit_jax.calibration import Stats
from qdit_jax.kernels import NUMERICS
from qdit_jax.ptq import check_rounding_only
from qdit_jax.quant import QTensor, WeightSpec, quantize
from qdit_jax.recipes import LayerSpec, Recipe

NetworkT = TypeVar("NetworkT", bound=nnx.Module)
ONLY = "only nnx.Linear, nnx.LinearGeneral, nnx.Einsum and nnx.LoRALinear can be quantized"


def quantize_nnx(
    model: NetworkT,
    recipe: Recipe,
    *,
    numerics: str = "simulated",
    stats: Stats | None = None,
    quantize_fn: Callable[[Any, WeightSpec], QTensor] = quantize,
    strict: bool = False,
    report_fn: Callable[[NetworkReport], object] | None = None,
) -> NetworkT:
    """Returns a network of the same class with quantized layers; `model` stays as it is.

    It is called, split, merged, jitted, scanned over and saved as the network was: each array of a
    packed kernel is an `nnx.Param`. Layers are named by their path, such as `blocks/0/mlp/up`; a layer
    that is the whole network is `""`. Groups run along the input axes of a kernel taken together, in
    the kernel's order. Layers stacked by `nnx.vmap`, for `nnx.scan`, are quantized one by one.

    Layers that a rule matches and that cannot be quantized (convolutions, embedding tables, layers with
    arithmetic of their own, kernels that are shared or normalized) stay as they are; a warning names
    them. A rematerialized or jitted call works as before: layers are found in the network, not by
    tracing it.

    Args:
        model: an `nnx.Module`, its arrays concrete, or abstract inside `nnx.eval_shape`.
        recipe: which layers, and to what.
        numerics: `"simulated"` or `"integer"`, as in `quantized_matmul`.
        stats: statistics by layer, for static activations only.
        quantize_fn: `(kernel [K, N], spec) -> QTensor`.
        strict: refuse, instead of warn, if a layer that a rule matches would be left.
        report_fn: called with what was quantized, what was left, and why.

    Raises:
        TypeError: if `model` is not an NNX module.
        ValueError: if a rule matches no layer that can be quantized, the recipe changes bits over time,
            or with `strict`, as said there.
    """
    check_arguments(model, recipe, numerics)
    model = nnx.clone(model)  # the arrays are shared
    found = found_in(model)
    check_unquantized(recipe, found)
    layers = {at.name: at for at in found if has_kernel(at.node)}
    layouts = {name: layout_or_reason(at, found) for name, at in layers.items()}
    report = report_of(recipe, found, layouts)
    if report.left and strict:
        raise ValueError(f"strict=True, but {report}")
    if report.left:
        warnings.warn(f"quantize_nnx: {report}", stacklevel=2)
    specs = {name: recipe.get(name) for name in report.quantized}
    chosen = {name: spec for name, spec in specs.items() if spec is not None}
    check_rounding_only(chosen)
    for name, spec in chosen.items():
        layout = layouts[name]
        assert isinstance(layout, KernelLayout)
        layer = quantized_layer(layers[name], layout, spec, numerics, stats, quantize_fn)
        if not layers[name].places:  # the network is one layer
            model = cast(NetworkT, layer)
        for place in layers[name].places:
            place.put(layer)
    if report_fn is not None:
        report_fn(report)
    return model


def check_arguments(model: object, recipe: Recipe, numerics: str) -> None:
    """Raises `TypeError` or `ValueError` unless these can be worked with."""
    if numerics not in NUMERICS:
        raise ValueError(f"numerics={numerics!r} is not known; use one of {NUMERICS}.")
    if isinstance(model, linen.Module):
        raise TypeError(
            f"{type(model).__name__} is a flax.linen module: use qdit_jax.quantize_linen, which takes "
            "its parameters as well."
        )
    if isinstance(model, type) or not isinstance(model, nnx.Module):
        kind = model.__name__ if isinstance(model, type) else type(model).__name__
        raise TypeError(f"model is {kind}, not an nnx.Module; pass the network itself.")
    if recipe.over_time is not None:
        raise ValueError(
            f"recipe {recipe.name!r} changes bits over time, which needs a network called by a "
            "`Denoiser`; leave it out: dataclasses.replace(recipe, over_time=None)."
        )


def check_unquantized(recipe: Recipe, found: Iterable[Found]) -> None:
    """Raises `ValueError` if the recipe matches a layer that is quantized already."""
    for at in found:
        if isinstance(at.node, QuantizedLayer) and recipe.get(at.name) is not None:
            raise ValueError(f"{at.name} is quantized already; start from full precision.")


def has_kernel(node: object) -> bool:
    """Returns whether a module has a kernel in full precision, of whatever kind of layer."""
    return isinstance(node, nnx.Module) and isinstance(vars(node).get("kernel"), nnx.Variable)


def layout_or_reason(at: Found, found: Iterable[Found]) -> KernelLayout | str:
    """Returns the axes of a layer's kernel, or why it cannot be quantized."""
    layer = at.node
    if kind_of(layer) is None:
        return f"it is a {type(layer).__name__}; {ONLY}"
    if any(isinstance(parent, nnx.WeightNorm | nnx.SpectralNorm) for parent in at.parents):
        return "its kernel is normalized when it is used"
    if any(isinstance(parent, tuple) for parent in at.parents):
        return "it hangs in a tuple, in which nothing can be put; use an nnx.List"
    kernel = next(other for other in found if other.node is layer.kernel)
    if len(kernel.places) > 1:
        return "its kernel is another module's too"
    try:
        layout = layout_of(layer)
    except ValueError as error:
        return str(error).rstrip(".")
    array = layer.kernel[...]
    if not layout.fits(array.shape):
        return (
            f"a kernel {tuple(array.shape)} is used as {layout.shape}; only stacks along leading axes "
            "can be quantized"
        )
    return unfit(array) or layout


def report_of(
    recipe: Recipe, found: Iterable[Found], layouts: dict[str, KernelLayout | str]
) -> NetworkReport:
    """Returns which of the layers that the recipe matches are quantized.

    Raises:
        ValueError: if a rule matches none that can be.
    """
    flat = {at.path: at.node[...] for at in found if is_other_parameter(at)}
    kinds = {at.path: type(at.node).__name__ for at in found if isinstance(at.node, nnx.Module)}
    reasons = {name: why for name, why in layouts.items() if isinstance(why, str)}
    others = other_parameters(flat, recipe, kinds)
    check_rules(recipe, list(layouts), reasons | others)
    matched = [name for name in layouts if recipe.get(name) is not None]
    left = {name: reasons[name] for name in matched if name in reasons} | others
    return NetworkReport(tuple(name for name in matched if name not in reasons), left)


def is_other_parameter(at: Found) -> bool:
    """Returns whether this is a parameter; those of quantized layers and of LoRA are not asked for."""
    return (
        isinstance(at.node, nnx.Param)
        and not isinstance(at.node, nnx.LoRAParam | PackedParam)
        and bool(at.path)
    )


def quantized_layer(
    at: Found,
    layout: KernelLayout,
    spec: LayerSpec,
    numerics: str,
    stats: Stats | None,
    quantize_fn: Callable[[Any, WeightSpec], QTensor],
) -> QuantizedLayer:
    """Returns what stands for a layer.

    Raises:
        ValueError: naming the layer, if its kernel or its input cannot be quantized.
    """
    kernel = at.node.kernel[...]
    act = input_quantizer(at.name, spec.act, kernel.ndim > len(layout.shape), stats)
    weight = None
    if spec.weight is not None:
        try:
            weight = quantized_kernel(jnp.asarray(kernel), layout, spec.weight, quantize_fn)
        except ValueError as error:
            raise ValueError(f"{at.name}: {error}") from error
    origin = KernelOrigin(layout, str(jax.dtypes.canonicalize_dtype(kernel.dtype)))
    kind = kind_of(at.node)
    assert kind is not None
    return kind(at.node, weight, act, origin, numerics)
