"""Collecting calibration statistics batch by batch, in a state that can be written and read back.

Dimensions: S timesteps, K input channels, M tokens kept per timestep, R rows of one call.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qdit_jax.calibration.statistics import HALVES, Stats
from qdit_jax.checkpoint import first_difference
from qdit_jax.errors import UserError
from qdit_jax.files import PathLike, as_path, write_arrays

State = dict[str, Any]


def empty_state(settings: dict[str, Any]) -> State:
    """Returns the state of a collection before its first batch; `settings` identify it."""
    return {"settings": json.dumps(settings, sort_keys=True), "num_done": 0, "num_rows": {}}


def observed(
    rows: dict[str, Float[Array, "R K"]], hessians: str | None, num_tokens: int
) -> dict[str, Any]:
    """Returns what one call adds to the statistics, by `<kind>/<layer>`.

    Kinds are `low` and `high`, and on request `tokens`, `hessians` and `num_rows`. `hessians` is a
    pattern of layer paths, whose `[K, K]` sums are then all in memory.
    """
    found: dict[str, Any] = {}
    for path, x in rows.items():
        found[f"low/{path}"], found[f"high/{path}"] = x.min(0), x.max(0)
        if num_tokens:
            place = np.linspace(0, x.shape[0] - 1, num_tokens).round().astype(int)
            found[f"tokens/{path}"] = x[place]
        if hessians is not None and re.fullmatch(hessians, path):
            found[f"hessians/{path}"] = jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST)
            found[f"num_rows/{path}"] = np.int64(x.shape[0])
    return found


def add_call(
    state: State, found: dict[str, Any], half: str, step: int, num_steps: int, call: int
) -> None:
    """Adds to `state` what `observed` found in one half at one step.

    `call` counts the calls of that step so far; the tokens of each call are appended.

    Raises:
        ValueError: if an input is not finite.
    """
    for name, array in found.items():
        kind, _, path = name.partition("/")
        array = np.asarray(array)
        if kind != "num_rows":
            check_input(path, array, step, num_steps)
        if kind == "hessians":
            state[name] = state.get(name, 0) + array
        elif kind == "num_rows":
            state["num_rows"][path] = state["num_rows"].get(path, 0) + int(array)
        elif kind == "tokens":
            kept = state.setdefault(name, np.zeros((num_steps, 0, array.shape[1]), np.float32))
            if kept.shape[1] < (call + 1) * len(array):
                kept = np.pad(kept, ((0, 0), (0, len(array)), (0, 0)))
                state[name] = kept
            kept[step, call * len(array) : (call + 1) * len(array)] = array
        else:
            start, pick = (np.inf, np.minimum) if kind == "low" else (-np.inf, np.maximum)
            key = f"{half}.{name}"
            if key not in state:
                state[key] = np.full((num_steps, len(array)), start, np.float32)
            state[key][step] = pick(state[key][step], array)


def add_part(state: State, part: State) -> None:
    """Adds to `state` what was collected from the next samples, in a state of their own."""
    for name, array in part.items():
        kind, _, path = name.partition("/")
        if name == "num_done":
            state[name] += array
        elif name == "num_rows":
            for layer, count in array.items():
                state[name][layer] = state[name].get(layer, 0) + count
        elif not path or name not in state:
            state[name] = array
        elif kind == "hessians":
            state[name] = state[name] + array
        elif kind == "tokens":
            state[name] = np.concatenate([state[name], array], axis=1)
        else:
            pick = np.minimum if kind.endswith("low") else np.maximum
            state[name] = pick(state[name], array)


def check_input(path: str, array: np.ndarray, step: int, num_steps: int) -> None:
    """Raises `ValueError`, naming the layer, if what was seen of its input is not finite."""
    if not np.isfinite(array).all():
        raise ValueError(
            f"the input of {path} is NaN or infinite at step {step + 1} of {num_steps}: the network "
            "cannot be calibrated. Check its parameters (`qdit inspect`) and the guidance."
        )


def stats_of(state: State) -> Stats:
    """Returns the statistics of a finished state."""
    timesteps = state["timesteps"]
    sides: dict[str, dict[str, Any]] = {}
    for name, array in state.items():
        kind, _, path = name.partition("/")
        if path and kind == "hessians":
            sides.setdefault(kind, {})[path] = array
        elif path:
            ran = np.isfinite(state[f"{HALVES[0]}.low/{path}"]).all(axis=1)
            sides.setdefault(kind, {})[path] = array[nearest_of(ran)]
    halves = {
        half: Stats(timesteps, sides[f"{half}.low"], sides[f"{half}.high"])
        for half in HALVES
        if f"{half}.low" in sides
    }
    first = next(iter(halves.values()))

    def both(side: str, pick: Callable[[list[np.ndarray]], np.ndarray]) -> dict[str, np.ndarray]:
        return {p: pick([getattr(h, side)[p] for h in halves.values()]) for p in first.low}

    hessians = {
        path: (total / np.float32(state["num_rows"][path])).astype(np.float32)
        for path, total in sides.get("hessians", {}).items()
    }
    low = both("low", lambda parts: np.min(parts, axis=0))
    high = both("high", lambda parts: np.max(parts, axis=0))
    return Stats(timesteps, low, high, halves, hessians, sides.get("tokens", {}))


def nearest_of(ran: Bool[np.ndarray, " S"]) -> Int[np.ndarray, " S"]:
    """Returns the number of each step's nearest one where a layer ran: its own, where it did."""
    steps, seen = np.arange(len(ran)), np.flatnonzero(ran)
    return seen[np.abs(steps[:, None] - seen).argmin(axis=1)]


def write_state(path: PathLike, state: State) -> None:
    """Writes an unfinished collection; a reader never sees half of it."""
    write_arrays(path, packed(state))


def packed(state: State) -> dict[str, Any]:
    """Returns a state as arrays and texts alone, which a file holds."""
    return {**state, "num_rows": json.dumps(state["num_rows"])}


def unpacked(found: dict[str, Any]) -> State:
    """Returns the state of what `packed` returned, read back or not."""
    num_done, num_rows = int(found["num_done"]), json.loads(str(found["num_rows"]))
    return {**found, "num_done": num_done, "num_rows": num_rows}


def read_state(path: PathLike, settings: dict[str, Any]) -> State:
    """Returns the unfinished collection at `path`, or an empty one if there is no such file.

    Raises:
        UserError: if the file is unreadable, or was written with other settings.
    """
    if not as_path(path).exists():
        return empty_state(settings)
    found = read_unfinished(path, settings)
    try:
        return unpacked(found)
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} is not an unfinished calibration ({error}); delete it.") from error


def read_unfinished(path: PathLike, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the arrays of an unfinished calibration, and as text its settings.

    Raises:
        UserError: if the file is unreadable, or was written with other settings.
    """
    try:
        with as_path(path).open("rb") as file, np.load(file) as data:
            found: dict[str, Any] = {key: data[key] for key in data.files}
            found["settings"] = str(found["settings"])
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not an unfinished calibration ({error}); delete it.") from error
    try:
        other = first_difference(json.loads(found["settings"]), settings)
    except ValueError:
        other = "settings"
    if other is not None:
        raise UserError(
            f"{path} is an unfinished calibration with other settings or another checkpoint (its "
            f"{other} is not the same); delete it to start over."
        )
    return found
