"""Calibration statistics: the range of every layer's input, per channel and timestep.

Dimensions: S timesteps, K input channels, M tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qdit_jax.errors import UserError
from qdit_jax.files import PathLike, as_path, write_arrays
from qdit_jax.models import seen_inputs
from qdit_jax.quant import check_finite

HALVES = ("conditional", "null")


@dataclasses.dataclass(frozen=True)
class Stats:
    """Smallest and largest value of each layer's input channels at each timestep.

    Layers are named by path; an attention product's operand is `<attention>/q`, `k`, `v` (channels
    of a head) or `softmax` (one per key).

    Attributes:
        timesteps: `[S]`, in the order of sampling.
        low, high: by layer path, float32 `[S, K]`.
        halves: the same for calls with a label (`"conditional"`) and with the null class
            (`"null"`) alone; `low` and `high` cover both.
        hessians: by layer path, float32 `[K, K]`, the mean of `x xᵀ` over all tokens, if asked for.
        tokens: by layer path, float32 `[S, M, K]`, inputs picked evenly, if asked for.
    """

    timesteps: np.ndarray
    low: dict[str, np.ndarray]
    high: dict[str, np.ndarray]
    halves: dict[str, Stats] = dataclasses.field(default_factory=dict)
    hessians: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    tokens: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def absmax(self, path: str) -> Float[np.ndarray, "S K"]:
        """Returns the largest absolute value of each channel of a layer's input."""
        return np.maximum(np.abs(self.low[path]), np.abs(self.high[path]))

    def save(self, path: PathLike) -> None:
        """Writes an `.npz` with `timesteps` and `<kind>/<layer>`; halves as `null.low/<layer>`.

        Raises:
            UserError: if `path` holds anything but such statistics.
        """
        arrays = {"timesteps": self.timesteps}
        for prefix, one in (("", self), *((f"{h}.", s) for h, s in self.halves.items())):
            for kind in ("low", "high", "hessians", "tokens"):
                held = getattr(one, kind)
                arrays |= {f"{prefix}{kind}/{name}": array for name, array in held.items()}
        write_arrays(path, arrays, "statistics")

    @classmethod
    def load(cls, path: PathLike) -> Stats:
        """Returns the statistics in a file.

        Raises:
            UserError: if it holds none, or a layer's are not finite, have a low above a high, or
                do not fit one another.
        """
        try:
            with as_path(path).open("rb") as file, np.load(file) as data:
                kinds: dict[str, dict[str, np.ndarray]] = {}
                for key in data.files:
                    kind, _, name = key.partition("/")
                    kinds.setdefault(kind, {})[name] = data[key]
                timesteps = kinds["timesteps"][""]
                halves = {
                    half: cls(timesteps, kinds[f"{half}.low"], kinds[f"{half}.high"])
                    for half in HALVES
                    if f"{half}.low" in kinds
                }
                more = kinds.get("hessians", {}), kinds.get("tokens", {})
                stats = cls(timesteps, kinds["low"], kinds["high"], halves, *more)
                check_all(stats)
                return stats
        except (OSError, KeyError, ValueError) as error:
            raise UserError(f"{path} holds no calibration statistics ({error}).") from error


def input_rows(apply: Callable[[], Any]) -> dict[str, Float[jax.Array, "R K"]]:
    """Returns `{path: input rows}` of every linear layer and attention operand in one call.

    `apply` calls the network once. Call this inside a jitted function: inputs that are not used are
    then never in memory.
    """
    rows: dict[str, jax.Array] = {}

    def record(path: str, x: Float[Array, "... K"]) -> None:
        rows[path] = x.reshape(-1, x.shape[-1]).astype(jnp.float32)

    with seen_inputs(record, operand_fn=record):
        apply()
    return rows


def check_layer(path: str, stats: Stats, num_channels: int | None = None) -> None:
    """Raises `ValueError`, naming the layer, unless its statistics are ranges of `[S, K]`.

    `num_channels` is K where the caller knows it.
    """
    if path not in stats.low or path not in stats.high:
        side = "high" if path in stats.low else "low"
        raise ValueError(f"the statistics of {path} have no array {side!r}; calibrate again.")
    num_steps = len(stats.timesteps)
    low, high = np.asarray(stats.low[path]), np.asarray(stats.high[path])
    width = low.shape[-1] if low.ndim else 0
    wanted = (num_steps, num_channels or width)
    for name, array in (("low", low), ("high", high)):
        check_array(path, name, array, wanted)
    if (low > high).any():
        step, channel = (int(i) for i in np.argwhere(low > high)[0])
        raise ValueError(
            f"the statistics of {path} have low {low[step, channel]:g} above high "
            f"{high[step, channel]:g} at step {step}, channel {channel}; calibrate again."
        )
    if path in stats.hessians:
        check_array(path, "hessian", np.asarray(stats.hessians[path]), (width, width))
    if path in stats.tokens:
        tokens = np.asarray(stats.tokens[path])
        count = tokens.shape[1] if tokens.ndim == 3 else 0
        check_array(path, "tokens", tokens, (num_steps, count, width))


def check_array(path: str, name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raises `ValueError` unless `array` is finite, not empty and of that shape."""
    if array.shape != shape or 0 in shape:
        raise ValueError(
            f"the statistics of {path} have {name} of shape {array.shape}, where "
            f"{shape} is needed; calibrate this network again."
        )
    check_finite(f"the statistics of {path}: {name}", array)


def check_all(stats: Stats) -> None:
    """Raises `ValueError` if any layer's statistics, or those of a half, cannot be used."""
    timesteps = np.asarray(stats.timesteps)
    if timesteps.ndim != 1 or not timesteps.size:
        raise ValueError(f"timesteps have shape {timesteps.shape}; one number per step is needed.")
    check_finite("timesteps", timesteps)
    for one in (stats, *stats.halves.values()):
        for path in sorted({*one.low, *one.high}):
            check_layer(path, one)
