"""The parameter tree of an assignment, computed inside jit: one compilation for every assignment.

Choices that differ in nothing but the group size share one quantizer with a traced size; other
differences (bits, rules, formats, scales) are branches of a `lax.switch`, of which one runs. Number
formats and two levels of scales have a branch for each group size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qdit_jax.allocation.coordinates import Coordinates, coordinated_params
from qdit_jax.allocation.space import Space
from qdit_jax.ptq import rewrite_layers
from qdit_jax.quant import (
    ActSpec,
    WeightSpec,
    dequantize,
    fake_quantize,
    fake_quantize_kernel_traced,
    fake_quantize_traced,
    quantize,
)
from qdit_jax.types import AnyArray, Numbers, Params

Spec = TypeVar("Spec", WeightSpec, ActSpec)
Choice: TypeAlias = Int[AnyArray, ""] | np.integer | int
# (kernel [K, N] or input [..., K], index of the spec in its family) -> the same, quantized
Branch: TypeAlias = Callable[[AnyArray, Array], AnyArray]


@partial(jax.tree_util.register_dataclass, data_fields=["choice"], meta_fields=["specs"])
@dataclasses.dataclass(frozen=True)
class ChosenAct:
    """An activation quantizer whose spec is `specs[choice]`, the choice traced.

    It stands in the `act_quant` entry of a layer; None among the specs leaves the input as it is.
    """

    choice: Any
    specs: tuple[ActSpec | None, ...]

    def __call__(self, x: Float[Array, "*lead K"]) -> Float[Array, "*lead K"]:
        """Returns `x` fake-quantized, in the dtype of `x`; its derivative is that of `x`."""
        return straight_through(x, chosen(act_branch, self.specs, self.choice, x))


@jax.custom_jvp
def straight_through(
    x: Float[Array, "*shape"], rounded: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Returns `rounded`, differentiated as if it were `x` (rounding has no useful derivative)."""
    return rounded


@straight_through.defjvp
def _straight_through_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    return primals[1], tangents[0]


def assigned_params(
    params: Params,
    space: Space,
    assignment: Numbers,
    coordinates: Mapping[str, Coordinates] | None = None,
) -> Params:
    """Returns `params` quantized as `assignment` `[L]` says, for use inside jit.

    Kernels are the values that packed codes stand for, inputs have a `ChosenAct`. Equal to
    `quantize_params(params, recipe=recipe_of(space, assignment))` to float rounding.

    Args:
        coordinates: of the layers whose choices have transforms or branches, by path.

    Raises:
        ValueError: if those of a layer are absent.
    """
    check_coordinates(space, coordinates or {})
    if coordinates:
        params = coordinated_params(params, space, assignment, coordinates)
    assignment = jnp.asarray(assignment)
    layers = {layer.path: layer for layer in space.layers}
    choices = {layer.path: assignment[number] for number, layer in enumerate(space.layers)}

    def weight_fn(path: str, name: str, kernel: AnyArray) -> AnyArray:
        specs = tuple(spec.weight for spec in layers[path].choices)
        if not any(specs):
            return kernel
        matrix = kernel.reshape(layers[path].shape)
        return chosen(kernel_branch, specs, choices[path], matrix).reshape(kernel.shape)

    def act_fn(path: str) -> ChosenAct | None:
        specs = tuple(spec.act for spec in layers[path].choices)
        return ChosenAct(choices[path], specs) if any(specs) else None

    return rewrite_layers(params, layers, weight_fn=weight_fn, act_fn=act_fn)


def check_coordinates(space: Space, coordinates: Mapping[str, Coordinates]) -> None:
    """Raises `ValueError` if a layer has choices with a transform or a branch that were not fitted."""
    for layer in space.layers:
        asked = next((spec.asks_for for spec in layer.choices if spec.asks_for), None)
        if asked is not None and layer.path not in coordinates:
            raise ValueError(
                f"{layer.path} has choices with {asked}, which have to be fitted to its inputs "
                "first: pass coordinates=fitted_coordinates(...)."
            )


def chosen(
    branch_fn: Callable[[Sequence[Spec | None]], Branch],
    specs: tuple[Spec | None, ...],
    choice: Choice,
    x: AnyArray,
) -> AnyArray:
    """Returns `x` quantized to `specs[choice]`, with one branch for each family of specs."""
    families, family_of, member_of = families_of(specs)
    member = jnp.asarray(member_of)[choice]
    branches = [branch_fn(family) for family in families]
    if len(branches) == 1:
        return branches[0](x, member)
    return jax.lax.switch(jnp.asarray(family_of)[choice], branches, x, member)


def families_of(
    specs: Sequence[Spec | None],
) -> tuple[list[list[Spec | None]], np.ndarray, np.ndarray]:
    """Returns families of specs alike but for the group size, and each spec's family and place.

    None, and specs without a form with a traced size, are families of their own.
    """
    families: dict[Spec | None, list[Spec | None]] = {}
    family_of, member_of = [], []
    for spec in specs:
        name = dataclasses.replace(spec, group_size=0) if is_traceable(spec) else spec
        members = families.setdefault(name, [])
        if spec not in members:
            members.append(spec)
        family_of.append(list(families).index(name))
        member_of.append(members.index(spec))
    return list(families.values()), np.array(family_of), np.array(member_of)


def is_traceable(spec: Spec | None) -> TypeGuard[Spec]:
    if spec is None or spec.fmt is not None or not spec.range_fn.from_extremes:
        return False
    # Two levels of scales are chosen by error, and so need a static size.
    return not isinstance(spec, WeightSpec) or (spec.channel_group == 1 and not spec.has_levels)


def kernel_branch(family: Sequence[WeightSpec | None]) -> Branch:
    spec = family[0]
    if spec is None:
        return lambda w, member: w
    if not is_traceable(spec):
        return lambda w, member: dequantize(quantize(w, spec), w.dtype)
    sizes = tuple(member.group_size for member in family if member is not None)
    return lambda w, member: fake_quantize_kernel_traced(w, spec, member, sizes)


def act_branch(family: Sequence[ActSpec | None]) -> Branch:
    spec = family[0]
    if spec is None:
        return lambda x, member: x
    if not is_traceable(spec):
        return lambda x, member: fake_quantize(x, spec)
    sizes = tuple(member.group_size for member in family if member is not None)
    return lambda x, member: fake_quantize_traced(x, spec, member, sizes)
