"""What goes into a network's layers on calibration items: extremes per channel, and some rows.

Dimensions: I items, B batch, K input channels, M rows kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jaxtyping import Float

from qdit_jax.calibration.items import Items
from qdit_jax.models import seen_inputs
from qdit_jax.quant import check_finite
from qdit_jax.sampling import Denoiser, filled_batch
from qdit_jax.types import Params, Progress, ProgressFn, untold

# Rows of all layers together hold at most this many float32 values (256 MB).
MAX_VALUES = 2**26


@dataclasses.dataclass(frozen=True)
class LayerInputs:
    """The inputs of one layer.

    Attributes:
        low, high: `[K]`, over all items.
        mean_abs: `[K]`, of the absolute values over all items.
        rows: `[M, K]` float32, evenly picked from the items.
    """

    low: Float[np.ndarray, " K"]
    high: Float[np.ndarray, " K"]
    mean_abs: Float[np.ndarray, " K"]
    rows: Float[np.ndarray, "M K"]

    @property
    def absmax(self) -> Float[np.ndarray, " K"]:
        """The largest absolute value of each channel."""
        return np.maximum(np.abs(self.low), np.abs(self.high))


def layer_inputs(
    model: nn.Module,
    params: Params,
    items: Items,
    chosen: np.ndarray,
    paths: Sequence[str],
    *,
    num_rows: int = 512,
    batch_size: int = 8,
    progress_fn: ProgressFn = untold,
) -> dict[str, LayerInputs]:
    """Returns what the layers `paths` see before their own input leaves and quantizers.

    Args:
        chosen: numbers of the items to run.
        num_rows: rows to keep per layer, fewer where all layers' would exceed `MAX_VALUES`.
        progress_fn: called with 1 after every batch.

    Raises:
        ValueError: if an input is not finite; it names the layer.
    """
    size = min(batch_size, len(chosen))
    starts = range(0, len(chosen), size)
    denoise_fn = Denoiser(params, model)
    per_batch = rows_per_batch(params, paths, num_rows, len(starts))
    parts = []
    for start in starts:
        batch = chosen[filled_batch(start, size, len(chosen))]
        found = call_inputs(denoise_fn, *items.taken(batch), paths=tuple(paths), rows=per_batch)
        parts.append(jax.tree.map(np.asarray, found))
        progress_fn(Progress(1))
    return {path: joined(path, [part[path] for part in parts]) for path in paths}


def rows_per_batch(params: Params, paths: Sequence[str], num_rows: int, num_batches: int) -> int:
    """Returns how many rows of every layer each batch gives."""
    flat = flatten_dict(params, sep="/")
    width = sum(int(np.prod(flat[f"{path}/kernel"].shape[:-1])) for path in paths)
    return max(1, -(-min(num_rows, MAX_VALUES // max(width, 1)) // num_batches))


@partial(jax.jit, static_argnames=("paths", "rows"))
def call_inputs(
    denoise_fn: Denoiser,
    x: Any,
    timestep: Any,
    condition: Any,
    *,
    paths: tuple[str, ...],
    rows: int,
) -> dict[str, dict[str, jax.Array]]:
    """Returns low, high, mean of absolute values and `rows` evenly picked rows per layer."""
    found: dict[str, dict[str, jax.Array]] = {}

    def look(path: str, seen: jax.Array) -> None:
        if path not in paths:
            return
        flat = seen.astype(jnp.float32).reshape(-1, seen.shape[-1])
        place = np.linspace(0, flat.shape[0] - 1, min(rows, flat.shape[0])).round().astype(int)
        call = {
            "low": flat.min(0),
            "high": flat.max(0),
            "mean_abs": jnp.abs(flat).mean(0),
            "rows": flat[place],
        }
        found[path] = merged(found[path], call) if path in found else call

    with seen_inputs(look):
        denoise_fn(jnp.asarray(x), timestep, condition)
    return found


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Returns two calls' findings as one; a layer may run several times in a network."""
    return {
        "low": jnp.minimum(one["low"], other["low"]),
        "high": jnp.maximum(one["high"], other["high"]),
        "mean_abs": (one["mean_abs"] + other["mean_abs"]) / 2,
        "rows": jnp.concatenate([one["rows"], other["rows"]]),
    }


def joined(path: str, parts: Sequence[Mapping[str, np.ndarray]]) -> LayerInputs:
    """Returns the findings of all batches as one; raises `ValueError` if they are not finite."""
    low = np.min([part["low"] for part in parts], axis=0)
    high = np.max([part["high"] for part in parts], axis=0)
    check_finite(f"the input of {path}", np.stack([low, high]))
    mean_abs = np.mean([part["mean_abs"] for part in parts], axis=0)
    return LayerInputs(low, high, mean_abs, np.concatenate([part["rows"] for part in parts]))
