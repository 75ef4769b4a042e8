"""The space of a search: how each layer may be quantized, and assignments: one choice per layer.

An assignment is an int32 array `[L]` of choice numbers: data, so a search never recompiles.
Dimensions: L layers, K input channels and N output channels of a layer.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from flax.traverse_util import flatten_dict

from qdit_jax.errors import check_pattern
from qdit_jax.ptq import check_unquantized, matrix_shape
from qdit_jax.quant import ActSpec, WeightSpec, ranges
from qdit_jax.recipes import LayerSpec, Recipe, Rule, layer_paths, part_pattern
from qdit_jax.types import Numbers, Params

GROUP_SIZES = (32, 64, 128, 192, 288)
UNQUANTIZED = 16
Sides = Literal["both", "weights", "separate"]


@dataclasses.dataclass(frozen=True)
class SearchLayer:
    """One layer of a space: its path, its kernel's shape `(K, N)`, and what it may become.

    `rows` is how many rows a sample sends through it, which costs are counted for.
    """

    path: str
    shape: tuple[int, int]
    choices: tuple[LayerSpec, ...]
    rows: int = 1


@dataclasses.dataclass(frozen=True)
class Space:
    """The layers of a search, by name, in the order of assignments; static under jit."""

    layers: tuple[SearchLayer, ...]

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("the space has no layer; give layers that may be quantized.")

    @property
    def num_choices(self) -> np.ndarray:
        """Returns the number of choices of every layer, `[L]`."""
        return np.array([len(layer.choices) for layer in self.layers])

    @property
    def size(self) -> int:
        """Returns the number of assignments."""
        return int(np.prod(self.num_choices.astype(object)))

    def check(self, assignment: Numbers) -> np.ndarray:
        """Returns `assignment` as int32 `[..., L]`.

        Raises:
            ValueError: if its length or a choice does not fit the space.
        """
        array = np.asarray(assignment)
        if array.shape[-1:] != (len(self.layers),) or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(
                f"assignment has shape {array.shape} and dtype {array.dtype}; this space takes "
                f"whole numbers [..., {len(self.layers)}]."
            )
        bad = np.argwhere((array < 0) | (array >= self.num_choices))
        if len(bad):
            layer = self.layers[bad[0][-1]]
            raise ValueError(
                f"assignment gives {layer.path} choice {array[tuple(bad[0])]}; "
                f"it has {len(layer.choices)}."
            )
        return array.astype(np.int32)


def search_space(
    params: Params,
    *,
    rows: Mapping[str, int] | None = None,
    weight_bits: int | Sequence[int] = 4,
    act_bits: int | Sequence[int] = 8,
    group_sizes: Sequence[int] = GROUP_SIZES,
    sides: Sides = "both",
    act_group_size: int = 128,
    symmetric: bool = False,
    range_fn: ranges.RangeRule = ranges.minmax,
    layers: str | None = None,
    pinned: Mapping[str, int | LayerSpec] | None = None,
    excluded: Sequence[str] = (),
) -> Space:
    """Returns the space of a network's linear layers.

    Args:
        rows: by layer path, how many rows a sample sends through it (`models.rows_per_sample`);
            1 where it is not given, which suits only costs that do not count operations.
        weight_bits, act_bits: one number, or several as a second axis of the choices; 16 leaves
            that side as it is.
        group_sizes: any sizes; more than a layer's K, or 0, is the whole channel.
        sides: "both": weights and inputs of a layer share the size (the paper); "weights": the
            inputs stay at `act_group_size` (what the release does); "separate": every pair.
        range_fn: of both sides; see `qdit_jax.quant.ranges`.
        layers: the pattern of the layers, a regular expression of the whole path; by default the
            linear layers of the family's blocks.
        pinned: by pattern, the group size or `LayerSpec` that a layer keeps.
        excluded: patterns of layers left in full precision.

    Raises:
        ValueError: if a pattern matches no layer, or a list of choices is empty.
    """
    every = layer_paths(params)
    pattern = part_pattern("blocks", params) if layers is None else layers
    paths = matching(pattern, every, "layers")
    for pattern in excluded:
        gone = matching(pattern, every, "excluded")
        paths = [path for path in paths if path not in gone]
    choices = layer_choices(
        as_tuple(weight_bits, "weight_bits"),
        as_tuple(act_bits, "act_bits"),
        as_tuple(group_sizes, "group_sizes"),
        sides,
        act_group_size,
        {"symmetric": symmetric, "range_fn": range_fn},
    )
    if choices == (LayerSpec(),):
        raise ValueError(
            f"weight_bits={weight_bits} with act_bits={act_bits} quantizes nothing: 16 bits leave a "
            "side as it is; give one of both fewer."
        )
    by_path = dict.fromkeys(paths, choices)
    for pattern, kept in (pinned or {}).items():
        spec = kept if isinstance(kept, LayerSpec) else resized(choices[0], kept)
        by_path |= dict.fromkeys(matching(pattern, every, "pinned"), (spec,))
    flat = flatten_dict(params, sep="/")
    found = []
    for path in sorted(by_path, key=natural_order):
        check_unquantized(path, flat[f"{path}/kernel"])
        shape = matrix_shape(flat[f"{path}/kernel"])
        found.append(SearchLayer(path, shape, by_path[path], (rows or {}).get(path, 1)))
    return Space(tuple(found))


def natural_order(path: str) -> list[int | str]:
    """Returns a sort key in which `blocks_2` comes before `blocks_10`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]


