"""Uniform presets such as `w4a8` and `w4a8-fast`: their names, and the spec that a layer gets."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal, NamedTuple, TypedDict

from qdit_jax.quant import ActSpec, WeightSpec, formats, ranges
from qdit_jax.recipes.named import NAMED
from qdit_jax.recipes.rules import LayerSpec

PRESET = re.compile(r"w(\d+)a(\d+)(-fast)?(-all)?")
FAST_GROUP_SIZE = 32
MOST_LEVEL_BITS = 6  # more bits of weights have one level of scales, per channel


class Preset(NamedTuple):
    """What a preset's name says.

    Attributes:
        weight_bits, act_bits: 16 leaves that side as it is.
        takes_all: whether it means every layer.
        is_fast: whether the product of a layer must be one int8 dot over all input channels.
    """

    weight_bits: int
    act_bits: int
    takes_all: bool
    is_fast: bool


class PresetSettings(TypedDict, total=False):
    """The settings of `Recipe.preset`, described there."""

    group_size: int
    symmetric: bool
    act_symmetric: bool | None
    act_group_size: int | None
    act_mode: Literal["dynamic", "static"]
    per_timestep: bool
    range_fn: ranges.RangeRule
    act_range_fn: ranges.RangeRule
    scale_dtype: str
    scale_levels: int
    weight_format: str | None
    act_format: str | None


def preset_bits(name: str, argument: str = "recipe") -> Preset:
    """Returns what a preset's name says.

    Raises:
        ValueError: if it is not a preset, leaves both sides at 16 bits, or is to be fast and leaves
            one; it names the argument.
    """
    match = PRESET.fullmatch(NAMED[name].bits if name in NAMED else name)
    if match is None:
        more = ", or the path of a recipe.json" if argument == "recipe" else ""
        raise ValueError(
            f"{argument}={name!r} is not a preset; use w<bits>a<bits> such as w8a8, w6a8 or w4a8 "
            f"(bits 2 to 8, or 16 to leave a side as it is; w4a8-fast for one int8 dot per layer, "
            f"w4a8-all for every layer), one of {', '.join(n for n in NAMED if not PRESET.fullmatch(n))} "
            f"(`qdit recipes`){more}."
        )
    if match[1] == match[2] == "16":
        raise ValueError(
            f"{argument}={name!r} quantizes nothing: 16 bits leave a side as it is; give one of "
            "both fewer, such as w4a8 or w16a8."
        )
    found = Preset(int(match[1]), int(match[2]), match[4] is not None, match[3] is not None)
    if found.is_fast and 16 in found[:2]:
        raise ValueError(
            f"{argument}={name!r} has no integer dot: it leaves a side at 16 bits; give both fewer, "
            f"or use w{match[1]}a{match[2]}."
        )
    return found


def with_own_settings(name: str, settings: PresetSettings) -> PresetSettings:
    """Returns the settings with those that a preset of the table brings and that were not given."""
    own = NAMED[name].settings if name in NAMED else {}
    merged: PresetSettings = {**own, **settings}  # type: ignore[typeddict-item]
    return merged


def fast_settings(name: str, weight_bits: int, settings: PresetSettings) -> PresetSettings:
    """Returns the settings with which a layer's product is one int8 dot over all input channels.

    Inputs have one symmetric scale per token; weights of up to 6 bits two levels of scales and groups
    of 32, others a symmetric scale per channel.

    Raises:
        ValueError: if given settings cut the dot.
    """
    levels = weight_bits <= MOST_LEVEL_BITS
    default: PresetSettings = {
        "group_size": FAST_GROUP_SIZE if levels else 0,
        "act_group_size": 0,
        "act_symmetric": True,
        "scale_levels": 2 if levels else 1,
        "symmetric": not levels,
    }
    found: PresetSettings = {**default, **settings}
    found["act_group_size"] = found["act_group_size"] or 0
    cut = {"act_group_size": found["act_group_size"]}
    if not levels:
        cut["group_size"] = found["group_size"]
    plain = (NAMED[name].bits if name in NAMED else name).replace("-fast", "")
    for setting, value in cut.items():
        if value != 0:
            raise ValueError(
                f"{setting}={value} does not go with recipe={name!r}, whose products are one dot over "
                f"all input channels; use 0, or {plain!r}."
            )
    return found


def preset_spec(
    weight_bits: int,
    act_bits: int,
    *,
    group_size: int = 128,
    symmetric: bool = False,
    act_symmetric: bool | None = None,
    act_group_size: int | None = None,
    act_mode: Literal["dynamic", "static"] = "dynamic",
    per_timestep: bool = False,
    range_fn: ranges.RangeRule = ranges.minmax,
    act_range_fn: ranges.RangeRule = ranges.minmax,
    scale_dtype: str = "float16",
    scale_levels: int = 1,
    weight_format: str | None = None,
    act_format: str | None = None,
) -> LayerSpec:
    """Returns the spec of every layer of a preset; the settings are those of `Recipe.preset`.

    Raises:
        ValueError: if the format is unknown, or has other bits than the preset.
    """
    weight = act = None
    if weight_bits != 16:
        weight = WeightSpec(weight_bits, group_size, symmetric, range_fn, scale_dtype)
        has_codebook = weight_format is not None and formats.by_name(weight_format).has_codebook
        # A codebook has two levels of scales by itself.
        if not has_codebook:
            weight = dataclasses.replace(weight, scale_levels=scale_levels)
    if weight is not None and weight_format is not None:
        fmt = format_of("weight_format", weight_format, weight_bits, "w")
        weight = dataclasses.replace(weight, fmt=fmt)
    if act_bits != 16:
        size = group_size if act_group_size is None else act_group_size
        signed = symmetric if act_symmetric is None else act_symmetric
        act = ActSpec(act_bits, size, signed, act_range_fn, act_mode, per_timestep=per_timestep)
        if act_format is not None:
            fmt = format_of("act_format", act_format, act_bits, "a")
            act = dataclasses.replace(act, fmt=fmt)
    return LayerSpec(weight, act)


def format_of(setting: str, name: str, bits: int, side: str) -> formats.Format:
    """Returns the number format of that name.

    Raises:
        ValueError: if it is unknown, or has other bits than the preset.
    """
    fmt = formats.by_name(name)
    if fmt.bits != bits:
        raise ValueError(
            f"{setting}={name!r} has {fmt.bits} bits, but the recipe asks for {side}{bits}; ask for "
            f"{side}{fmt.bits}."
        )
    return fmt
