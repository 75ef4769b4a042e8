"""The choices of one layer: the product of bits, formats, scales, zero points, transforms, ranks and group
sizes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from qdit_jax.quant import LEVEL_BITS, ActSpec, WeightSpec
from qdit_jax.quant import formats as number_formats
from qdit_jax.recipes import LayerSpec

GROUP_SIZES = (32, 64, 128, 192, 288)
ACT_GROUP_SIZE = 128  # of the inputs where only the weights' group size varies
UNQUANTIZED = 16
INTEGERS = "int"  # the number format that is none of `quant.formats`
GROUP, TOKEN = "group", "token"  # what a scale of the inputs belongs to
Sides = Literal["both", "weights", "separate"]
Item = TypeVar("Item", int, str)


def layer_choices(
    weight_bits: tuple[int, ...],
    act_bits: tuple[int, ...],
    group_sizes: tuple[int, ...],
    sides: Sides,
    act_group_size: int,
    settings: dict[str, Any],
    *,
    formats: tuple[str, ...] = (INTEGERS,),
    scale_levels: tuple[int, ...] = (1,),
    weight_symmetric: tuple[bool, ...] | None = None,
    act_formats: tuple[str, ...] = (INTEGERS,),
    act_scales: tuple[str, ...] = (GROUP,),
    beside: Sequence[tuple[str | None, int | None]] = ((None, None),),
) -> tuple[LayerSpec, ...]:
    """Returns the choices of one layer: bits outermost, then formats, levels, zero points and scales,
    transforms and ranks (pairs of both in `beside`), and group sizes.

    Inputs of a number format are left out beside weights that they are not multiplied by, see `multiplies`.

    Raises:
        ValueError: if `sides` is not known, or a format is in no choice.
    """
    if sides == "both":
        pairs = [(size, size) for size in group_sizes]
    elif sides == "weights":
        pairs = [(size, act_group_size) for size in group_sizes]
    elif sides == "separate":
        pairs = list(itertools.product(group_sizes, group_sizes))
    else:
        raise ValueError(f"sides={sides!r} is not known; use 'both', 'weights' or 'separate'.")
    weights: list[tuple[int, str, int, bool]] = [
        (bits, fmt, levels, symmetric)
        for bits, fmt in itertools.product(weight_bits, formats)
        for levels in levels_of(bits, fmt, scale_levels)
        for symmetric in weight_symmetric or (settings["symmetric"],)
    ]
    acts: list[tuple[int, str, str]] = list(itertools.product(act_bits, act_formats, act_scales))
    choices = []
    for weight, act, asked, (w_size, a_size) in itertools.product(weights, acts, beside, pairs):
        plain = LayerSpec(weight_spec(*weight, w_size, settings), act_spec(*act, a_size, settings))
        if multiplies(plain):
            choices.append(with_beside(plain, *asked))
    is_quantized = set(weight_bits) != {UNQUANTIZED}
    check_formats(choices, formats if is_quantized else (), act_formats)
    return tuple(dict.fromkeys(choices))  # 16 bits and formats make pairs that differ in nothing


def multiplies(spec: LayerSpec) -> bool:
    """Returns whether a product is offered of both sides.

    Integer inputs go with all weights. Inputs of a number format go with weights of the same elements and
    kind of scale, the two FP8 formats with each other too; and with weights of 16 bits.
    """
    weight, act = spec.weight, spec.act
    if weight is None or act is None or act.fmt is None:
        return True
    return weight.fmt is not None and alike(weight.fmt, act.fmt)


def alike(one: number_formats.Format, other: number_formats.Format) -> bool:
    """Returns whether hardware that multiplies one format by itself multiplies it by the other too."""
    both_float8 = one.float8_dtype is not None and other.float8_dtype is not None
    elements = one.element == other.element or both_float8
    return elements and one.block_scale == other.block_scale


def check_formats(
    choices: Sequence[LayerSpec], formats: tuple[str, ...], act_formats: tuple[str, ...]
) -> None:
    """Raises `ValueError` for a number format of either side that would silently be left out."""
    if act_formats == (INTEGERS,):
        return
    acts = {format_name(spec.act) for spec in choices if spec.act}
    for name in act_formats:
        if name not in acts and name == INTEGERS:  # which go with all weights
            raise ValueError(
                f"act_formats={name!r} is in no choice: act_bits=16 leaves the inputs as they are; "
                "offer fewer bits too."
            )
        if name not in acts:
            fmt = number_formats.by_name(name)
            known = number_formats.FORMATS.values()
            raise ValueError(
                f"act_formats={name!r} is in no choice: such inputs are multiplied by weights of "
                f"{' or '.join(other.name for other in known if alike(other, fmt))}; offer those in "
                "formats, and act_bits below 16."
            )
    weights = {format_name(spec.weight) for spec in choices if spec.weight}
    for name in formats:
        if name not in weights:
            raise ValueError(
                f"formats={name!r} is in no choice: such weights are not multiplied by inputs of "
                f"{' or '.join(act_formats)}; offer {INTEGERS!r} in act_formats too."
            )


def format_name(side: WeightSpec | ActSpec) -> str:
    """Returns the name of a side's number format, "int" of integers."""
    return INTEGERS if side.fmt is None else side.fmt.name


