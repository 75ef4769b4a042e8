"""The options with which `qdit search` and `qdit bench --table` offer given choices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from qdit_jax.allocation.choices import (
    ACT_GROUP_SIZE,
    GROUP,
    INTEGERS,
    TOKEN,
    UNQUANTIZED,
    format_name,
    has_token_scale,
)
from qdit_jax.quant import ActSpec, WeightSpec
from qdit_jax.recipes import LayerSpec


def choice_options(choices: Iterable[LayerSpec]) -> str:
    """Returns options whose product holds every one of `choices`.

    What is a default is left out, but for bits. What has no option, such as a range rule, is not in
    them.
    """
    specs = list(dict.fromkeys(choices))
    sizes = size_options(specs)
    asked = {
        "--weight-bits": weight_bits(specs),
        "--act-bits": act_bits(specs),
        **sizes,
        "--formats": formats(specs),
        "--scale-levels": unless_only(1, scale_levels(specs)),
        "--weight-symmetric": unless_only("no", weight_symmetric(specs)),
        "--act-formats": unless_only(INTEGERS, [format_name(act) for act in acts_of(specs)]),
        "--act-scales": unless_only(GROUP, [scales_of(spec, sizes) for spec in specs]),
        "--transforms": unless_only("none", [spec.transform for spec in specs]),
        "--ranks": unless_only(0, [spec.rank for spec in specs]),
    }
    return " ".join(
        f"{name} {' '.join(map(str, values))}" for name, values in asked.items() if values
    )


def weights_of(specs: Iterable[LayerSpec]) -> list[WeightSpec]:
    return [spec.weight for spec in specs if spec.weight is not None]


def weight_bits(specs: Sequence[LayerSpec]) -> list[int]:
    """Returns the bits of integers, or those of number formats where there are no integers."""
    every = weights_of(specs)
    integers = {weight.bits for weight in every if weight.fmt is None}
    found = integers or {weight.bits for weight in every}
    return sorted(found | ({UNQUANTIZED} if len(every) < len(specs) else set()))


def act_bits(specs: Sequence[LayerSpec]) -> list[int]:
    """Returns the bits of integer inputs, or those of number formats where there are no integers."""
    every = acts_of(specs)
    integers = {act.bits for act in every if act.fmt is None}
    found = integers or {act.bits for act in every}
    return sorted(found | ({UNQUANTIZED} if len(every) < len(specs) else set()))


def formats(specs: Sequence[LayerSpec]) -> list[str]:
    """Returns the number formats, none where there are integers alone."""
    return unless_only(INTEGERS, [format_name(weight) for weight in weights_of(specs)])


def scale_levels(specs: Sequence[LayerSpec]) -> list[int]:
    """Returns the levels of the scales of integers."""
    return sorted({weight.scale_levels for weight in weights_of(specs) if weight.fmt is None})


def weight_symmetric(specs: Sequence[LayerSpec]) -> list[str]:
    """Returns whether integer weights have no zero points, "no" first."""
    found = {weight.symmetric for weight in weights_of(specs) if weight.fmt is None}
    return [("no", "yes")[symmetric] for symmetric in sorted(found)]


def acts_of(specs: Iterable[LayerSpec]) -> list[ActSpec]:
    return [spec.act for spec in specs if spec.act is not None]


def scales_of(spec: LayerSpec, sizes: dict[str, list[Any]]) -> str | None:
    """Returns what a scale of the inputs belongs to; None where both options offer the same.

    Args:
        sizes: the options of group sizes and sides.
    """
    act, weight = spec.act, spec.weight
    if act is None or has_blocks(act):
        return None
    if not has_token_scale(act):
        return GROUP
    # Formats have no zero points: a group that is the whole token is the same, if that size is offered.
    [sides] = sizes["--sides"] or ["both"]
    is_paired = weight is None or weight.group_size == 0 or sides == "separate"
    is_either = act.fmt and 0 in sizes["--group-sizes"] and is_paired and sides != "weights"
    return None if is_either else TOKEN


def unless_only(default: object, values: Sequence[object]) -> list[Any]:
    """Returns the different values that are not None; nothing if that is the default alone."""
    found = list(dict.fromkeys(value for value in values if value is not None))
    return [] if found == [default] else found


def size_options(specs: Sequence[LayerSpec]) -> dict[str, list[Any]]:
    """Returns the group sizes, and the sides that they are of."""
    pairs = {(chosen_size(spec), act_size(spec)) for spec in specs}
    weights, acts = (
        {size for size in side if size is not None} for side in zip(*pairs, strict=True)
    )
    whole = {pair for pair in pairs if None not in pair}
    sides = []
    if any(weight != act for weight, act in whole):
        sides = ["weights" if acts == {ACT_GROUP_SIZE} else "separate"]
    sizes = weights if sides == ["weights"] else weights | acts
    return {
        "--group-sizes": sorted(sizes, key=lambda size: size or math.inf),  # 0 last
        "--sides": sides,
    }


def chosen_size(spec: LayerSpec) -> int | None:
    """Returns the group size of weights, None where a number format fixes it."""
    weight = spec.weight
    return None if weight is None or has_blocks(weight) else weight.group_size


def act_size(spec: LayerSpec) -> int | None:
    """Returns the group size of inputs, None where a format fixes it or they have a scale per token."""
    act = spec.act
    return None if act is None or has_blocks(act) or has_token_scale(act) else act.group_size


def has_blocks(side: WeightSpec | ActSpec) -> bool:
    """Returns whether a number format fixes the group size."""
    return side.fmt is not None and side.fmt.block_size > 0
