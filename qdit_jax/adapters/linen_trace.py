"""Which layers a linen network calls, and whether their kernels reach them unchanged.

Nothing is computed: the network is traced with shapes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jaxtyping import Array, Shaped

from qdit_jax.adapters.layout import Contraction, KernelLayout
from qdit_jax.adapters.linen_layout import contraction_of
from qdit_jax.adapters.linen_product import (
    ONLY,
    first_line,
    interceptor,
    is_layer,
    optional,
    product,
)
from qdit_jax.quant import QTensor
from qdit_jax.types import AbstractArray, AnyArray

Path = tuple[str, ...]
MARK = (2, 3)  # shape of a mark; unequal axes show a transposition


@dataclasses.dataclass(frozen=True)
class ExampleCall:
    """A call of `model` to be traced: its arguments are arrays, abstract arrays, or static values.

    Positional arrays and abstract arrays are traced; all other arguments are passed as they are.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def shapes(
        self, variables: Mapping[str, Any], intercept: Callable[..., object]
    ) -> list[jax.ShapeDtypeStruct]:
        """Returns the shapes of the arrays that the call returns, without updated parameters."""
        given = {f"{i}": arg for i, arg in enumerate(self.args)} | dict(self.kwargs)
        traced = {name: value for name, value in given.items() if self.is_traced(name, value)}

        def call(tree: dict[str, Any], arrays: dict[str, Any]) -> list[AnyArray]:
            full = given | arrays
            args = [full[f"{i}"] for i in range(len(self.args))]
            kwargs = {name: full[name] for name in self.kwargs}
            with nn.intercept_methods(intercept), nn.intercept_methods(interceptor("simulated")):
                out = self.model.apply(tree, *args, **kwargs)
            if self.kwargs.get("mutable") and isinstance(out[1], Mapping):
                out = out[0], {name: part for name, part in out[1].items() if name != "params"}
            return [
                leaf for leaf in jax.tree.leaves(out) if isinstance(leaf, jax.Array | np.ndarray)
            ]

        return jax.eval_shape(call, variables, traced)

    def is_traced(self, name: str, value: object) -> bool:
        leaves = jax.tree.leaves(value)
        if name in self.kwargs:
            return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
        return bool(leaves) and all(hasattr(leaf, "shape") for leaf in leaves)


@dataclasses.dataclass
class Sightings:
    """What a trace has found.

    Attributes:
        shapes: of the arrays that the network returns.
        layers: by path: the layouts in which a layer's kernel is used, or why it is not a matrix.
        kinds: by path: the class of each other module.
    """

    shapes: list[jax.ShapeDtypeStruct]
    layers: dict[Path, set[KernelLayout | str]]
    kinds: dict[Path, str]


def sightings(call: ExampleCall, variables: Mapping[str, Any]) -> Sightings:
    """Returns the layers and other modules of a call, and the shapes of its outputs.

    Raises:
        ValueError: if the network cannot be called with these arguments.
    """
    found = Sightings([], {}, {})

    def record(
        next_fun: Callable[..., object],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> object:
        module = context.module
        out = next_fun(*args, **kwargs)
        if context.method_name == "__call__" and module.scope is not None:
            path = module.scope.path
            if is_layer(context):
                found.layers.setdefault(path, set()).add(way_of(module, args, kwargs))
            else:
                found.kinds[path] = type(module).__name__
        return out

    try:
        found.shapes = call.shapes(variables, record)
    except Exception as error:
        raise ValueError(
            f"{type(call.model).__name__} cannot be called with these parameters and example_args: "
            f"{type(error).__name__}: {first_line(error)} A network with other collections, such "
            "as batch_stats, needs all variables, {'params': ..., 'batch_stats': ...}, in place of "
            "its params; random keys and mutable collections go into example_kwargs."
        ) from error
    return found


def way_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> KernelLayout | str:
    try:
        ways = contraction_of(module, *args, **kwargs)
    except ValueError as error:
        return str(error).rstrip(".")
    shape = tuple(jnp.shape(optional(module, "kernel")))
    return KernelLayout(shape, ways.k_batch, ways.k_in, ways.k_out)


def layout_or_reason(
    found: Sightings, path: Path, kernel: AbstractArray | QTensor
) -> KernelLayout | str:
    """Returns the layout of a kernel in the call, or why it has none."""
    shape = tuple(kernel.shape)
    ways = found.layers.get(path, set())
    fitting = {way for way in ways if isinstance(way, str) or way.fits(shape)}
    if len(fitting) == 1:
        return fitting.pop()
    if fitting:
        return "its calls use the kernel in different ways"
    if ways:
        used = min(way.shape for way in ways if isinstance(way, KernelLayout))
        return (
            f"a kernel {shape} is used as {used}; only stacks along leading axes (nn.scan or nn.vmap "
            "with variable_axes={'params': 0}) can be quantized"
        )
    if path in found.kinds:
        return f"it is a {found.kinds[path]}; {ONLY}"
    return "the call with example_args does not reach it as a layer"


@partial(jax.tree_util.register_dataclass, data_fields=["mark"], meta_fields=["dtype"])
@dataclasses.dataclass(frozen=True)
class Marked:
    """A stand-in for a quantized kernel: an array of random keys, which allows no arithmetic."""

    mark: Any
    dtype: str  # of the kernel in full precision

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"other code reads the kernel's {name!r}")