def layer_choices(
    weight_bits: tuple[int, ...],
    act_bits: tuple[int, ...],
    group_sizes: tuple[int, ...],
    sides: Sides,
    act_group_size: int,
    settings: dict[str, Any],
) -> tuple[LayerSpec, ...]:
    """Returns the choices of one layer, bits outermost, in the order of the arguments."""
    if sides == "both":
        pairs = [(size, size) for size in group_sizes]
    elif sides == "weights":
        pairs = [(size, act_group_size) for size in group_sizes]
    elif sides == "separate":
        pairs = list(itertools.product(group_sizes, group_sizes))
    else:
        raise ValueError(f"sides={sides!r} is not known; use 'both', 'weights' or 'separate'.")
    choices = []
    for w_bits, a_bits, (w_size, a_size) in itertools.product(weight_bits, act_bits, pairs):
        weight = None if w_bits == UNQUANTIZED else WeightSpec(w_bits, w_size, **settings)
        act = None if a_bits == UNQUANTIZED else ActSpec(a_bits, a_size, **settings)
        choices.append(LayerSpec(weight, act))
    return tuple(dict.fromkeys(choices))  # 16 bits make pairs that differ in nothing


def as_tuple(value: int | Sequence[int], name: str) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    if not values or len(set(values)) < len(values):
        raise ValueError(f"{name}={value!r} must be one or more different numbers.")
    return values


def matching(pattern: str, paths: Sequence[str], name: str) -> list[str]:
    """Returns the paths that `pattern` matches as a whole.

    Raises:
        ValueError: if it is not a regular expression, or matches nothing; it names the argument.
    """
    check_pattern(name, pattern)
    found = [path for path in paths if re.fullmatch(pattern, path)]
    if not found:
        raise ValueError(
            f"{name}={pattern!r} matches no layer; layers are named like {paths[0]}, {paths[-1]}."
        )
    return found


def resized(spec: LayerSpec, group_size: int) -> LayerSpec:
    """Returns `spec` with another group size on both sides."""
    weight = spec.weight and dataclasses.replace(spec.weight, group_size=group_size)
    act = spec.act and dataclasses.replace(spec.act, group_size=group_size)
    return LayerSpec(weight, act)


def recipe_of(space: Space, assignment: Numbers, name: str = "search") -> Recipe:
    """Returns the recipe of an assignment, one rule per layer."""
    chosen = specs_of(space, assignment)
    return Recipe(tuple(Rule(re.escape(path), spec) for path, spec in chosen.items()), name)


def specs_of(space: Space, assignment: Numbers) -> dict[str, LayerSpec]:
    """Returns every layer's spec under an assignment, by path."""
    numbers = space.check(assignment)
    return {layer.path: layer.choices[i] for layer, i in zip(space.layers, numbers, strict=True)}


def uniform_assignment(space: Space, group_size: int) -> np.ndarray:
    """Returns the assignment with one group size throughout, at the first bits of every layer.

    Pinned layers stay as they are.

    Raises:
        ValueError: if a layer that has a choice has none of that size.
    """
    numbers = [uniform_choice(layer, group_size) for layer in space.layers]
    return np.array(numbers, np.int32)


def uniform_choice(layer: SearchLayer, group_size: int) -> int:
    if len(layer.choices) == 1:
        return 0
    varies = len({spec.act.group_size for spec in layer.choices if spec.act}) > 1
    for number, spec in enumerate(layer.choices):
        sides = [spec.weight, spec.act if varies or spec.weight is None else None]
        if all(side is None or side.group_size == group_size for side in sides):
            return number
    raise ValueError(f"{layer.path} has no choice of group size {group_size}.")


def uniform_sizes(space: Space) -> list[int]:
    """Returns the group sizes for which `uniform_assignment` exists, ascending, 0 last."""
    sizes = {
        side.group_size
        for layer in space.layers
        for spec in layer.choices
        for side in (spec.weight, spec.act)
        if side is not None
    }
    found = []
    for size in sorted(sizes, key=lambda size: size or np.inf):
        try:
            uniform_assignment(space, size)
        except ValueError:
            continue
        found.append(size)
    return found


def describe(spec: LayerSpec) -> str:
    """Returns a choice in few letters: `w4 g64 a8 g128`, `w4a8 g64` where sizes agree."""
    weight, act = spec.weight, spec.act
    if weight and act and weight.group_size == act.group_size:
        return f"w{weight.bits}a{act.bits} g{weight.group_size}"
    parts = [f"w{weight.bits} g{weight.group_size}" if weight else "w16"]
    parts.append(f"a{act.bits} g{act.group_size}" if act else "a16")
    return " ".join(parts)
