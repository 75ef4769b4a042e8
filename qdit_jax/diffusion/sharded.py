"""Calls with arrays on a mesh of Explicit axes, the default of `jax.make_mesh`."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import AxisType, NamedSharding
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