def faults(
    call: ExampleCall,
    variables: dict[str, Any],
    flat: Mapping[Path, Any],
    layouts: dict[Path, KernelLayout],
    shapes: list[jax.ShapeDtypeStruct],
) -> dict[Path, str]:
    """Returns the kernels of `layouts` that are used in other ways than in their layer's product.

    A kernel that is normalized, tied to another layer or read by other code cannot be a `QTensor`.
    The call is traced with stand-ins; if that fails, with each half of them, by bisection.

    Raises:
        ValueError: if no kernel fails alone, but several do at once.
    """
    error = trial(call, variables, flat, layouts, shapes)
    if error is None:
        return {}
    if len(layouts) == 1:
        return dict.fromkeys(
            layouts, f"its kernel does not reach its product alone and unchanged ({error})"
        )
    paths = list(layouts)
    half = len(paths) // 2
    found: dict[Path, str] = {}
    for part in (paths[:half], paths[half:]):
        found |= faults(call, variables, flat, {path: layouts[path] for path in part}, shapes)
    rest = {path: layouts[path] for path in paths if path not in found}
    if rest and (error := trial(call, variables, flat, rest, shapes)):
        raise ValueError(
            f"{', '.join('/'.join(path) for path in rest)} cannot be quantized in one network: {error}."
        )
    return found


def trial(
    call: ExampleCall,
    variables: dict[str, Any],
    flat: Mapping[Path, Any],
    layouts: dict[Path, KernelLayout],
    shapes: list[jax.ShapeDtypeStruct],
) -> str | None:
    """Returns why the network cannot be called with stand-ins for kernels, or None if it can."""
    key = jax.eval_shape(lambda: jax.random.key(0)).dtype
    marked = dict(flat)
    for path, layout in layouts.items():
        kernel = flat[(*path, "kernel")]
        stacked = kernel.shape[: kernel.ndim - len(layout.shape)]
        mark = jax.ShapeDtypeStruct((*stacked, *MARK), key)
        marked[(*path, "kernel")] = Marked(mark, str(kernel.dtype))

    def stand_in(
        next_fun: Callable[..., object],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> object:
        module = context.module
        if not is_layer(context) or not isinstance(kernel := optional(module, "kernel"), Marked):
            return next_fun(*args, **kwargs)
        if kernel.mark.shape != MARK:
            raise ValueError("the kernel is transposed, or stacked along other than leading axes")
        return product(module, nothing, kernel.dtype, args, kwargs)

    try:
        found = call.shapes(variables | {"params": traverse_util.unflatten_dict(marked)}, stand_in)
    except Exception as error:
        return f"with random keys in its place: {type(error).__name__}: {first_line(error)}"
    same = [(s.shape, s.dtype) for s in found] == [(s.shape, s.dtype) for s in shapes]
    return None if same else f"the network would return {found} in place of {shapes}"


def nothing(rows: Shaped[Array, "B T K"], ways: Contraction) -> Shaped[Array, "B T N"]:
    """Returns zeros in the shape of a product `[B, T, N]`."""
    return jnp.zeros((*rows.shape[:-1], int(np.prod(ways.features))), rows.dtype)
