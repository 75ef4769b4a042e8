"""Takes one module's calls out of a network, to run them without it.

Dimensions: B batch, R rows of one sample along an array's first axis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from flax import linen as nn
from jaxtyping import Array

from qdit_jax.models.family import Network, example_inputs
from qdit_jax.types import AbstractArray, AnyArray, Params

# (path, module, its arguments as `(args, kwargs)`, output), for every call of every module.
CalledFn = Callable[[str, nn.Module, tuple[tuple[Any, ...], dict[str, Any]], Any], None]


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a module in a network: everything but its parameters and arrays.

    Calls of modules that are alike are equal, so that what is compiled for one serves for all.

    Attributes:
        module: unbound.
        structure: of `(args, kwargs)`.
        fixed: places and values of the arguments that are no arrays.
        rows: of each array among the arguments, its R; 0 for one that has no batch axis.
    """

    module: nn.Module
    structure: Any
    fixed: tuple[tuple[int, Any], ...]
    rows: tuple[int, ...]

    def __call__(self, params: Params, arrays: list[Array]) -> list[Array]:
        """Returns the arrays of the module's output."""
        leaves = list(arrays)
        for place, value in self.fixed:
            leaves.insert(place, value)
        args, kwargs = jax.tree.unflatten(self.structure, leaves)
        return arrays_of(self.module.apply({"params": params}, *args, **kwargs))


@contextmanager
def seen_calls(called_fn: CalledFn) -> Iterator[None]:
    """Calls `called_fn` after every `__call__` of a module while the context lasts."""

    def intercept(
        next_fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> object:
        if context.method_name == "is_watched":
            return True
        out = next_fn(*args, **kwargs)
        if context.method_name == "__call__":
            called_fn("/".join(context.module.path), context.module, (args, kwargs), out)
        return out

    with nn.intercept_methods(intercept):
        yield


def arrays_of(tree: object) -> list[Any]:
    """Returns the leaves of a tree that are arrays."""
    return [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, AbstractArray)]


def module_calls(model: Network, params: Params) -> dict[str, tuple[Call, ...]]:
    """Returns the calls of every module of a network, by path; nothing is computed.

    Raises:
        ValueError: if an array's first axis does not grow with the batch as a whole.
    """
    small, large = (traced_calls(model, params, batch) for batch in (2, 3))
    return {
        path: tuple(call_of(path, a, b) for a, b in zip(calls, large[path], strict=True))
        for path, calls in small.items()
    }


def traced_calls(
    model: Network, params: Params, batch: int
) -> dict[str, list[tuple[nn.Module, Any]]]:
    """Returns the module and the abstract arguments of every call, by path."""
    found: dict[str, list[tuple[nn.Module, Any]]] = {}

    def called(path: str, module: nn.Module, given: Any, out: Any) -> None:
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, AbstractArray) else x,
            given,
        )
        found.setdefault(path, []).append((module.clone(parent=None, name=None), abstract))

    with seen_calls(called):
        jax.eval_shape(
            lambda params, *inputs: model.apply({"params": params}, *inputs),  # type: ignore[attr-defined]
            params,
            *example_inputs(model, batch),
        )
    return found


def call_of(path: str, small: tuple[nn.Module, Any], large: tuple[nn.Module, Any]) -> Call:
    """Returns the call that was traced with batches of 2 and 3."""
    leaves, structure = jax.tree.flatten(small[1])
    fixed = tuple((i, x) for i, x in enumerate(leaves) if not isinstance(x, AbstractArray))
    pairs = zip(arrays_of(small[1]), arrays_of(large[1]), strict=True)
    rows = tuple(rows_of(path, a.shape, b.shape) for a, b in pairs)
    return Call(small[0], structure, fixed, rows)


def rows_of(path: str, small: tuple[int, ...], large: tuple[int, ...]) -> int:
    """Returns the rows of one sample of an array seen with batches of 2 and 3."""
    if small == large:
        return 0
    if small[1:] != large[1:] or small[0] % 2 or small[0] // 2 * 3 != large[0]:
        raise ValueError(
            f"{path} takes arrays {list(small)} and {list(large)} for batches of 2 and 3; the batch "
            "must be their first axis."
        )
    return small[0] // 2


def recorded_calls(
    apply: Callable[[], object], path: str
) -> tuple[list[list[AnyArray]], list[list[AnyArray]]]:
    """Returns the arrays among the arguments, and of the output, of each call of a module."""
    inputs, outputs = [], []

    def called(at: str, module: nn.Module, given: Any, out: Any) -> None:
        if at == path:
            inputs.append(arrays_of(given))
            outputs.append(arrays_of(out))

    with seen_calls(called):
        apply()
    return inputs, outputs
