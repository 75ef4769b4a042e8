"""Lazy arrays, computed on use, and a writer that computes and writes one at a time.

A parameter tree may hold a `DeferredArray` wherever it may hold an array: a checkpoint's arrays that
are still on disk, or the arrays of a kernel that is quantized while it is being written.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict
from numpy.typing import DTypeLike

from qdit_jax.files import AnyPath
from qdit_jax.types import AnyArray, Params

Handler: TypeAlias = ocp.type_handlers.TypeHandler
Info: TypeAlias = ocp.type_handlers.ParamInfo


@dataclasses.dataclass(frozen=True, eq=False)
class DeferredArray:
    """A lazy array of known shape and dtype, recomputed on every use and never cached.

    NumPy and JAX functions accept it as an array.

    Attributes:
        make: computes arrays by name; arrays that come from one computation share this object.
        name: which of them this one is.
        source: the checkpoint folder that it is read from, if it is.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], Mapping[str, Any]]
    name: str
    source: AnyPath | None = None

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def read(self) -> jax.Array:
        """Returns the array on the default device, not committed to it."""
        return on_device(self.make()[self.name])

    def __jax_array__(self) -> jax.Array:
        return self.read()

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.make()[self.name], dtype)


@runtime_checkable
class Readable(Protocol):
    """An array on disk, of which parts are read."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray: ...


def on_device(array: AnyArray) -> jax.Array:
    """Returns `array` as a `jax.Array`; a NumPy array goes onto the default device, uncommitted."""
    return array if isinstance(array, jax.Array) else jax.device_put(array)


def placed(array: np.ndarray | Readable, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Returns a host's array with that sharding; each device is given its own part alone.

    None is the default device, uncommitted. `array` may also be still on disk: then no more is read
    than the parts of this process's devices.
    """
    if sharding is None:
        return jax.device_put(np.asarray(array))

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        return np.asarray(array[index or ()])

    return jax.make_array_from_callback(tuple(array.shape), sharding, part)


def save_arrays(folder: Path, arrays: Params) -> None:
    """Writes nested dicts of arrays to the new folder `folder` (Orbax, one file per array).

    Deferred arrays are computed in the order of the dicts, neighbors that share a `make` at once,
    and freed as soon as they are written.
    """
    flat = list(flatten_dict(arrays).values())
    order = [array for array in flat if isinstance(array, DeferredArray)]
    writer = SynchronousHandler(ocp.type_handlers.get_type_handler(jax.Array), order)
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, SynchronousHandler(ocp.type_handlers.get_type_handler(np.ndarray))),
        (jax.Array, writer),
        (DeferredArray, writer),
    )
    # The layout of one file for all would gather the arrays in memory.
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
    with failing_quietly(), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder.resolve(), args=ocp.args.PyTreeSave(arrays))


@contextmanager
def failing_quietly() -> Iterator[None]:
    """Keeps what fails in the threads of Orbax from being printed; what is raised stays."""
    hooks = threading.excepthook, sys.unraisablehook
    logger = logging.getLogger("asyncio")
    was_disabled = logger.disabled
    threading.excepthook = lambda failed: None
    sys.unraisablehook = lambda failed: None
    logger.disabled = True
    try:
        yield
    except BaseException:
        gc.collect()  # an abandoned task logs its error when it is collected
        raise
    finally:
        threading.excepthook, sys.unraisablehook = hooks
        logger.disabled = was_disabled


class SynchronousHandler:
    """A synchronous Orbax handler; it writes deferred arrays in the order given.

    No other thread keeps writing, so that nothing is pending after a failure.
    """

    def __init__(self, handler: Handler, order: Sequence[DeferredArray] = ()) -> None:
        self._handler = handler
        self._turn = {array: turn for turn, array in enumerate(order)}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handler, name)

    async def serialize(
        self,
        values: Sequence[AnyArray | DeferredArray],
        infos: Sequence[Info],
        args: Sequence[ocp.SaveArgs],
    ) -> list[ocp.future.Future]:
        """Writes the arrays; there is no future to wait for. See Orbax's `TypeHandler`."""
        requests = list(zip(values, infos, args, strict=True))
        deferred = [(x, info, arg) for x, info, arg in requests if isinstance(x, DeferredArray)]
        if held := [r for r in requests if not isinstance(r[0], DeferredArray)]:
            await self._write(*zip(*held, strict=True))
        deferred.sort(key=lambda request: self._turn[request[0]])
        for make, requested in groupby(deferred, key=lambda request: request[0].make):
            await self._write(*zip(*computed(make, requested), strict=True))
        return []

    async def _write(
        self,
        values: Sequence[AnyArray],
        infos: Sequence[Info],
        args: Sequence[ocp.SaveArgs],
    ) -> None:
        for future in await self._handler.serialize(values, infos, args):
            future.result()


def computed(
    make: Callable[[], Mapping[str, Any]],
    requests: Iterable[tuple[DeferredArray, Info, ocp.SaveArgs]],
) -> list[tuple[jax.Array, Info, ocp.SaveArgs]]:
    """Returns requests `(array, info, args)` with the arrays that `make` returns in place of deferred ones."""
    arrays = make()
    return [(on_device(arrays[array.name]), info, args) for array, info, args in requests]
