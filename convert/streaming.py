"""Parameters that are read while they are written: memory holds one leaf at a time.

A leaf's shape and dtype follow from the file's header. One that the file stores quantized is read once
for its structure, and again when it is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np

from qdit_convert.plan import (
    Leaf,
    Params,
    Plan,
    Shape,
    inserted,
    not_finite_error,
    plain,
    problems_of,
    read_leaf,
)
from qdit_convert.tensors import StoredTensor

if TYPE_CHECKING:
    from qdit_jax.checkpoint import DeferredArray

QuantizedFn = Callable[[Leaf, Mapping[str, StoredTensor]], Mapping[str, Any]]


def deferred_params(
    plan: Plan,
    tensors: Mapping[str, StoredTensor],
    dtype: np.dtype | None,
    on_leaf: Callable[[Leaf], None],
    around_fn: Callable[[], AbstractContextManager[None]],
    quantized_fn: QuantizedFn = plain,
) -> Params:
    """Returns the tree of `build_params` with lazy arrays, which are read whenever they are used.

    Args:
        dtype, quantized_fn: as of `build_params`.
        on_leaf: called whenever a leaf is read.
        around_fn: the context in which a leaf is read, for its errors.

    Raises:
        UserError: when an array is read, as `build_params`, naming every tensor that is not finite.
    """
    params: Params = {}
    for leaf in plan.leaves:

        def make(leaf: Leaf = leaf) -> dict[str, Any]:
            with around_fn():
                found = {
                    name: array
                    for path, value in quantized_fn(leaf, tensors).items()
                    for name, array in arrays_of(path, value).items()
                }
                if not found:
                    array, bad = read_leaf(leaf, tensors, dtype)
                    if bad:
                        raise not_finite_error(problems_of(plan, tensors))
                    found = {leaf.path: array}
            on_leaf(leaf)
            return found

        quantized = quantized_fn(leaf, tensors)
        for path, value in quantized.items():
            inserted(params, path, deferred_leaf(path, value, make))
        if not quantized:
            inserted(
                params, leaf.path, deferred(*shape_and_dtype(leaf, tensors, dtype), make, leaf.path)
            )
    return params


def shape_and_dtype(
    leaf: Leaf, tensors: Mapping[str, StoredTensor], dtype: np.dtype | None
) -> tuple[Shape, np.dtype]:
    """Returns what the array of a leaf will be, reading nothing."""
    if leaf.values is not None:
        array, _ = read_leaf(leaf, tensors, dtype)
        return array.shape, array.dtype
    sources = [tensors[key] for key in leaf.sources]
    stored = np.result_type(*(tensor.dtype for tensor in sources))
    rest = sources[0].shape[1:]
    shape = (sum(s.shape[0] for s in sources), *rest) if len(sources) > 1 else sources[0].shape
    moved = leaf.transform(np.broadcast_to(np.zeros((), stored), shape))
    if dtype is None:
        dtype = np.dtype("f4") if stored == np.dtype("f8") else stored
    return moved.shape, dtype


def deferred_leaf(path: str, value: Any, make: Callable[[], Mapping[str, Any]]) -> Any:
    """Returns a quantized leaf with lazy arrays in place of its own."""
    arrays = {
        name: deferred(array.shape, array.dtype, make, name)
        for name, array in arrays_of(path, value).items()
    }
    if not dataclasses.is_dataclass(value):
        return arrays[path]
    fields = {name.rpartition("/")[2]: array for name, array in arrays.items()}
    return dataclasses.replace(value, **fields)  # type: ignore[type-var]


def arrays_of(path: str, value: Any) -> dict[str, Any]:
    """Returns the arrays of a leaf, each under a name of its own."""
    from qdit_jax.checkpoint import split_fields

    if not dataclasses.is_dataclass(value):
        return {path: value}
    return {f"{path}/{name}": array for name, array in split_fields(value)[0].items()}


def deferred(
    shape: Shape, dtype: np.dtype, make: Callable[[], Mapping[str, Any]], name: str
) -> DeferredArray:
    """Returns a lazy array."""
    from qdit_jax.checkpoint import DeferredArray

    return DeferredArray(tuple(shape), np.dtype(dtype), make, name)
