"""Limits of an error, written like `0.5dB-of-g128`: that of a uniform assignment, and a little more."""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from qdit_jax.allocation.budget import reference_spec
from qdit_jax.allocation.choices import describe
from qdit_jax.allocation.space import SearchLayer, Space

WITHIN = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))dB-of-(?:w(\d+)a(\d+)-)?g(\d+)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Within:
    """An error limit relative to the uniform assignment of one group size.

    Attributes:
        text: such as `0.5dB-of-g128`, at the first bits of every layer, or `0.5dB-of-w4a8-g128`.
            Errors are powers: 0.5 dB more is 1.122 times as much. Below 0 asks for less.
    """

    text: str

    def __post_init__(self) -> None:
        if WITHIN.fullmatch(self.text) is None:
            raise ValueError(
                f"within={self.text!r} cannot be read; write a number of decibels and a uniform "
                "group size, such as 0.5dB-of-g128 or 0.5dB-of-w4a8-g128."
            )

    @property
    def parts(self) -> tuple[str, str | None, str | None, str]:
        """The decibels, the bits of weights and inputs if given, and the group size, as text."""
        match = WITHIN.fullmatch(self.text)
        assert match is not None
        decibels, weight_bits, act_bits, size = match.groups()
        return decibels, weight_bits, act_bits, size

    @property
    def factor(self) -> float:
        """How many times the uniform assignment's error is allowed."""
        return 10 ** (float(self.parts[0]) / 10)

    def reference(self, space: Space) -> np.ndarray:
        """Returns the uniform assignment, int32 `[L]`; layers without a choice keep theirs.

        Raises:
            ValueError: if a layer has no such choice; it names the layer.
        """
        return np.array([self.choice(layer) for layer in space.layers], np.int32)

    def choice(self, layer: SearchLayer) -> int:
        """Returns the number of a layer's choice in the uniform assignment."""
        _, weight_bits, act_bits, size = self.parts
        bits = None if weight_bits is None else (int(weight_bits), int(act_bits or 0))
        spec = reference_spec(layer, int(size), bits)
        # The first transform and rank, as in `uniform_assignment`; the reference names none.
        plain = [choice.plain for choice in layer.choices]
        if spec.plain not in plain:
            raise ValueError(
                f"within={self.text!r} needs the choice {describe(spec)}, which {layer.path} has not; "
                f"offer it too: it has {', '.join(map(describe, layer.choices))}."
            )
        return plain.index(spec.plain)
