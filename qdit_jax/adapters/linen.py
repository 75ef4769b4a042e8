"""Quantizing a Flax linen network that was written by somebody else.

`nn.Dense`, `nn.DenseGeneral` and `nn.Einsum` layers, those inside attention modules included, are
intercepted while the network is traced; its code stays as it is. Their parameters change as those
of our own networks do: a `kernel` becomes a `QTensor`, an `act_quant` entry appears beside it. A
`kernel_origin` beside a quantized kernel tells what it was.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import core, traverse_util
from flax import linen as nn

from qdit_jax.adapters.layout import KernelLayout
from qdit_jax.adapters.linen_layout import layout_from_bias
from qdit_jax.adapters.linen_product import interceptor
from qdit_jax.adapters.linen_trace import ExampleCall, Path, faults, layout_or_reason, sightings
from qdit_jax.adapters.product import KernelOrigin, input_quantizer, quantized_kernel, unfit
from qdit_jax.adapters.report import NetworkReport, check_rules, other_parameters
from qdit_jax.calibration import Stats
from qdit_jax.kernels import NUMERICS
from qdit_jax.ptq import check_rounding_only, rewrite_layers
from qdit_jax.quant import ActQuant, QTensor, WeightSpec, quantize
from qdit_jax.recipes import LayerSpec, Recipe


def quantize_linen(
    model: Any,
    params: Any,
    recipe: Recipe,
    *,
    example_args: Any = (),
    example_kwargs: Mapping[str, Any] | None = None,
    numerics: str = "simulated",
    stats: Stats | None = None,
    quantize_fn: Callable[[Any, WeightSpec], QTensor] = quantize,
    strict: bool = False,
) -> tuple[LinenApply, Any]:
    """Returns `(apply_fn, params)`: `model.apply` for quantized parameters, and these.

    `apply_fn({"params": params}, x)` is a pure function: jit it, scan over it, shard it. Jit
    `apply_fn` itself, not `model.apply`: the latter knows nothing of quantized leaves. Groups run
    along the input axes of a kernel taken together, in the kernel's order. Layers are named by
    their path, such as `encoder/attention/query`; a layer that is the whole network is `""`.

    Layers that a rule matches and that cannot be quantized (convolutions, embedding tables, layers
    with arithmetic of their own, kernels that are also normalized or read elsewhere) stay as they
    are; a warning names them. `apply_fn.report` tells which layers were quantized, and why others
    were not.

    Args:
        model: an `nn.Module` of `flax.linen`.
        params: the `"params"` collection, or all variables, `{"params": ..., "batch_stats": ...}`,
            which then come back with quantized params; partitioning boxes are taken off. Cast
            them before: results are promoted with the dtype that a kernel had here.
        recipe: which layers, and to what.
        example_args: a tuple of a call's arguments, arrays or abstract; the network is traced with them
            to learn its layers. Needed where a bias does not tell inputs from outputs: kernels
            of more than two axes without one, or stacked by `nn.scan`. Pass them wherever you
            can: without them, layers of other classes are met at the first call only.
        example_kwargs: keyword arguments of that call, such as `{"deterministic": True}`, `rngs`
            and `mutable` among them.
        numerics: `"simulated"` or `"integer"`, as in `quantized_matmul`.
        stats: statistics by layer, for static activations only.
        quantize_fn: `(kernel [K, N], spec) -> QTensor`.
        strict: refuse, instead of warn, if a layer that a rule matches would be left.

    Raises:
        TypeError: if `model` is not a linen module, or `params` is not a dict.
        ValueError: if a rule matches no layer that can be quantized, the recipe changes bits over
            time, the layout of a kernel cannot be told, the network cannot be called with the example, or with `strict`, as said there.
    """
    check_arguments(model, params, numerics)
    if not isinstance(example_args, tuple | list):
        raise TypeError(
            f"example_args is a {type(example_args).__name__}; pass a tuple, such as (x,)."
        )
    variables = core.unfreeze(nn.unbox(params))
    whole = isinstance(variables.get("params"), Mapping)
    variables = variables if whole else {"params": variables}
    flat = traverse_util.flatten_dict(variables["params"], keep_empty_nodes=True)
    kernels = {path[:-1]: leaf for path, leaf in flat.items() if is_kernel(path, leaf)}
    check_unquantized(recipe, kernels)
    if example_args or example_kwargs:
        call = ExampleCall(model, tuple(example_args), dict(example_kwargs or {}))
        layouts, kinds = traced_layouts(call, variables, flat, kernels, recipe)
    else:
        layouts, kinds = guessed_layouts(flat, kernels, recipe), {}
    report = report_of(recipe, flat, kernels, layouts, kinds)
    if report.left and strict:
        raise ValueError(f"strict=True, but {report}")
    if report.left:
        warnings.warn(f"quantize_linen: {report}", stacklevel=2)
    layers = {
        name: Layer(kernel, layout, spec)
        for path, kernel in kernels.items()
        if isinstance(layout := layouts.get(path), KernelLayout)
        and (spec := recipe.get(name := "/".join(path))) is not None
    }
    check_rounding_only({name: layer.spec for name, layer in layers.items()})
    written = quantized_layers(variables["params"], layers, stats, quantize_fn)
    variables = variables | {"params": written}
    traced = bool(example_args or example_kwargs)
    apply_fn = LinenApply(model, numerics, traced, report)
    return apply_fn, variables if whole else variables["params"]


@dataclasses.dataclass(frozen=True, eq=False)
class LinenApply:
    """`model.apply` for quantized parameters: a pure function.

    Attributes:
        traced: whether the layers are known from an example call.
        report: which layers were quantized.
    """

    model: nn.Module
    numerics: str
    traced: bool
    report: NetworkReport

    def __call__(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns what `model.apply` does; `rngs`, `mutable` and `method` are passed on."""
        with nn.intercept_methods(interceptor(self.numerics, self.traced)):
            return self.model.apply(variables, *args, **kwargs)


