"""Programs that every device runs on its own samples, as if it were alone.

XLA cannot split a kernel of ours over devices, and need not: samples do not depend on each other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qdit_jax.types import AnyArray

BATCH = "batch"  # the axis of the mesh
Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the arguments of a program lie on a mesh; static in what is compiled.

    Attributes:
        mesh: with the axis `batch`.
        structure: of the arguments, a `PyTreeDef`.
        specs: of their arrays: whole on every device, or an axis of samples split over `batch`.
    """

    mesh: Mesh
    structure: Any
    specs: tuple[PartitionSpec, ...]

    def run(self, fn: Callable[..., Any], args: tuple[Any, ...], out_specs: Any) -> Any:
        """Returns `fn(*args)`, which each device computes of its own samples; traced.

        `out_specs` say where the results have their axis of samples.
        """

        def own(*leaves: Any) -> Any:
            return fn(*jax.tree.unflatten(self.structure, leaves))

        call = jax.shard_map(
            own, mesh=self.mesh, in_specs=self.specs, out_specs=out_specs, check_vma=False
        )
        return call(*jax.tree.leaves(args))


def layout_of(args: tuple[Any, ...], mesh: Mesh) -> Layout:
    """Returns how arguments lie; what is not on the mesh goes to every device, whole."""

    def spec_of(leaf: Any) -> PartitionSpec:
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh == mesh:
            return sharding.spec
        return PartitionSpec()

    leaves, structure = jax.tree.flatten(args)
    return Layout(mesh, structure, tuple(map(spec_of, leaves)))


def run_per_device(
    layout: Layout | None, fn: Callable[..., Any], args: tuple[Any, ...], out_specs: Any
) -> Any:
    """Returns `layout.run(fn, args, out_specs)`, and without a layout `fn(*args)`."""
    return fn(*args) if layout is None else layout.run(fn, args, out_specs)


def on_each_device(denoise_fn: Tree, mesh: Mesh) -> Tree:
    """Returns a denoiser with its parameters on every device, and scales of each sample on that of the sample."""
    found = jax.device_put(denoise_fn, NamedSharding(mesh, PartitionSpec()))
    scale: AnyArray | None = getattr(found, "scale", None)
    if not isinstance(scale, jax.Array | np.ndarray) or scale.ndim != 1 or len(scale) == 1:
        return found
    split = jax.device_put(scale, NamedSharding(mesh, PartitionSpec(BATCH)))
    return dataclasses.replace(found, scale=split)  # type: ignore[type-var]
