"""The space of a search: how each layer may be quantized, and assignments: one choice per layer.

An assignment is an int32 array `[L]` of choice numbers: data, so a search never recompiles.
Dimensions: L layers, K input channels and N output channels of a layer.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from flax.traverse_util import flatten_dict

from qdit_jax.allocation.choices import (
    ACT_GROUP_SIZE,
    GROUP,
    GROUP_SIZES,
    INTEGERS,
    TOKEN,
    Sides,
    act_sizes_vary,
    as_tuple,
    beside_choices,
    layer_choices,
    resized,
    whether,
)
from qdit_jax.errors import check_pattern
from qdit_jax.methods import missing_for
from qdit_jax.models import family_of_params
from qdit_jax.ptq import check_unquantized, matrix_shape
from qdit_jax.quant import ranges
from qdit_jax.recipes import LayerSpec, Recipe, Rule, layer_paths, part_pattern
from qdit_jax.types import DERIVED, UNSAID, Numbers, Params


@dataclasses.dataclass(frozen=True)
class SearchLayer:
    """One layer of a space: its path, its kernel's shape `(K, N)`, and what it may become.

    `rows` is how many rows a sample sends through it, which costs are counted for; `folded` says
    whether a scale of its input costs nothing at run time, and a shift neither unless `scale_only`. `share` is the share of sampling
    steps in which it runs: below 1 for a layer of one of several experts.
    """

    path: str
    shape: tuple[int, int]
    choices: tuple[LayerSpec, ...]
    rows: int = 1
    folded: bool = dataclasses.field(default=False, metadata=DERIVED)
    scale_only: bool = dataclasses.field(default=False, metadata=DERIVED)
    share: float = dataclasses.field(default=1.0, metadata=UNSAID)

    @property
    def mean_rows(self) -> float:
        """Returns the rows that a sample sends through it in one step, on average over the steps."""
        return self.rows * float(self.share)


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
    shares: Mapping[str, float] | None = None,
    weight_bits: int | Sequence[int] = 4,
    act_bits: int | Sequence[int] = 8,
    group_sizes: Sequence[int] = GROUP_SIZES,
    sides: Sides = "both",
    act_group_size: int = ACT_GROUP_SIZE,
    symmetric: bool = False,
    range_fn: ranges.RangeRule = ranges.minmax,
    layers: str | None = None,
    pinned: Mapping[str, int | LayerSpec] | None = None,
    excluded: Sequence[str] = (),
    transforms: Sequence[str] = ("none",),
    ranks: Sequence[int] = (0,),
    formats: Sequence[str] = (INTEGERS,),
    scale_levels: int | Sequence[int] = 1,
    weight_symmetric: bool | Sequence[bool] | None = None,
    act_formats: str | Sequence[str] = INTEGERS,
    act_scales: str | Sequence[str] = GROUP,
) -> Space:
    """Returns the space of a network's linear layers: the product of all that is given.

    Choices that a layer cannot have (a rotation whose blocks do not divide its channels, a rank above
    its kernel's) are left out, and so are transforms of an input that several layers read, because
    they have one transform in common.

    Args:
        rows: by layer path, how many rows a sample sends through it (`models.rows_per_sample`);
            1 where it is not given, which suits only costs that do not count operations.
        shares: by layer path, the share of steps in which it runs (`models.step_shares`); 1 where it is
            not given.
        weight_bits, act_bits: one number, or several as a second axis of the choices; 16 leaves
            that side as it is.
        group_sizes: any sizes; more than a layer's K, or 0, is the whole channel.
        sides: "both": weights and inputs of a layer share the size (the paper); "weights": the
            inputs stay at `act_group_size` (what the release does); "separate": every pair.
        symmetric: of both sides, integers without zero points.
        range_fn: of both sides; see `qdit_jax.quant.ranges`.
        layers: the pattern of the layers, a regular expression of the whole path; by default the
            linear layers of the family's blocks.
        pinned: by pattern, the group size or `LayerSpec` that a layer keeps.
        excluded: patterns of layers left in full precision.
        transforms, ranks: names of `recipes.TRANSFORMS` and ranks of 16-bit branches. Where only
            "none" and 0 are given, the recipe leaves both to the method.
        formats: number formats of the weights, "int" or names of `quant.formats`; a format may fix
            bits and group size.
        scale_levels: of the weights' scales, 1 or 2, see `WeightSpec`; formats, and integers of more
            than 6 bits, have 1.
        weight_symmetric: of the weights alone, False, True or both; None is `symmetric`. Formats have no
            zero points in any case.
        act_formats: number formats of the inputs, "int" or names of `quant.formats`. Integers go with
            all weights, FP8 with weights of FP8 (or 16 bits), others with weights of the same format.
        act_scales: of the inputs, "group": scales and zero points of groups; "token": one symmetric
            scale per token, whatever the group size.

    Raises:
        ValueError: if a pattern matches no layer, a list of choices is empty, a name is not known,
            a format of either side goes with none of the other, or a layer can have none of the choices.
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
        formats=as_tuple(formats, "formats"),
        scale_levels=as_tuple(scale_levels, "scale_levels"),
        weight_symmetric=whether(weight_symmetric, "weight_symmetric"),
        act_formats=as_tuple(act_formats, "act_formats"),
        act_scales=as_tuple(act_scales, "act_scales"),
        beside=beside_choices(transforms, ranks),
    )
    if choices == (LayerSpec(),):
        raise ValueError(
            f"weight_bits={weight_bits} with act_bits={act_bits} quantizes nothing: 16 bits leave a "
            "side as it is; give one of both fewer."
        )
    by_path = dict.fromkeys(paths, choices)
    for pattern, kept in (pinned or {}).items():
        spec = kept if isinstance(kept, LayerSpec) else resized(choices[0], kept)
        if not isinstance(kept, LayerSpec) and as_tuple(act_scales, "act_scales")[0] == TOKEN:
            spec = dataclasses.replace(spec, act=choices[0].act)
        by_path |= dict.fromkeys(matching(pattern, every, "pinned"), (spec,))
    family = family_of_params(params)
    flat = flatten_dict(params, sep="/")
    producers_of = {
        path: () if family is None else tuple(family.producers(path, flat)) for path in every
    }
    readers = Counter(producers_of.values())
    found = []
    for path in sorted(by_path, key=natural_order):
        check_unquantized(path, flat[f"{path}/kernel"])
        folded = bool(producers_of[path])
        is_shared = folded and readers[producers_of[path]] > 1
        layer = SearchLayer(
            path,
            matrix_shape(flat[f"{path}/kernel"]),
            by_path[path],
            (rows or {}).get(path, 1),
            folded,
            family is not None and folded and not family.covered(path, flat).shift.all(),
            (shares or {}).get(path, 1.0),
        )
        found.append(possible(layer, f"{path}/bias" in flat, is_shared))
    return Space(tuple(found))


