"""Parameters that are split over devices, of a network that no single device holds: they stay where they are.

XLA's partitioner then divides every product among the devices, and batches lie over the mesh's axis of data.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qdit_jax.types import Params

DATA = ("batch", "data")  # names of the axis that batches are split over
Tree = TypeVar("Tree")


def partition_mesh(params: Params) -> Mesh | None:
    """Returns the mesh that parameters are split over, its axes Auto; None if none is split.

    Raises:
        ValueError: if they are split over several meshes, or over devices of several processes.
    """
    found: dict[Mesh, None] = {}
    for leaf in jax.tree.leaves(params):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and not sharding.is_fully_replicated:
            assert isinstance(sharding.mesh, Mesh)
            found[sharding.mesh] = None
    if not found:
        return None
    if len(found) > 1:
        names = " and ".join(str(dict(mesh.shape)) for mesh in found)
        raise ValueError(f"parameters are split over several meshes, {names}; place all on one.")
    (mesh,) = found
    if {device.process_index for device in mesh.devices.flat} != {jax.process_index()}:
        raise ValueError(
            "parameters are split over devices of several processes; split them over those of one, "
            "jax.local_devices()."
        )
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)


def batch_spec(mesh: Mesh) -> PartitionSpec:
    """Returns how batches lie on a mesh: split over its axis `batch` or `data`, else whole on every device."""
    found = [name for name in DATA if name in mesh.axis_names]
    return PartitionSpec(*found[:1])


def batch_parts(mesh: Mesh) -> int:
    """Returns in how many parts a batch is split."""
    spec = batch_spec(mesh)
    return mesh.shape[spec[0]] if len(spec) else 1


def kept_in_place(tree: Tree, mesh: Mesh) -> Tree:
    """Returns arrays where they are on the devices of `mesh`; others whole on each of them."""
    devices = set(mesh.devices.flat)

    def one(leaf: Any) -> Any:
        sharding, spec = getattr(leaf, "sharding", None), PartitionSpec()
        if isinstance(sharding, NamedSharding) and sharding.device_set == devices:
            spec = sharding.spec
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    found: Tree = jax.tree.map(one, tree)
    return found


def params_in_place(params: Params) -> Params:
    """Returns parameters as any program takes them: split ones on Auto axes, the others as they are."""
    home = partition_mesh(params)
    return params if home is None else kept_in_place(params, home)


def check_whole(params: Params, what: str) -> None:
    """Raises `ValueError` if parameters are split over devices; `what` would copy all of them to each."""
    if (mesh := partition_mesh(params)) is not None:
        raise ValueError(
            f"the parameters are split over {mesh.size} devices, and {what} copies all of them to each; load "
            "the checkpoint without sharding. generate, evaluate and calibrate take them as they are."
        )


def check_partitioned(mesh: Mesh | None, shard_tokens: int, hoist: bool | None) -> None:
    """Raises `ValueError` for what takes whole parameters, if they are split over a mesh."""
    if mesh is None:
        return
    if shard_tokens != 1:
        raise ValueError(
            f"shard_tokens={shard_tokens} needs all parameters on each device, and they are split over "
            f"{mesh.size}; use shard_tokens=1, or load them without sharding."
        )
    if hoist:
        raise ValueError(
            f"hoist=True needs all parameters on each device, and they are split over {mesh.size}; use "
            "hoist=None, or load them without sharding."
        )
