"""A network under the names of a layout: the inverse of its plan, found from its example.

A layout's example says under which names a leaf of each kind lies in a file; numbers of blocks are all
that differs. The shapes of the file's tensors follow from those of the tree and from how the example's
leaf moves axes. What comes out is read by the layout's own plan: only if that makes the same network
of it is it used, so that a file never says something else than the checkpoint.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import linen as nn

from qdit_convert.choices import Choices
from qdit_convert.layout import Layout
from qdit_convert.layouts import LAYOUTS
from qdit_convert.plan import Leaf, Plan, Shape, check_plan
from qdit_convert.tensors import StateDict, StoredTensor, listing
from qdit_jax.errors import UserError

NUMBER = re.compile(r"(?<=blocks[._])\d+")  # of a block, in the paths of a tree and in files
SIZES = ("input_size", "sample_size")  # what networks call the size that `--input-size` says


def written_in(model: nn.Module) -> tuple[Layout, Plan]:
    """Returns the layout in which a network is written, its authors', and the plan of its file.

    Raises:
        UserError: if there is none, or the network has what the layout's files cannot say.
    """
    from qdit_jax.models import family_of

    family = family_of(model).name
    rows = [layout for layout in LAYOUTS if layout.writes == family]
    if not rows:
        known = ", ".join(dict.fromkeys(row.families[0] for row in LAYOUTS if row.writes))
        raise UserError(
            f"a network of family {family} cannot be written with its authors' names yet; those of "
            f"{known} can. Export without --format."
        )
    refused: list[tuple[float, UserError]] = []
    for layout in rows:
        try:
            plan = file_plan(layout, model)
        except UserError as error:
            refused.append((math.inf, error))
            continue
        differing = differences(plan, model)
        if not differing:
            return layout, plan
        name, (ours, theirs) = next(iter(differing.items()))
        error = UserError(
            f"the network has {name}={ours!r}, which readers of {layout.title} take to be {theirs!r}: "
            "they would compute something else. Export without --format."
        )
        refused.append((len(differing), error))
    raise min(refused, key=lambda row: row[0])[1]


def authors_shapes(model: nn.Module) -> dict[str, Shape]:
    """Returns the name and shape of every tensor in a network's file, under its authors' names.

    Raises:
        UserError: if its family has no layout that is written.
    """
    layout, _ = written_in(model)
    return file_shapes(layout, model)


def file_plan(layout: Layout, model: nn.Module) -> Plan:
    """Returns the plan that the layout makes of the file of a network.

    Raises:
        UserError: if a parameter has no name in it, or the plan is of other tensors.
    """
    from qdit_jax.models import config_of

    shapes = file_shapes(layout, model)
    tensors = {name: unread(shape) for name, shape in shapes.items()}
    state = StateDict(layout.title, tensors, hints=dict(layout.example().hints))
    plan = layout.plan(state, told_of(layout, config_of(model)), None)
    check_plan(plan, state)
    return plan


def file_shapes(layout: Layout, model: nn.Module) -> dict[str, Shape]:
    """Returns the name and shape of every tensor of a network's file.

    Raises:
        UserError: if the layout has no name for a parameter.
    """
    from qdit_jax.models import abstract_params

    kinds = {NUMBER.sub("#", leaf.path): leaf for leaf in layout.example().leaves}
    leaves = abstract_params(model)
    nameless = [path for path in leaves if NUMBER.sub("#", path) not in kinds]
    if nameless:
        raise UserError(
            f"{layout.title} has no names for {listing(nameless, 2)}; export without --format."
        )
    found: dict[str, Shape] = {}
    for path, leaf in leaves.items():
        kind = kinds[NUMBER.sub("#", path)]
        number = NUMBER.search(path)
        shapes = source_shapes(kind, leaf.shape)
        for source, shape in zip(kind.sources, shapes, strict=True):
            found[source if number is None else NUMBER.sub(number[0], source)] = shape
    return found


def source_shapes(leaf: Leaf, shape: Shape) -> list[Shape]:
    """Returns the shapes of a leaf's tensors in a file, of one whose array has the given shape.

    Args:
        leaf: of the same kind and of another size. Its tensors have equal numbers of rows.
    """
    sizes = [leaf.expected[source][0] for source in leaf.sources]
    whole = (sum(size[0] for size in sizes), *sizes[0][1:])
    rows, *rest = (shape[axis] if axis is not None else 1 for axis in moved_axes(leaf, whole))
    return [(rows // len(sizes), *rest)] * len(sizes)


def moved_axes(leaf: Leaf, shape: Shape) -> list[int | None]:
    """Returns where each axis of a file's tensor is in the leaf; None for one that is taken out."""
    places = leaf.transform(np.arange(math.prod(shape)).reshape(shape))
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    found: list[int | None] = [None] * len(shape)
    alone = []
    for axis, size in enumerate(places.shape):
        if size == 1:
            alone.append(axis)
            continue
        step = int(places.take(1, axis).flat[0] - places.flat[0])
        found[next(i for i, n in enumerate(shape) if n > 1 and strides[i] == step)] = axis
    free = [i for i, axis in enumerate(found) if axis is None]
    for i, axis in zip(free, alone, strict=False):  # axes of length 1 keep their order
        found[i] = axis
    return found


def unread(shape: Shape) -> StoredTensor:
    """Returns a tensor of which the shape is all there is."""

    def read() -> np.ndarray:
        raise AssertionError("only shapes are planned with")

    return StoredTensor(shape, np.dtype("f4"), read)


def told_of(layout: Layout, config: Mapping[str, Any]) -> Choices:
    """Returns what a reader of a network's file must be told of it."""
    said = {name: config[name] for name in layout.options if config.get(name)}
    if "input_size" in layout.options:
        said["input_size"] = next(config[name] for name in SIZES if name in config)
    if "noise_time" in said:
        said["noise_time"] = int(said["noise_time"])
    return Choices(**said)


def differences(plan: Plan, model: nn.Module) -> dict[str, tuple[object, object]]:
    """Returns the fields that a network and what its file is read as have different values of."""
    from qdit_jax.models import build_model, config_of

    ours, theirs = config_of(model), config_of(build_model(plan.family, plan.config))
    return {
        name: (value, theirs[name])
        for name, value in ours.items()
        if plain(value) != plain(theirs[name])
    }


def plain(value: Any) -> Any:
    """Returns a field with lists as tuples."""
    return tuple(map(plain, value)) if isinstance(value, list | tuple) else value
