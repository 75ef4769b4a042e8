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
    asked = {
        "--weight-bits": weight_bits(specs),
        "--act-bits": act_bits(specs),
        **size_options(specs),
        "--formats": formats(specs),
        "--scale-levels": unless_only(1, scale_levels(specs)),
        "--act-scales": unless_only(GROUP, [scales_of(act) for act in acts_of(specs)]),
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
    """Returns the bits of inputs."""
    return sorted({UNQUANTIZED if spec.act is None else spec.act.bits for spec in specs})


def formats(specs: Sequence[LayerSpec]) -> list[str]:
    """Returns the number formats, none where there are integers alone."""
    names = [weight.fmt.name if weight.fmt else INTEGERS for weight in weights_of(specs)]
    return unless_only(INTEGERS, names)


def scale_levels(specs: Sequence[LayerSpec]) -> list[int]:
    """Returns the levels of the scales of integers."""
    return sorted({weight.scale_levels for weight in weights_of(specs) if weight.fmt is None})


def acts_of(specs: Iterable[LayerSpec]) -> list[ActSpec]:
    return [spec.act for spec in specs if spec.act is not None]


def scales_of(act: ActSpec) -> str:
    """Returns what a scale of the inputs belongs to."""
    return TOKEN if has_token_scale(act) else GROUP


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
    has_blocks = weight is not None and weight.fmt is not None and weight.fmt.block_size
    return None if weight is None or has_blocks else weight.group_size


def act_size(spec: LayerSpec) -> int | None:
    """Returns the group size of inputs, None where they have a scale per token."""
    return None if spec.act is None or has_token_scale(spec.act) else spec.act.group_size
