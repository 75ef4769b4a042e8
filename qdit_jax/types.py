"""Names for what every room passes on: arrays, keys, parameters and conditions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import jax
import numpy as np

# An array on the device, traced or not, or on the host.
AnyArray: TypeAlias = jax.Array | np.ndarray
# A number or what converts to an array of them.
Numbers: TypeAlias = AnyArray | np.generic | float | int | Sequence[Any]
# One number, traced or not; where a function says so, one per sample.
Scalar: TypeAlias = AnyArray | np.number | float | int
# A key of `jax.random`, typed or raw.
Key: TypeAlias = jax.Array
# Nested dicts by name; leaves are arrays, `QTensor`s, or other rows of `quant.LEAVES`.
Params: TypeAlias = Mapping[str, Any]
# A pytree of arrays with the batch as first axis: a label `[B]`, or a dict by the contract's names.
Condition: TypeAlias = (
    AnyArray | jax.ShapeDtypeStruct | int | Mapping[str, Any] | Sequence[Any] | None
)
# A pytree that comes back with the same structure.
Tree = TypeVar("Tree")


@runtime_checkable
class AbstractArray(Protocol):
    """What has a shape and a dtype: an array, `jax.ShapeDtypeStruct`, or an array still on disk."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...


# `metadata` of a dataclass's field that is newer than what fingerprints of the class are kept: at its
# default it does not count, so that a run begun before resumes.
UNSAID = {"unsaid": True}
# The same of a field that follows from others that count.
DERIVED = {"derived": True}


@dataclasses.dataclass(frozen=True)
class Progress:
    """News of a long computation: what every `progress_fn` is called with.

    Attributes:
        done: units finished since the last news; those that an earlier run left are news as well.
        total: how many there are in all, where that is news.
        stage: what begins to be done, such as `"reading vae"`.
        text: a line that a person should read.
        best: the least error, or cost, that a search has measured so far.
        layer: what became of a layer just finished, such as a `LayerReport`.
    """

    done: int = 0
    total: int | None = None
    stage: str | None = None
    text: str | None = None
    best: float | None = None
    layer: object = None


ProgressFn: TypeAlias = Callable[[Progress], object]


def untold(event: Progress) -> None:
    """Tells nobody: the default of every `progress_fn`."""