def check_arguments(model: Any, params: Any, numerics: str) -> None:
    """Raises `TypeError` or `ValueError` unless these are a linen network and its parameters."""
    if numerics not in NUMERICS:
        raise ValueError(f"numerics={numerics!r} is not known; use one of {NUMERICS}.")
    leaves = jax.tree.leaves(params, is_leaf=is_nnx) if not is_nnx(params) else [params]
    nnx = next((value for value in (model, *leaves) if is_nnx(value)), None)
    if nnx is not None:
        kind = nnx.__name__ if isinstance(nnx, type) else type(nnx).__name__
        raise TypeError(
            f"quantize_linen takes a flax.linen module and a dict of arrays; this is an nnx.{kind}, "
            "which qdit_jax.quantize_nnx takes: quantize_nnx(model, recipe)."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r} is not a flax.linen module.")
    if not isinstance(params, Mapping):
        raise TypeError(
            f"params is a {type(params).__name__}; pass the dict that model.init returned, or its "
            "'params'."
        )


def is_nnx(value: Any) -> bool:
    kinds = value.__mro__ if isinstance(value, type) else type(value).__mro__
    return any(kind.__module__.startswith("flax.nnx") for kind in kinds)


def is_kernel(path: Path, leaf: Any) -> bool:
    return path[-1] == "kernel" and hasattr(leaf, "shape")


def check_unquantized(recipe: Recipe, kernels: Mapping[Path, Any]) -> None:
    """Raises `ValueError` if the recipe matches a layer that is quantized already.

    Also if it changes bits over time: a network that is called by itself has no timestep.
    """
    if recipe.over_time is not None:
        raise ValueError(
            f"recipe {recipe.name!r} changes bits over time, which needs a network called by a "
            "`Denoiser`; leave it out: dataclasses.replace(recipe, over_time=None)."
        )
    for path, kernel in kernels.items():
        name = "/".join(path)
        if isinstance(kernel, QTensor) and recipe.get(name) is not None:
            raise ValueError(f"{name} is quantized already; start from full precision.")


