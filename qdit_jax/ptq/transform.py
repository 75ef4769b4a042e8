"""The transform: a parameter tree in, the same tree with quantised leaves out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from qdit_jax.ptq.recipe import TABLE, LayerSpec, Recipe
from qdit_jax.ptq.static_acts import act_quantizer
from qdit_jax.ptq.stats import Stats
from qdit_jax.quant import QTensor, WeightSpec, check_finite, packed_nbytes, quantize
from qdit_jax.quant.finite import GREATEST_WEIGHT


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """What quantising one layer does to its kernel `[K, N]`; bytes before and after."""

    path: str
    shape: tuple[int, int]
    spec: LayerSpec
    bytes_before: int
    bytes_after: int


def plan(params: Any, recipe: Recipe) -> list[LayerPlan]:
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
    return plans


def quantize_params(
    params: Any,
    *,
    recipe: Recipe,
    stats: Stats | None = None,
    quantize_fn: Callable[[str, Any, WeightSpec], QTensor] | None = None,
    on_layer: Callable[[str, Any, QTensor], None] | None = None,
) -> Any:
    """Returns `params` with each kernel that `recipe` names as a `QTensor`.

    A layer whose input is quantised gains an `act_quant` entry; an operand `q` of an attention
    product gains `q_quant` beside `qkv`. A label table becomes a `QTensor` too, turned to `[D, rows]`
    so that groups run along a row, always rounded to nearest. Nothing else changes and no array is
    copied.

    Args:
        recipe: which layers, and to what.
        stats: calibration statistics, for static activation scales only.
        quantize_fn: `(path, kernel [K, N], spec) -> QTensor`; rounding to nearest when None.
        on_layer: called with the path, the kernel and its `QTensor` after each layer.

    Raises:
        ValueError: if a rule of the recipe matches no layer, a layer is quantised already or holds
            NaN or infinity, or statistics are needed and absent.
    """

    def rewrite(path: str, name: str, leaf: Any, spec: WeightSpec) -> QTensor:
        matrix = as_matrix(name, jnp.asarray(leaf))
        check_finite(path, matrix, GREATEST_WEIGHT)
        q = (
            quantize(matrix, spec)
            if quantize_fn is None or name.endswith(TABLE)
            else quantize_fn(path, matrix, spec)
        )
        if on_layer is not None:
            on_layer(path, matrix, q)
        return q

    return rewrite_kernels(params, rewrite, recipe=recipe, stats=stats)


def rewrite_kernels(
    params: Any,
    rewrite_fn: Callable[[str, str, Any, WeightSpec], QTensor],
    *,
    recipe: Recipe,
    stats: Stats | None,
) -> Any:
    """Returns `params` with activation quantisers, and `rewrite_fn` of each kernel to be quantised.

    `rewrite_fn` takes a layer's path, its leaf's name, the leaf and its spec. See `quantize_params`.
    """
    flat = dict(flatten_dict(params, sep="/"))
    for path, spec in recipe.resolve(params).items():
        name = weight_name(flat, path)
        if spec.act is not None:
            entry = f"{path}_quant" if name is None else f"{path}/act_quant"
            flat[entry] = act_quantizer(path, spec.act, stats)
        if name is None or spec.weight is None:
            continue
        check_unquantized(path, flat[name])
        flat[name] = rewrite_fn(path, name, flat[name], spec.weight)
    return unflatten_dict(flat, sep="/")


def as_matrix(name: str, leaf: Any) -> Any:
    """Returns a kernel as `[K, N]`; a table `[rows, D]` as `[D, rows]`."""
    return leaf.T if name.endswith(TABLE) else leaf.reshape(matrix_shape(leaf))


def weight_name(flat: dict[str, Any], path: str) -> str | None:
    """Returns the key of a layer's kernel or table; None for operands of attention products."""
    return next((name for name in (f"{path}/kernel", path + TABLE) if name in flat), None)


def check_unquantized(path: str, kernel: Any) -> None:
    if isinstance(kernel, QTensor):
        raise ValueError(
            f"{path} is quantised already ({kernel.bits} bits); start from the full-precision "
            "checkpoint."
        )


def matrix_shape(kernel: Any) -> tuple[int, int]:
    """Returns a kernel's shape with all input axes as one: `(K, N)`."""
    return int(np.prod(kernel.shape[:-1])), int(kernel.shape[-1])
