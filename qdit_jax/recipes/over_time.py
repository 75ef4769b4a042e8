"""Bits of activations by timestep, as a recipe says them."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qdit_jax.quant import UNQUANTIZED

STEP_RANGE = re.compile(r"\s*(-?\d+)(?:-(\d+))?\s*")


@dataclasses.dataclass(frozen=True)
class OverTime:
    """The bits of all quantized activations at each of some timesteps; the nearest one decides.

    Timesteps are those that the network is given, so that a schedule made for a sampler of 20 steps
    fits one of 50 too: the first fifth of its steps covers the first fifth of theirs.

    Attributes:
        timesteps: in any order.
        act_bits: one per timestep: 2 to 8; 16 for no quantizer; None for the rules' own bits.
    """

    timesteps: tuple[float | int, ...]
    act_bits: tuple[int | None, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "timesteps", tuple(float(t) for t in self.timesteps))
        object.__setattr__(self, "act_bits", tuple(self.act_bits))
        if not self.timesteps or len(self.timesteps) != len(self.act_bits):
            raise ValueError(
                f"over_time has {len(self.timesteps)} timesteps and {len(self.act_bits)} act_bits; "
                "give one of each per step."
            )
        for timestep in self.timesteps:
            if not math.isfinite(timestep):
                raise ValueError(f"over_time: timestep {timestep} is not a finite number.")
        for bits in self.act_bits:
            check_act_bits(bits)

    @classmethod
    def at_steps(
        cls, timesteps: Sequence[float | int], steps: Mapping[str, int | None]
    ) -> OverTime:
        """Returns other bits at some steps of a sampler, and the rules' own at the rest.

        Args:
            timesteps: of the sampler, in its order; see `sampling.sampler_timesteps`.
            steps: such as `{"0-3,-1": 16}`: bits by the numbers of steps. Negative numbers count
                from the end, a range includes its end, and a later entry replaces an earlier one.

        Raises:
            ValueError: if a step is not a number or range, or the sampler lacks it.
        """
        act_bits: list[int | None] = [None] * len(timesteps)
        for text, bits in steps.items():
            for step in step_numbers(text, len(timesteps)):
                act_bits[step] = bits
        return cls(tuple(timesteps), tuple(act_bits))

    def to_json(self) -> dict[str, Any]:
        """Returns the schedule as JSON-serializable values."""
        return {"timesteps": list(self.timesteps), "act_bits": list(self.act_bits)}

    @classmethod
    def from_json(cls, data: object, where: str = "recipe") -> OverTime:
        """Returns the schedule that `to_json` described.

        Raises:
            ValueError: if it is none, naming `where` it stands.
        """
        known = ("timesteps", "act_bits")
        if not isinstance(data, dict) or set(data) != set(known):
            raise ValueError(f"{where}: over_time must be an object with {' and '.join(known)}.")
        try:
            return cls(*(tuple(data[name]) for name in known))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error


def check_act_bits(bits: object) -> None:
    """Raises `ValueError` unless `bits` are 2 to 8, 16 or None."""
    is_number = isinstance(bits, int) and not isinstance(bits, bool)
    if bits is not None and not (is_number and bits in (*range(2, 9), UNQUANTIZED)):
        raise ValueError(
            f"act_bits={bits!r} is not supported; use 2 to 8, {UNQUANTIZED} for no quantizer, or "
            "None for the rules' own."
        )


def step_numbers(text: str, num_steps: int) -> list[int]:
    """Returns the steps that `text` names, such as `"0-3,-1"`, as numbers from 0.

    Raises:
        ValueError: if a part of it is not a step or range of steps, or there are not as many steps.
    """
    found = []
    for part in text.split(","):
        match = STEP_RANGE.fullmatch(part)
        if match is None:
            raise ValueError(f"steps={text!r}: {part!r} is not a step; write such as '0-3,-1'.")
        first, last = int(match[1]), int(match[2] or match[1])
        if first < 0 and match[2]:
            raise ValueError(f"steps={text!r}: a range starts at 0 or later, not at {first}.")
        if not -num_steps <= first <= last < num_steps:
            raise ValueError(f"steps={text!r}: {part!r} is not within the {num_steps} steps.")
        found += [step % num_steps for step in range(first, last + 1)]
    return found
