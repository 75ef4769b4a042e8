"""Exact changes of a layer's input coordinates, applied to a parameter tree.

With input `x [.., K]` and kernel `W [K, N]`:

    x' = ((x - shift) / scale) R,    W' = Rᵀ (scale[:, None] * W),    b' = b + shift @ W

Scale and shift go into what produces the input where `Family.folds` has a place for it, at no cost
at run time; elsewhere, and for a rotation R always, a leaf beside the kernel maps the input. Where a fold
takes a scale and no shift, the leaf shifts what the fold has scaled.

Dimensions: M rows, K input channels, N output channels, R rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from qdit_jax.methods.folds import fold_inputs
from qdit_jax.models import family_of_params
from qdit_jax.quant import InputMap, LowRank, QTensor, Rotation, with_leaf
from qdit_jax.types import AnyArray, Params


@dataclasses.dataclass(frozen=True, eq=False)
class Transform:
    """New coordinates of one input; what is None stays as it is.

    Attributes:
        scale, shift: `[K]`.
        rotation: after both.
    """

    scale: Float[np.ndarray, " K"] | None = None
    shift: Float[np.ndarray, " K"] | None = None
    rotation: Rotation | None = None

    @property
    def is_identity(self) -> bool:
        """Whether nothing changes."""
        return self.scale is None and self.shift is None and self.rotation is None

    def of_rows(self, rows: Float[np.ndarray, "M K"]) -> Float[np.ndarray, "M K"]:
        """Returns inputs in the new coordinates."""
        moved = rows if self.shift is None else rows - self.shift
        scaled = moved if self.scale is None else moved / self.scale
        return scaled if self.rotation is None else np.asarray(self.rotation(jnp.asarray(scaled)))

    def of_kernel(self, kernel: Float[np.ndarray, "K N"]) -> Float[np.ndarray, "K N"]:
        """Returns a kernel for inputs in the new coordinates."""
        scaled = kernel if self.scale is None else kernel * np.asarray(self.scale)[:, None]
        if self.rotation is None:
            return scaled
        return np.asarray(self.rotation.of_kernel(jnp.asarray(scaled)))


@dataclasses.dataclass(frozen=True)
class Place:
    """Layers that read one input and so share its transform.

    Attributes:
        layers: the paths of those that are asked about; the first names the place.
        folded: whether a scale costs nothing at run time, and a shift neither unless `scale_only`.
        scale_only: whether the fold takes no shift.
    """

    layers: tuple[str, ...]
    folded: bool
    scale_only: bool = False

    def is_free(self, transform: Transform) -> bool:
        """Returns whether a transform of the input costs nothing at run time."""
        if transform.rotation is not None or not self.folded:
            return transform.is_identity
        return transform.shift is None or not self.scale_only


def places(params: Params, paths: Iterable[str]) -> list[Place]:
    """Returns the inputs of the layers `paths`, in that order; readers of one fold make one place."""
    family = family_of_params(params)
    flat = flatten_dict(params, sep="/")
    found: dict[Any, list[str]] = {}
    for path in paths:
        sources = () if family is None else tuple(family.producers(path, flat))
        found.setdefault(sources or path, []).append(path)
    return [
        Place(
            tuple(layers),
            folded=key != layers[0],
            scale_only=family is not None
            and key != layers[0]
            and not family.covered(layers[0], flat).shift.all(),
        )
        for key, layers in found.items()
    ]


def transformed(params: Params, place: Place, transform: Transform) -> Params:
    """Returns `params` of the same function, the input of `place` in new coordinates.

    Raises:
        ValueError: if a layer is quantized or has been given other coordinates already, a vector
            does not fit, or a shift meets a layer without bias.
    """
    if place.folded:
        now, transform = parts(place, transform)
        first = place.layers[0]
        params = fold_inputs(
            params,
            scale=None if now.scale is None else {first: now.scale},
            shift=None if now.shift is None else {first: now.shift},
        )
    flat = dict(flatten_dict(params, sep="/"))
    for path in place.layers:
        flat = mapped_at_run_time(flat, path, transform)
    return unflatten_dict(flat, sep="/")


def parts(place: Place, transform: Transform) -> tuple[Transform, Transform]:
    """Returns what the fold of a place takes of a transform, and what is left for run time after it."""
    turned = Transform(rotation=transform.rotation)
    if not place.scale_only or transform.shift is None:
        return dataclasses.replace(transform, rotation=None), turned
    scale = 1.0 if transform.scale is None else transform.scale
    return Transform(transform.scale), dataclasses.replace(turned, shift=transform.shift / scale)


def mapped_at_run_time(flat: dict[str, Any], path: str, transform: Transform) -> dict[str, Any]:
    """Returns the flat tree with leaves that map the input of the layer `path`, and its kernel."""
    if transform.is_identity:
        return flat
    check_free_of_maps(flat, path, transform)
    stored = jnp.asarray(flat[f"{path}/kernel"])
    kernel = stored.astype(jnp.float32).reshape(-1, stored.shape[-1])
    if transform.scale is not None or transform.shift is not None:
        scale = np.ones(len(kernel)) if transform.scale is None else np.asarray(transform.scale)
        shift = None if transform.shift is None else jnp.asarray(transform.shift, jnp.float32)
        if shift is not None:
            flat = {**flat, f"{path}/bias": moved_bias(flat, path, kernel, shift)}
        flat = with_leaf(
            flat, path, "input_map", InputMap(jnp.asarray(1 / scale, jnp.float32), shift)
        )
        kernel = kernel * jnp.asarray(scale, jnp.float32)[:, None]
    if transform.rotation is not None:
        flat = with_leaf(flat, path, "rotation", transform.rotation)
        kernel = transform.rotation.of_kernel(kernel)
    return {**flat, f"{path}/kernel": kernel.reshape(stored.shape).astype(stored.dtype)}


def moved_bias(
    flat: dict[str, Any], path: str, kernel: Float[Array, "K N"], shift: Float[Array, " K"]
) -> Array:
    """Returns the bias that takes a shift of the input back; raises `ValueError` if there is none."""
    if f"{path}/bias" not in flat:
        raise ValueError(f"{path} has no bias, which a shift of its input needs; scale it only.")
    bias = jnp.asarray(flat[f"{path}/bias"])
    return (bias + jnp.matmul(shift, kernel, precision=jax.lax.Precision.HIGHEST)).astype(
        bias.dtype
    )


def check_free_of_maps(flat: dict[str, Any], path: str, transform: Transform) -> None:
    """Raises `ValueError` unless the layer is in full precision, and what it has beside its kernel
    works on the input before `transform` does."""
    if isinstance(flat.get(f"{path}/kernel"), QTensor) or f"{path}/act_quant" in flat:
        raise ValueError(f"{path} is quantized already; start from the full-precision checkpoint.")
    turns_alone = transform.scale is None and transform.shift is None
    for slot in (*(() if turns_alone else ("input_map",)), "rotation", "low_rank"):
        if f"{path}/{slot}" in flat:
            raise ValueError(
                f"{path} has an entry {slot!r} already; start from the checkpoint as converted."
            )


def with_branch(params: Params, path: str, branch: LowRank) -> Params:
    """Returns `params` with a branch beside a layer whose kernel keeps what the branch, as stored,
    does not compute, so that the layer's function stays.

    That is exact but for a subspace in 16 bits, whose branch carries its own rounding.

    Args:
        branch: of the layer's input after its input map and rotation.
    """
    flat = dict(flatten_dict(params, sep="/"))
    kernel = jnp.asarray(flat[f"{path}/kernel"])
    down, up = (jnp.asarray(a, jnp.float32) for a in (branch.down, branch.up))
    rest = kernel.astype(jnp.float32).reshape(-1, kernel.shape[-1])
    rest = rest - jnp.matmul(down, up, precision=jax.lax.Precision.HIGHEST)
    flat[f"{path}/kernel"] = rest.reshape(kernel.shape).astype(kernel.dtype)
    return unflatten_dict(with_leaf(flat, path, "low_rank", branch), sep="/")


def sixteen_bits(values: AnyArray) -> Array:
    """Returns values in float16, or in bfloat16 where they exceed its range."""
    values = jnp.asarray(values, jnp.float32)
    fits = bool(jnp.max(jnp.abs(values)) < 6e4)
    return values.astype(jnp.float16 if fits else jnp.bfloat16)


def matrix_of(params: Params, paths: Sequence[str]) -> Float[np.ndarray, "K N"]:
    """Returns the kernels of layers that read one input, side by side."""
    flat = flatten_dict(params, sep="/")
    kernels = [np.asarray(flat[f"{path}/kernel"], np.float32) for path in paths]
    return np.concatenate([k.reshape(-1, k.shape[-1]) for k in kernels], axis=1)
