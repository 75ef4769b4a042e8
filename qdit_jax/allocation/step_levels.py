"""Levels that sampling steps choose among: bits of activations, or of weights and activations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from flax.traverse_util import flatten_dict

from qdit_jax.ptq import scheduled_params
from qdit_jax.quant import UNQUANTIZED, ActQuant, Level, QTensor
from qdit_jax.recipes import OverTime, bits_named
from qdit_jax.types import Params

# Bits of activations, or of weights and activations; None for the checkpoint's own.
AnyLevel = int | Level | None
OWN = "own"


def as_level(level: AnyLevel) -> Level:
    """Returns a level as the bits of weights and activations."""
    return level if isinstance(level, tuple) else (None, level)


def level_named(text: str) -> Level:
    """Returns the bits of weights and activations of `"w4a8"`, `"w8"`, `"a16"`, `"16"` or `"own"`.

    A number alone is of activations; a side that is not named keeps the checkpoint's own bits.

    Raises:
        ValueError: if the text is none of these, or such bits do not exist.
    """
    if text == OWN:
        return None, None
    weights, acts = bits_named(f"a{text}" if text.isdecimal() else text)
    OverTime((0.0,), (acts,), (weights,))  # checks the bits
    return weights, acts


def level_text(level: AnyLevel) -> str:
    """Returns a level's name, as `level_named` reads it."""
    if not isinstance(level, tuple):
        return OWN if level is None else str(level)
    sides = zip("wa", level, strict=True)
    return "".join(f"{side}{bits}" for side, bits in sides if bits is not None) or OWN


def checked_levels(params: Params, levels: Sequence[str | AnyLevel]) -> tuple[Level, ...]:
    """Returns levels as bits of weights and activations, each once.

    Raises:
        ValueError: if fewer than two are left, two are the same for these parameters, or the
            parameters cannot have one; its name is said.
    """
    given = (level_named(one) if isinstance(one, str) else as_level(one) for one in levels)
    found = tuple(dict.fromkeys(given))
    names = [level_text(level) for level in found]
    if len(found) < 2:
        raise ValueError(f"levels={names} leave no choice; give two or more.")
    for name, (weights, acts) in zip(names, found, strict=True):
        if (weights, acts) == (None, None):
            continue
        try:
            scheduled_params(params, OverTime((0.0,), (acts,), (weights,)))
        except ValueError as error:
            raise ValueError(f"level {name}: {error}") from error
    check_different(params, found)
    return found


def check_different(params: Params, levels: Sequence[Level]) -> None:
    """Raises `ValueError` if two levels are the same, because all of the tree has the bits of one."""
    shared = [bits[0] if len(set(bits)) == 1 else None for bits in stored_bits(params)]
    seen: dict[Level, str] = {}
    for level in levels:
        weights, acts = (
            own if bits is None else bits for bits, own in zip(level, shared, strict=True)
        )
        name = level_text(level)
        if (other := seen.setdefault((weights, acts), name)) != name:
            raise ValueError(
                f"levels {other} and {name} are the same for this checkpoint; leave one out."
            )


def bits_of_levels(params: Params, levels: Sequence[AnyLevel]) -> list[tuple[float, float]]:
    """Returns the bits of weights and activations of every level; its own are the mean of the tree's."""
    own = [float(np.mean(bits or [UNQUANTIZED])) for bits in stored_bits(params)]
    sides = [zip(as_level(level), own, strict=True) for level in levels]
    found = ([float(mean if bits is None else bits) for bits, mean in side] for side in sides)
    return [(weights, acts) for weights, acts in found]


def widest(params: Params, levels: Sequence[AnyLevel]) -> AnyLevel:
    """Returns the most bits of each side that a level has, which need not be a level themselves."""
    bits = bits_of_levels(params, levels)
    weights, acts = (
        as_level(levels[int(np.argmax([both[side] for both in bits]))])[side] for side in (0, 1)
    )
    return (weights, acts) if any(isinstance(level, tuple) for level in levels) else acts


def stored_bits(params: Params) -> tuple[list[int], list[int]]:
    """Returns the bits of every quantized kernel and of every activation quantizer.

    Kernels of other bits at some timesteps do not count.
    """
    flat = flatten_dict(params, sep="/")
    kernels = [
        leaf.bits
        for path, leaf in flat.items()
        if isinstance(leaf, QTensor) and path.split("/")[-1] == "kernel"
    ]
    return kernels, [leaf.spec.bits for leaf in flat.values() if isinstance(leaf, ActQuant)]
