"""Bits by timestep, as a recipe says them."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qdit_jax.quant import UNQUANTIZED

STEP_RANGE = re.compile(r"\s*(-?\d+)(?:-(\d+))?\s*")
LAST = "last"  # as -1, which an option's value cannot begin with
BITS = re.compile(r"(?:w(\d+))?(?:a(\d+))?")
KNOWN = ("timesteps", "act_bits", "weight_bits")


@dataclasses.dataclass(frozen=True)
class OverTime:
    """The bits of what is quantized at each of some timesteps; the nearest one decides.

    Timesteps are those that the network is given, so that a schedule made for a sampler of 20 steps
    fits one of 50 too: the first fifth of its steps covers the first fifth of theirs.

    Attributes:
        timesteps: in any order.
        act_bits: of all quantized activations, one per timestep: 2 to 8; 16 for no quantizer; None
            for the rules' own bits.
        weight_bits: of all quantized kernels, likewise; 16 for the kernel as it was. Label tables
            keep their own. A kernel is held once for each of its bits. None if they never change.
    """

    timesteps: tuple[float | int, ...]
    act_bits: tuple[int | None, ...]
    weight_bits: tuple[int | None, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "timesteps", tuple(float(t) for t in self.timesteps))
        object.__setattr__(self, "act_bits", tuple(self.act_bits))
        weight_bits = self.weight_bits
        if weight_bits is not None:
            weight_bits = None if set(weight_bits) <= {None} else tuple(weight_bits)
        object.__setattr__(self, "weight_bits", weight_bits)
        for name in ("act_bits", "weight_bits"):
            given = getattr(self, name)
            if given is None:
                continue
            if not self.timesteps or len(self.timesteps) != len(given):
                raise ValueError(
                    f"over_time has {len(self.timesteps)} timesteps and {len(given)} {name}; "
                    "give one of each per step."
                )
            for bits in given:
                check_bits(name, bits)
        for timestep in self.timesteps:
            if not math.isfinite(timestep):
                raise ValueError(f"over_time: timestep {timestep} is not a finite number.")

    @classmethod
    def at_steps(
        cls, timesteps: Sequence[float | int], steps: Mapping[str, int | str | None]
    ) -> OverTime:
        """Returns other bits at some steps of a sampler, and the rules' own at the rest.

        Args:
            timesteps: of the sampler, in its order; see `sampling.sampler_timesteps`.
            steps: such as `{"0-3,-1": 16}`: bits by the numbers of steps. Negative numbers count
                from the end (`last` is -1), a range includes its end, and a later entry replaces an
                earlier one. A number is for activations; `"w8a16"` for weights and activations,
                `"w8"` for weights alone.

        Raises:
            ValueError: if a step is not a number or range, or the sampler lacks it, or bits are none.
        """
        sides: list[list[int | None]] = [[None] * len(timesteps), [None] * len(timesteps)]
        for text, bits in steps.items():
            for side, one in zip(sides, bits_named(bits), strict=True):
                for step in step_numbers(text, len(timesteps)):
                    side[step] = one if one is not None or bits is None else side[step]
        weight_bits, act_bits = map(tuple, sides)
        return cls(tuple(timesteps), act_bits, weight_bits)

    @property
    def other_weight_bits(self) -> list[int]:
        """The bits of weights beside the rules' own, the most first."""
        return sorted({bits for bits in self.weight_bits or () if bits is not None}, reverse=True)

    @property
    def text(self) -> str:
        """The schedule in words: which bits from which timestep to which, in the given order."""
        weights = self.weight_bits or (None,) * len(self.act_bits)
        steps = list(zip(self.timesteps, weights, self.act_bits, strict=True))
        parts = []
        for level, group in itertools.groupby(steps, key=lambda step: step[1:]):
            times = [f"{step[0]:g}" for step in group]
            span = times[0] if len(times) == 1 else f"{times[0]} to {times[-1]}"
            named = zip("wa", level, strict=True)
            bits = "".join(f"{side}{bits}" for side, bits in named if bits is not None)
            parts.append(f"{span}: {bits or 'as the rules say'}")
        return "timesteps " + "; ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Returns the schedule as JSON-serializable values."""
        data = {"timesteps": list(self.timesteps), "act_bits": list(self.act_bits)}
        if self.weight_bits is not None:
            data["weight_bits"] = list(self.weight_bits)
        return data

    @classmethod
    def from_json(cls, data: object, where: str = "recipe") -> OverTime:
        """Returns the schedule that `to_json` described.

        Raises:
            ValueError: if it is none, naming `where` it stands.
        """
        if not isinstance(data, dict) or not set(KNOWN[:2]) <= set(data) <= set(KNOWN):
            raise ValueError(
                f"{where}: over_time must be an object with {' and '.join(KNOWN[:2])}, and "
                f"{KNOWN[2]} where weights change."
            )
        try:
            return cls(*(tuple(data[name]) for name in KNOWN if data.get(name) is not None))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error


def check_bits(name: str, bits: object) -> None:
    """Raises `ValueError` unless `bits` are 2 to 8, 16 or None."""
    is_number = isinstance(bits, int) and not isinstance(bits, bool)
    if bits is not None and not (is_number and bits in (*range(2, 9), UNQUANTIZED)):
        raise ValueError(
            f"{name}={bits!r} is not supported; use 2 to 8, {UNQUANTIZED} for no quantizer, or "
            "None for the rules' own."
        )


def check_act_bits(bits: object) -> None:
    """Raises `ValueError` unless `bits` are 2 to 8, 16 or None."""
    check_bits("act_bits", bits)


def bits_named(bits: int | str | None) -> tuple[int | None, int | None]:
    """Returns the bits of weights and activations that `bits` means, None where it says nothing.

    Raises:
        ValueError: if a text is not as `"w8a16"`, `"w8"` or `"a16"`.
    """
    if not isinstance(bits, str):
        return None, bits
    match = BITS.fullmatch(bits)
    if match is None or not any(match.groups()):
        raise ValueError(f"bits={bits!r} is not known; write a number, 'w8a16', 'w8' or 'a16'.")
    weight, act = (None if text is None else int(text) for text in match.groups())
    return weight, act


def step_numbers(text: str, num_steps: int) -> list[int]:
    """Returns the steps that `text` names, such as `"0-3,-1"`, as numbers from 0.

    Raises:
        ValueError: if a part of it is not a step or range of steps, or there are not as many steps.
    """
    found = []
    for part in text.split(","):
        match = STEP_RANGE.fullmatch("-1" if part.strip() == LAST else part)
        if match is None:
            raise ValueError(f"steps={text!r}: {part!r} is not a step; write such as '0-3,last'.")
        first, last = int(match[1]), int(match[2] or match[1])
        if first < 0 and match[2]:
            raise ValueError(f"steps={text!r}: a range starts at 0 or later, not at {first}.")
        if not -num_steps <= first <= last < num_steps:
            raise ValueError(
                f"steps={text!r}: {part!r} is not within the {num_steps} steps 0 to {num_steps - 1}."
            )
        found += [step % num_steps for step in range(first, last + 1)]
    return found