def levels_of(bits: int, fmt: str, scale_levels: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the levels of scales that weights can have: of formats, and of more than 6 bits, one.

    Where only two levels are asked of integers of more bits, `WeightSpec` refuses them.
    """
    if fmt != INTEGERS:
        return (1,)
    found = tuple(levels for levels in scale_levels if levels == 1 or bits in LEVEL_BITS)
    return found or scale_levels


def weight_spec(
    bits: int, fmt: str, levels: int, symmetric: bool, group_size: int, settings: dict[str, Any]
) -> WeightSpec | None:
    """Returns the spec of weights in a number format, which has bits of its own; None for 16 bits."""
    if bits == UNQUANTIZED:
        return None
    own = {**settings, "symmetric": symmetric}
    spec = WeightSpec(bits, group_size, scale_levels=levels, **own)
    return spec if fmt == INTEGERS else dataclasses.replace(spec, fmt=number_formats.by_name(fmt))


def act_spec(
    bits: int, fmt: str, scales: str, group_size: int, settings: dict[str, Any]
) -> ActSpec | None:
    """Returns the spec of inputs: in groups, or with one symmetric scale per token; None for 16 bits.

    A number format has bits of its own, no zero points, and perhaps blocks of its own.

    Raises:
        ValueError: if `scales` is neither "group" nor "token", or the format is unknown.
    """
    if scales not in (GROUP, TOKEN):
        raise ValueError(f"act_scales={scales!r} is not known; use 'group' or 'token'.")
    if bits == UNQUANTIZED:
        return None
    spec = ActSpec(bits, group_size, **settings)
    if scales == TOKEN:
        spec = dataclasses.replace(spec, group_size=0, symmetric=True)
    return spec if fmt == INTEGERS else dataclasses.replace(spec, fmt=number_formats.by_name(fmt))


def has_token_scale(act: ActSpec) -> bool:
    """Returns whether inputs have one symmetric scale per token, computed as they come."""
    return act.symmetric and not act.group_size and act.mode == "dynamic"


def act_sizes_vary(choices: Sequence[LayerSpec]) -> bool:
    """Returns whether choices vary the group size of inputs.

    Those with one scale per token do not count beside others, which have zero points, nor do other number
    formats than that of the first.
    """
    acts = [spec.act for spec in choices if spec.act]
    first = acts[0] if acts else None
    same = (a for a in acts if first and (a.symmetric, a.fmt) == (first.symmetric, first.fmt))
    return len({act.group_size for act in same}) > 1


def with_beside(spec: LayerSpec, transform: str | None, rank: int | None) -> LayerSpec:
    """Returns `spec` with a transform and a rank, where they could change something."""
    if spec == LayerSpec():
        return spec
    rank = rank and (0 if spec.weight is None else rank)  # the kernel of a branch is rounded
    return dataclasses.replace(spec, transform=transform, rank=rank)


def beside_choices(
    transforms: Sequence[str], ranks: Sequence[int]
) -> list[tuple[str | None, int | None]]:
    """Returns every pair of a transform and a rank; None for both where there is no choice."""
    names, numbers = as_tuple(transforms, "transforms"), as_tuple(ranks, "ranks")
    if names == ("none",) and numbers == (0,):
        return [(None, None)]
    return list(itertools.product(names, numbers))


def whether(value: bool | Sequence[bool] | None, name: str) -> tuple[bool, ...] | None:
    """Returns one or two booleans as a tuple, and None as it is.

    Raises:
        ValueError: if it is something else.
    """
    if value is None:
        return None
    found = (value,) if isinstance(value, bool) else tuple(value)
    if not found or len(set(found)) < len(found) or any(type(one) is not bool for one in found):
        raise ValueError(f"{name}={value!r} must be True, False or both.")
    return found


def as_tuple(value: Item | Sequence[Item], name: str) -> tuple[Item, ...]:
    values: tuple[Any, ...] = (value,) if isinstance(value, int | str) else tuple(value)
    if not values or len(set(values)) < len(values):
        kind = "names" if any(isinstance(one, str) for one in values) else "numbers"
        raise ValueError(f"{name}={value!r} must be one or more different {kind}.")
    return values


def resized(spec: LayerSpec, group_size: int) -> LayerSpec:
    """Returns `spec` with another group size on both sides."""
    weight = spec.weight and dataclasses.replace(spec.weight, group_size=group_size)
    act = spec.act and dataclasses.replace(spec.act, group_size=group_size)
    return dataclasses.replace(spec, weight=weight, act=act)


def describe(spec: LayerSpec) -> str:
    """Returns a choice in few letters: `w4 g64 a8 g128`, `w4a8 g64` where sizes agree.

    A number format stands in place of its bits (`nf4 g64 a8 g64`, `fp8_e4m3 g0 a-fp8_e4m3 token`);
    transform and rank follow where there are any (`w4a8 g32 smooth+hadamard r16`). Two levels of scales,
    integer weights without zero points and one scale per token are said (`w4 g32 two-level a8 token`,
    `w8 g0 symmetric a8 token`).
    """
    weight, act = spec.weight, spec.act
    said = ""
    if weight and not weight.fmt:
        said = " symmetric" * weight.symmetric + " two-level" * (weight.scale_levels == 2)
    is_token = act is not None and has_token_scale(act)
    asked = [] if spec.transform in (None, "none") else [spec.transform]
    asked += [f"r{spec.rank}"] if spec.rank else []
    is_one = weight and act and weight.group_size == act.group_size and not is_token
    if weight and act and is_one and not (weight.fmt or act.fmt):
        return " ".join([f"w{weight.bits}a{act.bits} g{weight.group_size}{said}", *asked])
    name = "" if weight is None else weight.fmt.name if weight.fmt else f"w{weight.bits}"
    parts = [f"{name} g{weight.group_size}{said}" if weight else "w16"]
    scales = "" if act is None else "token" if is_token else f"g{act.group_size}"
    name = "" if act is None else f"a-{act.fmt.name}" if act.fmt else f"a{act.bits}"
    parts.append(f"{name} {scales}" if act else "a16")
    return " ".join([*parts, *asked])
