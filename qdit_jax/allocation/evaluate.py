"""Fitness of many assignments: one compilation, one or many devices, one or many processes.

Work is cut into items, a pair of an assignment and a batch of samples. Every device runs the same
program on the same number of items at a time, so an item's result does not depend on how many
devices or processes there are.

Dimensions: C assignments, L layers, J batches, P items per device and call.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, PyTree

from qdit_jax.allocation.assigned import assigned_params, check_coordinates
from qdit_jax.allocation.coordinates import Coordinates
from qdit_jax.allocation.objectives import Objective
from qdit_jax.allocation.space import Space
from qdit_jax.processes import naming_lost_workers
from qdit_jax.sampling import check_whole, device_mesh, filled_batch
from qdit_jax.types import AnyArray, Numbers, Params, Progress, ProgressFn, untold

Tree = TypeVar("Tree")


class BadFitnessError(ValueError):
    """An assignment whose fitness is not a number."""


class Evaluator:
    """Measures assignments of `space` under an objective.

    Args:
        space: static.
        params: the full-precision parameters; arguments of the compiled function.
        objective: see `objectives.Objective`; its arrays are arguments too.
        coordinates: of the layers whose choices have transforms or branches; arguments too.
        mesh: of one axis; all devices of all processes by default.
        per_device: items a device measures in one call, one after another (`lax.map`).
        batch_size: how many of them at once (vmap); 1 is fastest on CPU.
        progress_fn: told of the items of every call.
    """

    def __init__(
        self,
        space: Space,
        params: Params,
        objective: Objective,
        *,
        coordinates: Mapping[str, Coordinates] | None = None,
        mesh: Mesh | None = None,
        per_device: int = 1,
        batch_size: int = 1,
        progress_fn: ProgressFn = untold,
    ) -> None:
        if per_device < 1 or batch_size < 1 or per_device % batch_size:
            raise ValueError(
                f"per_device={per_device} must be a positive multiple of batch_size={batch_size}."
            )
        self.space = space
        self.objective = objective
        self.mesh = device_mesh(jax.devices()) if mesh is None else mesh
        self.num_items = per_device * self.mesh.size
        check_whole(params, "search")
        check_coordinates(space, coordinates or {})
        self.data = replicated((params, dict(coordinates or {}), objective), self.mesh)
        self.measure = measurer(space, self.mesh, per_device, batch_size)
        self.progress_fn = progress_fn
        self.num_measured = 0

    @property
    def num_compilations(self) -> int:
        """Returns how many programs were compiled; 1 after any number of assignments."""
        return self.measure._cache_size()

    def __call__(self, assignments: Numbers, batches: Sequence[int] | None = None) -> np.ndarray:
        """Returns the fitness of every assignment `[C, L]`, float64 `[C]`; lower is better.

        Raises:
            BadFitnessError: if one is not finite.
            LostWorkerError: if another process is gone.
        """
        measured = self.measurements(assignments, batches)
        scores = [self.objective.score(one) for one in measured]
        fitness = np.array(scores, np.float64)
        for assignment, value in zip(np.atleast_2d(assignments), fitness, strict=True):
            if not np.isfinite(value):
                raise BadFitnessError(
                    f"the objective returned {value} for the assignment {assignment.tolist()}; "
                    "check the objective, or exclude the choices that make the network overflow."
                )
        return fitness

    def measurements(
        self, assignments: Numbers, batches: Sequence[int] | None = None
    ) -> list[PyTree[np.ndarray]]:
        """Returns what the objective measured, one tree of arrays `[J, ...]` per assignment."""
        numbers = self.space.check(np.atleast_2d(assignments))
        batches = range(self.objective.num_batches) if batches is None else batches
        if not len(batches) or not all(0 <= b < self.objective.num_batches for b in batches):
            raise ValueError(
                f"batches={list(batches)} are not batches of an objective that has "
                f"{self.objective.num_batches}."
            )
        if not len(numbers):
            return []
        rows = np.repeat(numbers, len(batches), axis=0)
        columns = np.tile(np.array(batches, np.int32), len(numbers))
        results = []
        for start in range(0, len(rows), self.num_items):
            # The last call is filled up with its last item: the shapes never change.
            index = filled_batch(start, self.num_items, len(rows))
            out = self.run(rows[index], columns[index])
            count = min(self.num_items, len(rows) - start)
            results.append(jax.tree.map(operator.itemgetter(slice(count)), out))
            self.progress_fn(Progress(count))
        self.num_measured += len(rows)
        joined = jax.tree.map(lambda *parts: np.concatenate(parts), *results)
        count = len(batches)
        return [
            jax.tree.map(lambda a, i=i: a[i * count : (i + 1) * count], joined)
            for i in range(len(numbers))
        ]

    def run(
        self, rows: Int[np.ndarray, "C L"], batches: Int[np.ndarray, " C"]
    ) -> PyTree[np.ndarray]:
        """Returns the measurements of one full set of items, on the host of every process."""
        items = sharded((rows, batches), self.mesh)
        with naming_lost_workers():
            return jax.tree.map(np.asarray, self.measure(*self.data, *items))


@runtime_checkable
class Measurer(Protocol):
    """A compiled `(params, coordinates, objective, assignments [C, L], batches [C]) -> [C, ...]`."""

    def __call__(
        self,
        params: Params,
        coordinates: Mapping[str, Coordinates],
        objective: Objective,
        assignments: AnyArray,
        batches: AnyArray,
    ) -> PyTree[Array]: ...

    def _cache_size(self) -> int: ...


def measurer(space: Space, mesh: Mesh, per_device: int, batch_size: int) -> Measurer:
    """Returns the compiled function that measures assignments, see `Measurer`."""
    whole = PartitionSpec()
    split = PartitionSpec(mesh.axis_names[0])

    def one(
        params: Params,
        coordinates: Mapping[str, Coordinates],
        objective: Objective,
        item: tuple[Array, Array],
    ) -> PyTree[Array]:
        assignment, batch = item
        return objective.measure(assigned_params(params, space, assignment, coordinates), batch)

    def local(
        params: Params,
        coordinates: Mapping[str, Coordinates],
        objective: Objective,
        assignments: Int[Array, "C L"],
        batches: Int[Array, " C"],
    ) -> PyTree[Array]:
        return jax.lax.map(
            partial(one, params, coordinates, objective),
            (assignments, batches),
            batch_size=batch_size,
        )

    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(whole, whole, whole, split, split),
        out_specs=split,
        check_vma=False,
    )
    compiled: Any = jax.jit(mapped, out_shardings=NamedSharding(mesh, whole))
    return compiled  # JAX's types hide `_cache_size`


def replicated(tree: Tree, mesh: Mesh) -> Tree:
    """Returns `tree` with its arrays on every device of the mesh, in every process."""
    return placed(tree, NamedSharding(mesh, PartitionSpec()))


def sharded(tree: Tree, mesh: Mesh) -> Tree:
    """Returns `tree` with the first axis of its arrays split over the mesh."""
    return placed(tree, NamedSharding(mesh, PartitionSpec(mesh.axis_names[0])))


def placed(tree: Tree, sharding: NamedSharding) -> Tree:
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def place(leaf: AnyArray | float) -> Array:
        if jnp.issubdtype(jnp.asarray(leaf).dtype, jax.dtypes.prng_key):
            data = place(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(place, tree)