def traced_layouts(
    call: ExampleCall,
    variables: Any,
    flat: Mapping[Path, Any],
    kernels: Mapping[Path, Any],
    recipe: Recipe,
) -> tuple[dict[Path, KernelLayout | str], dict[Path, str]]:
    """Returns the layout of every kernel, or why it cannot be quantized; the modules' classes."""
    found = sightings(call, variables)
    layouts = {path: layout_or_reason(found, path, kernel) for path, kernel in kernels.items()}
    layouts |= {path: why for path, kernel in kernels.items() if (why := unfit(kernel))}
    chosen = {
        path: layout
        for path, layout in layouts.items()
        if isinstance(layout, KernelLayout) and recipe.get("/".join(path)) is not None
    }
    wrong = faults(call, variables, flat, chosen, found.shapes) if chosen else {}
    return layouts | wrong, found.kinds


def guessed_layouts(
    flat: Mapping[Path, Any], kernels: Mapping[Path, Any], recipe: Recipe
) -> dict[Path, KernelLayout | str]:
    """Returns the layouts that biases suggest of the kernels that the recipe matches.

    They are checked in the first call.

    Raises:
        ValueError: if a layout cannot be told.
    """
    found: dict[Path, KernelLayout | str] = {}
    for path, kernel in kernels.items():
        name = "/".join(path)
        if recipe.get(name) is None:
            continue
        query = kernels.get((*path[:-1], "query")) if path[-1:] == ("out",) else None
        layout = unfit(kernel) or layout_from_bias(kernel, flat.get((*path, "bias")), query)
        if layout is None:
            raise ValueError(
                f"{name}: its kernel {tuple(kernel.shape)} and bias do not tell inputs from outputs "
                "(it may be a convolution's); pass example_args=(x, ...), arguments that the "
                "network is called with, or leave it out with a rule that has no spec."
            )
        found[path] = layout
    return found


def report_of(
    recipe: Recipe,
    flat: Mapping[Path, Any],
    kernels: Mapping[Path, Any],
    layouts: Mapping[Path, KernelLayout | str],
    kinds: Mapping[Path, str],
) -> NetworkReport:
    """Returns which of the layers that the recipe matches are quantized.

    Raises:
        ValueError: if a rule matches none that can be.
    """
    names = {"/".join(path): layouts.get(path) for path in kernels}
    reasons = {name: why for name, why in names.items() if isinstance(why, str)}
    others = other_parameters(flat, recipe, kinds)
    check_rules(recipe, list(names), reasons | others)
    matched = [name for name in names if recipe.get(name) is not None]
    left = {name: reasons[name] for name in matched if name in reasons} | others
    return NetworkReport(tuple(name for name in matched if name not in reasons), left)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer to be quantized: its kernel in full precision, the kernel's axes, and the settings."""

    kernel: Any
    layout: KernelLayout
    spec: LayerSpec


def quantized_layers(
    params: Any,
    layers: Mapping[str, Layer],
    stats: Stats | None,
    quantize_fn: Callable[[Any, WeightSpec], QTensor],
) -> Any:
    """Returns `params` with the kernels and input quantizers of some layers, by path, replaced.

    Raises:
        ValueError: naming the layer, if its kernel or its input cannot be quantized.
    """

    def act_fn(name: str) -> ActQuant | None:
        layer = layers[name]
        is_stack = len(layer.kernel.shape) > len(layer.layout.shape)
        return input_quantizer(name, layer.spec.act, is_stack, stats)

    def weight_fn(name: str, _: str, kernel: Any) -> Any:
        layer = layers[name]
        if layer.spec.weight is None:
            return kernel
        try:
            return quantized_kernel(
                jnp.asarray(kernel), layer.layout, layer.spec.weight, quantize_fn
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def origin(name: str, kernel: Any) -> dict[str, Any]:
        if layers[name].spec.weight is None:
            return {}
        dtype = jax.dtypes.canonicalize_dtype(kernel.dtype)
        return {"kernel_origin": KernelOrigin(layers[name].layout, str(dtype))}

    return rewrite_layers(params, layers, weight_fn=weight_fn, act_fn=act_fn, beside_fn=origin)
