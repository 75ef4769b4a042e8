"""Kernels in the form in which a loop runs: with what each of its steps would compute of them."""

from __future__ import annotations

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jaxtyping import Array

from qdit_jax.kernels.matmul import checked_platform, first_that_fits
from qdit_jax.kernels.product import Product, invalid_reason
from qdit_jax.kernels.table import IMPLEMENTATIONS
from qdit_jax.quant import ActQuant, QTensor


def ready(
    q: QTensor,
    act: ActQuant | None,
    numerics: str,
    implementation: str | None = None,
    *,
    dtype: str,
    platform: str | None = None,
) -> QTensor:
    """Returns the same kernel as who computes its products has it in a loop.

    Every product gives the same, to the bit. A kernel that nobody can compute, or of stacked layers, stays as it is;
    arguments are those of `quantized_matmul`, `platform` one of `PLATFORMS`, by default JAX's.

    Raises:
        ValueError: for an unknown platform or implementation.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is not known.")
    product = Product((1, q.shape[0]), q, act, numerics, checked_platform(platform), dtype)
    if len(q.codes.shape) != 2 or invalid_reason(product) is not None:
        return q
    entry = first_that_fits(product) if implementation is None else IMPLEMENTATIONS[implementation]
    if entry.ready_fn is None:
        return q
    mesh = explicit_mesh(q)
    if mesh is None:
        return entry.ready_fn(q, product.act_spec)
    # Under Explicit axes unpacking would have to be told how its result is sharded.
    auto = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    return on_mesh(entry.ready_fn(on_mesh(q, auto), product.act_spec), mesh)


def explicit_mesh(q: QTensor) -> Mesh | None:
    """Returns the mesh of Explicit axes that a kernel's arrays are on, if there is one."""
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(q)]
    meshes = [s.mesh for s in shardings if isinstance(s, NamedSharding)]
    found = (m for m in meshes if isinstance(m, Mesh) and AxisType.Explicit in m.axis_types)
    return next(found, None)


def on_mesh(q: QTensor, mesh: Mesh) -> QTensor:
    """Returns a kernel with the same shards on a mesh of the same devices."""

    def one(leaf: Array) -> Array:
        if not isinstance(leaf.sharding, NamedSharding):
            return leaf
        return jax.device_put(leaf, NamedSharding(mesh, leaf.sharding.spec))

    found: QTensor = jax.tree.map(one, q)
    return found
