"""Builds the tensors that a torch file describes, as torch does: views, flags, and stand-ins."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from qdit_convert.pickle_reader import Name
from qdit_convert.tensors import FileSpan, StoredTensor, unreadable
from qdit_jax.errors import UserError

# What should be a tensor's shape or strides; a damaged file may hold anything in it.
Sizes: TypeAlias = Sequence[Any]


@dataclass(frozen=True)
class ElementType:
    """A dtype of torch; `problem` says what its tensors are if NumPy has no such dtype."""

    name: str
    dtype: np.dtype
    problem: str = ""


@dataclass(frozen=True)
class Storage:
    """A typed run of numbers in the file `path`, which several tensors may share.

    Attributes:
        count: the number of elements.
        span: returns their place in the file, which the older format gives after its tensors.
        first: the element of the span that the storage begins with.
    """

    path: Path
    kind: ElementType
    count: int
    span: Callable[[], FileSpan]
    first: int = 0


def rebuild_tensor(storage: object, offset: object, shape: Sizes, strides: Sizes) -> StoredTensor:
    """Returns the view of `storage` that torch would make: `offset` and `strides` in elements.

    Raises:
        UserError: if the view reaches outside the storage.
    """
    if not isinstance(storage, Storage) or len(shape) != len(strides):
        raise UserError("the pickle inside describes a tensor without a storage.")
    if type(offset) is not int or any(type(n) is not int or n < 0 for n in (*shape, *strides)):
        raise UserError("the pickle inside describes a tensor with an impossible size.")
    if offset < 0:
        raise UserError("the pickle inside describes a tensor with an impossible size.")
    dtype, size = storage.kind.dtype, math.prod(shape)
    reach = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if size else 0
    if offset + reach > storage.count:
        raise UserError(
            f"a tensor reaches to element {offset + reach} of a storage of {storage.count}."
        )
    # A repeated element (stride 0) may be small in the file and enormous in memory.
    if size * dtype.itemsize > max(storage.path.stat().st_size, 1 << 20):
        raise UserError("a tensor claims more bytes than the whole file has.")
    if storage.kind.problem:
        return unreadable(tuple(shape), dtype, storage.kind.problem)

    def read() -> np.ndarray:
        first = (storage.first + offset) * dtype.itemsize
        data = storage.span().read(first, reach * dtype.itemsize)
        view = np.ndarray(tuple(shape), dtype, data, 0, tuple(s * dtype.itemsize for s in strides))
        view.flags.writeable = False  # elements may be the same memory
        return view

    return StoredTensor(tuple(shape), dtype, read)


def rebuild_tensor_v2(
    storage: object,
    offset: object,
    shape: Sizes,
    strides: Sizes,
    requires_grad: object,
    hooks: object,
    metadata: object = None,
) -> StoredTensor:
    """Returns the view, its values negated or conjugated where `metadata` says so.

    `requires_grad` and `hooks` (of the backward pass) do not change values.
    """
    return _flagged(rebuild_tensor(storage, offset, shape, strides), metadata)


def rebuild_tensor_v3(
    storage: object,
    offset: object,
    shape: Sizes,
    strides: Sizes,
    requires_grad: object,
    hooks: object,
    dtype: object,
    metadata: object = None,
) -> StoredTensor:
    """Returns the view of an untyped storage whose elements are of `dtype`."""
    kind = _element_type(dtype)
    if not isinstance(storage, Storage) or storage.kind.dtype.itemsize != 1:
        raise UserError("the pickle inside describes a tensor without a storage.")
    if storage.first % kind.dtype.itemsize:
        raise UserError("the pickle inside describes a tensor that begins inside an element.")
    count, first = (n // kind.dtype.itemsize for n in (storage.count, storage.first))
    typed = replace(storage, kind=kind, count=count, first=first)
    return _flagged(rebuild_tensor(typed, offset, shape, strides), metadata)


def _flagged(tensor: StoredTensor, metadata: object) -> StoredTensor:
    """Returns `tensor` with the operations applied that torch defers until the values are used."""
    if metadata is None:
        return tensor
    if not isinstance(metadata, dict):
        raise UserError("the pickle inside gives a tensor metadata that are not a table.")
    for flag, value in metadata.items():
        if flag not in _DEFERRED or type(value) is not bool:
            raise UserError(
                f"a tensor's metadata say {flag!r}: {value!r}, which convert does not know; where the "
                "file came from, save clones of the tensors: {name: tensor.clone() for ...}."
            )
        if value:
            tensor = _applied(tensor, flag)
    return tensor


def _applied(tensor: StoredTensor, flag: str) -> StoredTensor:
    kinds, function = _DEFERRED[flag]
    if tensor.problem:
        return tensor
    if tensor.dtype.kind not in kinds:
        raise UserError(f"a tensor's metadata say {flag!r}, but its values are {tensor.dtype}.")
    return replace(tensor, read=lambda: function(tensor.read()))


# flag: (kinds of dtype that torch sets it for, what it stands for); V holds bfloat16 and 8-bit floats
_DEFERRED: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "neg": ("fcV", np.negative),
    "conj": ("c", np.conjugate),
}


def rebuild_parameter(
    tensor: object, requires_grad: object = True, hooks: object = None, state: object = None
) -> StoredTensor:
    """Returns `tensor`; gradients, hooks and attributes (`state`) of a parameter do not matter."""
    if not isinstance(tensor, StoredTensor):
        raise UserError("the pickle inside describes a parameter without a tensor.")
    return tensor


def rebuild_from_type(
    function: object, kind: object, arguments: Sequence[object], state: object
) -> StoredTensor:
    """Returns `function(*arguments)`: a tensor that had Python attributes."""
    if not isinstance(function, Name) or not callable(function.value):
        raise UserError("the pickle inside calls something that is not a tensor or table.")
    return rebuild_parameter(function.value(*arguments))


def rebuild_from_cpu(
    data: object, dtype: object, device: object, requires_grad: object
) -> StoredTensor:
    """Returns a tensor that lay on a device without storages, in `dtype`."""
    tensor, kind = rebuild_parameter(data), _element_type(dtype)
    if tensor.dtype == kind.dtype or tensor.problem:
        return tensor
    if kind.problem:
        return unreadable(tensor.shape, kind.dtype, kind.problem)
    return StoredTensor(tensor.shape, kind.dtype, lambda: tensor.read().astype(kind.dtype))


def rebuild_quantized(
    storage: object,
    offset: object,
    shape: Sizes,
    strides: Sizes,
    quantizer: object,
    requires_grad: object,
    hooks: object,
) -> StoredTensor:
    """Returns a stand-in for a quantized tensor of torch."""
    tensor = rebuild_tensor(storage, offset, shape, strides)
    return replace(tensor, problem=tensor.problem or "a quantized tensor")


def rebuild_sparse(layout: Any, data: Sequence[Any]) -> StoredTensor:
    """Returns a stand-in for a sparse tensor: `data` is indices, values, size (and a flag)."""
    name = str(layout.arguments[0]).removeprefix("torch.")
    *_, values, size = data[:3] if name == "sparse_coo" else data
    return unreadable(tuple(size), rebuild_parameter(values).dtype, f"a {name} tensor")


def rebuild_meta(
    dtype: object, shape: Sizes, strides: Sizes, requires_grad: object
) -> StoredTensor:
    """Returns a stand-in for a tensor of the meta device."""
    kind = _element_type(dtype)
    return unreadable(tuple(shape), kind.dtype, "on the meta device, which holds no values")


def rebuild_nested(buffer: object, sizes: object, strides: object, offsets: object) -> StoredTensor:
    """Returns a stand-in for a nested tensor."""
    values = rebuild_parameter(buffer)
    return unreadable(values.shape, values.dtype, "a nested tensor")


def rebuild_wrapper(
    kind: object,
    dtype: object,
    shape: Sizes,
    strides: Sizes,
    offset: object,
    layout: object,
    device: object,
    requires_grad: object,
) -> StoredTensor:
    """Returns a stand-in for a tensor subclass that keeps its values elsewhere."""
    return unreadable(tuple(shape), _element_type(dtype).dtype, "a wrapper that holds no values")


def _element_type(dtype: object) -> ElementType:
    if not isinstance(dtype, Name) or not isinstance(dtype.value, ElementType):
        raise UserError("the pickle inside describes a tensor without a dtype.")
    return dtype.value
