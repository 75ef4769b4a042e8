"""Fingerprints of all that determines a result, so that no run resumes from another run's results.

A resumable job describes its settings by `fingerprint`, keeps that beside what it has computed, and
resumes only if every entry is the same. A value counts with its whole content: all bytes of
arrays and keys, configurations of networks, code and closures of functions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import types
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from qdit_jax.types import DERIVED, UNSAID

# Takes bytes, as the `update` of a hash does.
Update = Callable[[bytes | memoryview], None]
LENGTH = 16  # hexadecimal digits that are kept: 64 bits
PLAIN: tuple[type, ...] = (bool, int, float, str, type(None))


def fingerprint(**settings: object) -> dict[str, Any]:
    """Returns the settings as JSON's values: plain ones as they are, everything else as a digest.

    Raises:
        TypeError: if a value's content cannot be read, such as a generator's.
    """
    return {
        name: value if isinstance(value, PLAIN) else digest(value)
        for name, value in settings.items()
    }


def digest(value: object) -> str:
    """Returns a short digest of a value's whole content.

    Raises:
        TypeError: as `fingerprint`.
    """
    total = hashlib.sha256()
    feed(total.update, value)
    return total.hexdigest()[:LENGTH]


def first_difference(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Returns the first name whose values differ, or None; a name that one lacks counts as None."""
    names = sorted({*saved, *now})
    return next((name for name in names if saved.get(name) != now.get(name)), None)


def feed(update: Update, value: object) -> None:
    """Passes a value's content to `update`, each part after its type and length."""
    if isinstance(value, PLAIN):
        update(f"{type(value).__name__}:{value!r};".encode())
    elif isinstance(value, bytes):
        update(b"bytes:" + value)
    elif is_array(value):
        feed_array(update, value)
    elif isinstance(value, Mapping):
        update(f"map {len(value)}:".encode())
        for key in sorted(value, key=repr):
            feed(update, key)
            feed(update, value[key])
    elif isinstance(value, Sequence | set | frozenset):
        items = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        update(f"{type(value).__name__} {len(items)}:".encode())
        for item in items:
            feed(update, item)
    else:
        feed_object(update, value)


def is_array(value: object) -> bool:
    """Returns whether a value can be read as an array; settings may have a dtype and a shape, too."""
    named = hasattr(value, "dtype") and hasattr(value, "shape")
    return named and (hasattr(value, "__array__") or hasattr(value, "__jax_array__"))


def feed_array(update: Update, array: object) -> None:
    """Passes an array's dtype, shape and bytes; a PRNG key's data and kind."""
    if isinstance(array, jax.Array) and jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        update(f"key {array.dtype}:".encode())
        array = jax.random.key_data(array)
    array = np.asarray(array)
    update(f"array {array.dtype} {array.shape}:".encode())
    update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def feed_object(update: Update, value: object) -> None:
    """Passes an object's class and fields, or a function's code and what it refers to."""
    kind = type(value)
    update(f"{kind.__module__}.{kind.__qualname__}:".encode())
    if isinstance(value, type):
        update(f"{value.__module__}.{value.__qualname__};".encode())
    elif isinstance(value, partial):  # `jax.tree_util.Partial` as well
        feed(update, (value.func, value.args, value.keywords))
    elif isinstance(value, types.MethodType):
        feed(update, (value.__func__, value.__self__))
    elif isinstance(value, types.FunctionType):
        feed_function(update, value)
    elif hasattr(value, "__wrapped__"):  # jitted
        feed(update, value.__wrapped__)
    elif isinstance(value, types.ModuleType):
        update(f"{value.__name__};".encode())
    elif isinstance(value, nn.Module):
        hidden = {"parent", "name"}
        fields = [f.name for f in dataclasses.fields(value) if f.name not in hidden]
        found = {name: getattr(value, name) for name in fields}
        if found.get("dtype") == "float32":
            del found["dtype"]  # as before networks had that field
        feed(update, found)
    elif dataclasses.is_dataclass(value):
        said = [f for f in dataclasses.fields(value) if not is_unsaid(value, f)]
        feed(update, {f.name: getattr(value, f.name) for f in said})
    elif hasattr(value, "__dict__"):
        feed(update, vars(value))
    elif callable(value) and hasattr(value, "__qualname__"):  # built in
        update(f"{value.__module__}.{value.__qualname__};".encode())
    else:
        raise TypeError(
            f"a {kind.__name__} has no content that a fingerprint could hold; pass a function, a "
            "dataclass or arrays."
        )


def feed_function(update: Update, function: types.FunctionType) -> None:
    """Passes a function's name, code, defaults, and the values and functions that it reads.

    Of a decorator that keeps the function it decorates (`functools.wraps`), what it closes over
    counts as far as it has content: JAX's own keep much that has none.
    """
    update(f"{function.__module__}.{function.__qualname__};".encode())
    feed_code(update, function.__code__)
    feed_globals(update, function, {function})
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell_is_set(cell)]
    cells = [content for content in cells if content is not function]  # it calls itself
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is not None:
        cells = [wrapped, *(c for c in cells if c is not wrapped and is_value(c))]
    feed(update, (function.__defaults__, function.__kwdefaults__, cells))


def feed_globals(
    update: Update, function: types.FunctionType, seen: set[types.FunctionType]
) -> None:
    """Passes the module's values that a function reads, and the code of its module's functions."""
    for name in sorted(names_in(function.__code__)):
        value = function.__globals__.get(name)
        if name in function.__globals__ and is_value(value):
            feed(update, (name, value))
            continue
        if not isinstance(value, types.FunctionType) or value in seen:
            continue
        if value.__module__ == function.__module__:
            seen.add(value)
            feed_code(update, value.__code__)
            feed_globals(update, value, seen)


def names_in(code: types.CodeType) -> set[str]:
    """Returns the names that code mentions, those of functions inside it included."""
    inner = [names_in(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    return set(code.co_names).union(*inner)


def is_value(value: object) -> bool:
    """Returns whether `value` is plain, an array, or tables and lists of such."""
    leaves = jax.tree.leaves(value, is_leaf=lambda leaf: leaf is None)
    return all(isinstance(x, (*PLAIN, bytes, np.ndarray, np.generic, jax.Array)) for x in leaves)


def feed_code(update: Update, code: types.CodeType) -> None:
    update(code.co_code)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            feed_code(update, constant)
        else:
            update(repr(constant).encode())
    update(repr(code.co_names).encode())


def cell_is_set(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a name that has no value yet
        return False


def is_unsaid(value: object, field: dataclasses.Field[Any]) -> bool:
    """Returns whether a field does not count: it is `DERIVED`, or `UNSAID` and at its default."""
    if DERIVED.items() <= field.metadata.items():
        return True
    return UNSAID.items() <= field.metadata.items() and getattr(value, field.name) == field.default
