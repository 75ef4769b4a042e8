"""The transform: a parameter tree in, the same tree with quantized leaves out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from qdit_jax.calibration import Stats
from qdit_jax.checkpoint import DeferredArray
from qdit_jax.models import TABLE
from qdit_jax.ptq.finite_params import finite_where_kept
from qdit_jax.ptq.over_time import NameFn, bits_of_passes, quantized_over_time
from qdit_jax.ptq.rewriting import rewrite_layers, weight_name
from qdit_jax.ptq.static_acts import act_quantizer
from qdit_jax.quant import (
    GREATEST_WEIGHT,
    ActQuant,
    QTensor,
    WeightSpec,
    check_finite,
    other_kernel,
    packed_nbytes,
    quantize,
)
from qdit_jax.recipes import LayerSpec, Recipe, other_weights
from qdit_jax.types import AbstractArray, AnyArray, Params

# Called with a layer's path, its kernel `[K, N]` and its `QTensor`.
OnLayer = Callable[[str, Any, QTensor], None]
Leaf = TypeVar("Leaf", jax.Array, np.ndarray)


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """What quantizing one layer does to its kernel `[K, N]`; bytes before and after.

    A kernel of other bits at some timesteps is a row of its own, `path/kernel_w8`, with no bytes
    before.
    """

    path: str
    shape: tuple[int, int]
    spec: LayerSpec
    bytes_before: int
    bytes_after: int


def plan(params: Params, recipe: Recipe) -> list[LayerPlan]:
    """Returns what `quantize_params` would do, layer by layer, computing nothing.

    Raises:
        ValueError: as `quantize_params`.
    """
    flat = flatten_dict(params, sep="/")
    plans = []
    for path, spec in recipe.resolve(params).items():
        name = weight_name(flat, path)
        if name is None:
            continue
        kernel = flat[name]
        check_unquantized(path, kernel)
        k, n = matrix_shape(kernel)
        k, n = (n, k) if name.endswith(TABLE) else (k, n)
        before = k * n * np.dtype(kernel.dtype).itemsize
        after = before if spec.weight is None else packed_nbytes(k, n, spec.weight)
        plans.append(LayerPlan(path, (k, n), spec, before, after))
    shapes = {layer.path: layer for layer in plans}
    for bits in bits_of_passes(recipe):
        for path, spec in other_weights(params, recipe, bits).items():
            own = shapes[path]
            after = (
                own.bytes_before if spec.weight is None else packed_nbytes(*own.shape, spec.weight)
            )
            name = f"{path}/{other_kernel(bits)}"
            plans.append(LayerPlan(name, own.shape, spec, 0, after))
    return plans


def quantize_params(
    params: Params,
    *,
    recipe: Recipe,
    stats: Stats | None = None,
    quantize_fn: Callable[[str, Any, WeightSpec], QTensor] | None = None,
    on_layer: OnLayer | None = None,
) -> dict[str, Any]:
    """Returns `params` with each kernel that `recipe` names as a `QTensor`.

    A layer whose input is quantized gains an `act_quant` entry; an operand `q` of an attention
    product gains `q_quant` beside `qkv`. A label table becomes a `QTensor` too, turned to `[D, rows]`
    so that groups run along a row, always rounded to nearest. Where the recipe's schedule changes
    the bits of weights, a layer gains a kernel for each of them (`kernel_w8`). Nothing else changes
    and no array is copied.

    Args:
        recipe: which layers, and to what.
        stats: calibration statistics, for static activation scales only.
        quantize_fn: `(path, kernel [K, N], spec) -> QTensor`; rounding to nearest when None.
        on_layer: called with the path, the kernel and its `QTensor` after each layer.

    Raises:
        ValueError: if a rule of the recipe matches no layer, a layer is quantized already, a leaf
            holds NaN or infinity, statistics are needed and absent, or the recipe asks for a
            transform or a branch, which a method makes before rounding.
    """

    def once(recipe: Recipe, name_fn: NameFn) -> Params:
        def quantized(
            path: str, name: str, leaf: AnyArray | DeferredArray, spec: WeightSpec
        ) -> QTensor:
            kernel = jnp.asarray(leaf)  # one that is on disk is read once
            check_finite(path, kernel, GREATEST_WEIGHT)
            matrix = as_matrix(name, kernel)
            q = (
                quantize(matrix, spec)
                if quantize_fn is None or name.endswith(TABLE)
                else quantize_fn(path, matrix, spec)
            )
            if on_layer is not None and (called := name_fn(path)) is not None:
                on_layer(called, matrix, q)
            return q

        return rewrite_kernels(params, quantized, recipe=recipe, stats=stats)

    return quantized_over_time(params, recipe, once)


def rewrite_kernels(
    params: Params,
    rewrite_fn: Callable[[str, str, Any, WeightSpec], QTensor],
    *,
    recipe: Recipe,
    stats: Stats | None,
) -> dict[str, Any]:
    """Returns `params` with activation quantizers, and `rewrite_fn` of each kernel to be quantized.

    `rewrite_fn` takes a layer's path, its leaf's name, the leaf and its spec. See `quantize_params`.
    A schedule of bits over time is left to `quantized_over_time`.
    """
    specs = recipe.resolve(params)
    check_rounding_only(specs)

    def weight_fn(path: str, name: str, leaf: AbstractArray | QTensor) -> AbstractArray | QTensor:
        spec = specs[path].weight
        if spec is None:
            return leaf
        check_unquantized(path, leaf)
        return rewrite_fn(path, name, leaf, spec)

    def act_fn(path: str) -> ActQuant | None:
        spec = specs[path].act
        return None if spec is None else act_quantizer(path, spec, stats)

    written = rewrite_layers(params, specs, weight_fn=weight_fn, act_fn=act_fn)
    return finite_where_kept(params, written)


def check_rounding_only(specs: Mapping[str, LayerSpec]) -> None:
    """Raises `ValueError` if a spec asks for a transform or a branch, which rounding cannot make."""
    for path, spec in specs.items():
        if spec.asks_for is not None:
            raise ValueError(
                f"the recipe asks for {spec.asks_for} of {path}, which is made before rounding: use "
                "qdit.quantize(checkpoint, method='best', recipe=recipe), or round by "
                "recipe.for_rounding(), which leaves it out."
            )


def as_matrix(name: str, leaf: Leaf) -> Leaf:
    """Returns a kernel as `[K, N]`; a table `[rows, D]` as `[D, rows]`."""
    return leaf.T if name.endswith(TABLE) else leaf.reshape(matrix_shape(leaf))


def check_unquantized(path: str, kernel: object) -> None:
    if isinstance(kernel, QTensor):
        raise ValueError(
            f"{path} is quantized already ({kernel.bits} bits); start from the full-precision "
            "checkpoint."
        )


def matrix_shape(kernel: AbstractArray) -> tuple[int, int]:
    """Returns a kernel's shape with all input axes as one: `(K, N)`."""
    return int(np.prod(kernel.shape[:-1])), int(kernel.shape[-1])
