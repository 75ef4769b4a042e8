"""Calls with arrays on a mesh of Explicit axes, the default of `jax.make_mesh`, and calls on one device of many."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jaxtyping import Array


def in_auto_axes(fn: Callable[..., Array], x: Array, *args: object) -> Array:
    """Returns `fn(x, *args)`, an array of as many axes as `x`, sharded as `x` is.

    Under Explicit axes an operation whose output sharding is ambiguous must be given one. Inside of
    `fn` the compiler chooses instead, so that networks need not know of it. On other meshes and
    without one this is a plain call.
    """
    sharding = getattr(jax.typeof(x), "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    if sharding is None or mesh is None or AxisType.Explicit not in mesh.axis_types:
        return fn(x, *args)
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    axes = tuple(name for name, kind in kinds if kind is AxisType.Explicit)
    out = NamedSharding(mesh, sharding.spec)
    return jax.sharding.auto_axes(fn, axes=axes, out_sharding=out)(x, *args)


def on_one_device() -> AbstractContextManager[object]:
    """Returns a context in which programs are for one device, whichever their arguments are on.

    Code that is traced there, or asked what it would do, knows from the mesh that nothing is split. JAX may see more
    devices.
    """
    mesh = AbstractMesh((1,), ("device",), axis_types=(AxisType.Auto,))
    context: AbstractContextManager[object] = jax.sharding.use_abstract_mesh(mesh)
    return context


def where_alone(*trees: object) -> AbstractContextManager[object]:
    """Returns `on_one_device()` if no array of `trees` is traced or on a second device, else a context of nothing.

    A mesh that is set already stays.
    """
    leaves = jax.tree.leaves(trees)
    is_set = bool(jax.sharding.get_abstract_mesh().axis_names)
    if jax.device_count() == 1 or is_set or any(isinstance(a, jax.core.Tracer) for a in leaves):
        return nullcontext()
    used = [
        leaf.sharding.device_set
        for leaf in leaves
        if isinstance(leaf, jax.Array) and leaf.committed
    ]
    return nullcontext() if len(set().union(*used)) > 1 else on_one_device()
