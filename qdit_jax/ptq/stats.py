"""Calibration statistics: the range of every layer's input, by channel, over timesteps.

Dimensions: S timesteps, K input channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from qdit_jax.errors import UserError
from qdit_jax.files import replaced_file


@dataclasses.dataclass(frozen=True)
class Stats:
    """Smallest and largest value of each layer's input channels at each timestep.

    Attributes:
        timesteps: `[S]`, in the order of sampling.
        low, high: by layer path, float32 `[S, K]`.
    """

    timesteps: np.ndarray
    low: dict[str, np.ndarray]
    high: dict[str, np.ndarray]

    def save(self, path: str | Path) -> None:
        """Writes an `.npz` with `timesteps`, `low/<layer>` and `high/<layer>`."""
        arrays = {
            f"{side}/{name}": array
            for side in ("low", "high")
            for name, array in getattr(self, side).items()
        }
        with replaced_file(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, timesteps=self.timesteps, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> Stats:
        """Returns the statistics in a file; raises `UserError` if it holds none."""
        try:
            with np.load(path) as data:
                sides: dict[str, dict[str, np.ndarray]] = {"low": {}, "high": {}}
                for key in data.files:
                    side, _, name = key.partition("/")
                    if name:
                        sides[side][name] = data[key]
                return cls(data["timesteps"], sides["low"], sides["high"])
        except (OSError, KeyError, ValueError) as error:
            raise UserError(f"{path} holds no calibration statistics ({error}).") from error


def input_ranges(
    apply: Callable[[], Any], layer_type: type[nn.Module]
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Returns `{layer path: (low [K], high [K])}` of the inputs of every `layer_type` in one call.

    `apply` runs the network once; call this inside the function that is jitted.
    """
    ranges: dict[str, tuple[jax.Array, jax.Array]] = {}

    def record(next_fn: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext):
        if isinstance(context.module, layer_type) and context.method_name == "__call__":
            rows = args[0].reshape(-1, args[0].shape[-1]).astype(jnp.float32)
            ranges["/".join(context.module.path)] = (rows.min(0), rows.max(0))
        return next_fn(*args, **kwargs)

    with nn.intercept_methods(record):
        apply()
    return ranges


def collect_stats(
    ranges_fn: Callable[[Any, Any, Any], dict[str, tuple[jax.Array, jax.Array]]],
    batches: Iterable[tuple[float, Any, Any]],
) -> Stats:
    """Returns statistics over `batches` of `(timestep, x, label)`.

    `ranges_fn(x, timestep [B], label)` is jitted and returns what `input_ranges` does. Batches of
    the same timestep are merged; nothing but one range a layer is kept.
    """
    merged: dict[float, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for timestep, x, label in batches:
        found = ranges_fn(x, jnp.full(len(x), float(timestep)), label)
        at = merged.setdefault(timestep, {})
        for path, (low, high) in found.items():
            before = at.get(path, (low, high))
            at[path] = np.minimum(low, before[0]), np.maximum(high, before[1])
    if not merged:
        raise ValueError("no batch to calibrate on; ask for at least one sample.")
    paths = next(iter(merged.values()))

    def stacked(side: int) -> dict[str, np.ndarray]:
        return {path: np.stack([at[path][side] for at in merged.values()]) for path in paths}

    return Stats(np.array(list(merged)), stacked(0), stacked(1))