def possible(layer: SearchLayer, has_bias: bool, is_shared: bool) -> SearchLayer:
    """Returns the layer with those of its choices that it can have.

    `is_shared` says that other layers read the same input, so that it keeps its coordinates.

    Raises:
        ValueError: if none is left.
    """
    why = {spec: missing_for(spec, layer.shape, has_bias) for spec in layer.choices}
    if is_shared:
        shared = "its input is read by other layers too, which a search cannot transform alone"
        why |= {spec: shared for spec in layer.choices if spec.transform not in (None, "none")}
    kept = tuple(spec for spec in layer.choices if why[spec] is None)
    if not kept:
        spec = layer.choices[0]
        raise ValueError(
            f"transform={spec.transform!r}, rank={spec.rank} of {layer.path}: {why[spec]}; offer "
            "others as well."
        )
    return dataclasses.replace(layer, choices=kept)


def natural_order(path: str) -> list[int | str]:
    """Returns a sort key in which `blocks_2` comes before `blocks_10`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]


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


def recipe_of(space: Space, assignment: Numbers, name: str = "search") -> Recipe:
    """Returns the recipe of an assignment, one rule per layer."""
    chosen = specs_of(space, assignment)
    return Recipe(tuple(Rule(re.escape(path), spec) for path, spec in chosen.items()), name)


def specs_of(space: Space, assignment: Numbers) -> dict[str, LayerSpec]:
    """Returns every layer's spec under an assignment, by path."""
    numbers = space.check(assignment)
    return {layer.path: layer.choices[i] for layer, i in zip(space.layers, numbers, strict=True)}


def uniform_assignment(
    space: Space, group_size: int, beside: tuple[str | None, int | None] | None = None
) -> np.ndarray:
    """Returns the assignment with one group size throughout, at the first bits of every layer.

    Pinned layers stay as they are. `beside` is the transform and the rank of the layers that can
    have both; the others, and all without it, have their first ones.

    Raises:
        ValueError: if a layer that has a choice has none of that size.
    """
    numbers = [uniform_choice(layer, group_size, beside) for layer in space.layers]
    return np.array(numbers, np.int32)


def uniform_choice(
    layer: SearchLayer, group_size: int, beside: tuple[str | None, int | None] | None = None
) -> int:
    if len(layer.choices) == 1:
        return 0
    varies = act_sizes_vary(layer.choices)
    found = []
    for number, spec in enumerate(layer.choices):
        sides = [spec.weight, spec.act if varies or spec.weight is None else None]
        if all(side is None or side.group_size == group_size for side in sides):
            found.append(number)
    if not found:
        raise ValueError(f"{layer.path} has no choice of group size {group_size}.")
    asked = (n for n in found if (layer.choices[n].transform, layer.choices[n].rank) == beside)
    return next(asked, found[0])


def beside_of(space: Space) -> list[tuple[str | None, int | None]]:
    """Returns every pair of a transform and a rank that a layer's choices have."""
    pairs = ((spec.transform, spec.rank) for layer in space.layers for spec in layer.choices)
    return list(dict.fromkeys(pairs))


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
