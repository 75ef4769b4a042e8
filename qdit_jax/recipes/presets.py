"""Uniform presets such as `w4a8`: their names, and the spec that a layer gets."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal, TypedDict

from qdit_jax.quant import ActSpec, WeightSpec, formats, ranges
from qdit_jax.recipes.rules import LayerSpec

PRESET = re.compile(r"w(\d+)a(\d+)(-all)?")


class PresetSettings(TypedDict, total=False):
    """The settings of `Recipe.preset`, described there."""

    group_size: int
    symmetric: bool
    act_group_size: int | None
    act_mode: Literal["dynamic", "static"]
    per_timestep: bool
    range_fn: ranges.RangeRule
    act_range_fn: ranges.RangeRule
    scale_dtype: str


def preset_bits(name: str, argument: str = "recipe") -> tuple[int, int, bool]:
    """Returns the bits of weights and of inputs that a preset names, and whether it means every layer.

    Raises:
        ValueError: if it is not a preset, or leaves both sides at 16 bits; it names the argument.
    """
    match = PRESET.fullmatch(name)
    if match is None:
        more = ", or the path of a recipe.json" if argument == "recipe" else ""
        raise ValueError(
            f"{argument}={name!r} is not a preset; use w<bits>a<bits> such as w8a8, w6a8 or w4a8 "
            f"(bits 2 to 8, or 16 to leave a side as it is; w4a8-all for every layer){more}."
        )
    if match[1] == match[2] == "16":
        raise ValueError(
            f"{argument}={name!r} quantizes nothing: 16 bits leave a side as it is; give one of "
            "both fewer, such as w4a8 or w16a8."
        )
    return int(match[1]), int(match[2]), match[3] is not None


def preset_spec(
    weight_bits: int,
    act_bits: int,
    *,
    group_size: int = 128,
    symmetric: bool = False,
    act_group_size: int | None = None,
    act_mode: Literal["dynamic", "static"] = "dynamic",
    per_timestep: bool = False,
    range_fn: ranges.RangeRule = ranges.minmax,
    act_range_fn: ranges.RangeRule = ranges.minmax,
    scale_dtype: str = "float16",
    weight_format: str | None = None,
) -> LayerSpec:
    """Returns the spec of every layer of a preset; the settings are those of `Recipe.preset`.

    Raises:
        ValueError: if the format is unknown, or has other bits than the preset.
    """
    weight = act = None
    if weight_bits != 16:
        weight = WeightSpec(weight_bits, group_size, symmetric, range_fn, scale_dtype)
    if weight is not None and weight_format is not None:
        fmt = formats.by_name(weight_format)
        if fmt.bits != weight_bits:
            raise ValueError(
                f"weight_format={weight_format!r} has {fmt.bits} bits, but the recipe asks for "
                f"w{weight_bits}; use w{fmt.bits}a{act_bits}."
            )
        weight = dataclasses.replace(weight, fmt=fmt)
    if act_bits != 16:
        size = group_size if act_group_size is None else act_group_size
        act = ActSpec(act_bits, size, symmetric, act_range_fn, act_mode, per_timestep=per_timestep)
    return LayerSpec(weight, act)
