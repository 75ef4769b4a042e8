"""How much inputs count by their timestep, where something is fitted to them.

Dimensions: S timesteps, I items.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class TimestepWeights:
    """The weight of inputs at each of some timesteps; the nearest one decides.

    Attributes:
        timesteps: in any order, as the network is given them.
        weights: one per timestep, 0 or more. Only their ratios matter; 0 leaves inputs out.
    """

    timesteps: tuple[float | int, ...]
    weights: tuple[float | int, ...]

    def __post_init__(self) -> None:
        for name in ("timesteps", "weights"):
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        if not self.timesteps or len(self.timesteps) != len(self.weights):
            raise ValueError(
                f"{len(self.timesteps)} timesteps and {len(self.weights)} weights; give one weight "
                "per timestep."
            )
        for timestep, weight in zip(self.timesteps, self.weights, strict=True):
            if not math.isfinite(timestep) or not (math.isfinite(weight) and weight >= 0):
                raise ValueError(
                    f"the weight {weight} of timestep {timestep} is not supported; use finite "
                    "numbers, 0 or more."
                )
        if not any(self.weights):
            raise ValueError("all weights of timesteps are 0; one must be above.")

    @classmethod
    def from_effects(
        cls, timesteps: Sequence[float | int], effects: Sequence[float] | Float[np.ndarray, " S"]
    ) -> TimestepWeights:
        """Returns weights in proportion to effects, 1 on average."""
        values = np.asarray(effects, np.float64)
        return cls(tuple(timesteps), tuple((values / max(values.mean(), 1e-300)).tolist()))

    def at(self, timestep: Float[np.ndarray, " I"]) -> Float[np.ndarray, " I"]:
        """Returns the weight of each input, float32."""
        away = np.abs(np.asarray(timestep, np.float64)[:, None] - np.array(self.timesteps))
        return np.array(self.weights, np.float32)[away.argmin(axis=1)]

    def to_json(self) -> dict[str, Any]:
        """Returns the weights as JSON-able values."""
        return {"timesteps": list(self.timesteps), "weights": list(self.weights)}
