"""Checks of conditions that are dicts: what a network takes by which name, and of what shape.

Dimensions: B batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from qdit_jax.types import Condition


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a condition's entry must be.

    Attributes:
        shape: its axes after the batch; None is any length, a negative number at most so many.
        kind: `"real"`, `"bool"`, or `"positive"` (numbers above 0).
        required: whether it may not be absent.
    """

    shape: tuple[int | None, ...]
    kind: str = "real"
    required: bool = True


def check_entries(condition: Condition, entries: Mapping[str, Entry]) -> None:
    """Raises `ValueError`, naming the entry, unless `condition` has what `entries` describe."""
    needed = [name for name, entry in entries.items() if entry.required]
    further = [name for name in entries if name not in needed]
    sentence = f"give {' and '.join(needed)}" + (
        f"; {', '.join(further)} too if you like" * bool(further)
    )
    if not isinstance(condition, Mapping):
        raise ValueError(
            f"condition is a {type(condition).__name__}, not a dict by name: {sentence}."
        )
    if set(needed) - set(condition) or set(condition) - set(entries):
        raise ValueError(f"condition has {sorted(condition)}: {sentence}.")
    arrays = {name: np.asarray(value) for name, value in condition.items()}
    batch = {array.shape[:1] for array in arrays.values()}
    if len(batch) != 1 or batch <= {(), (0,)}:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ValueError(
            f"condition's entries have the shapes {shapes}; give one per sample of each."
        )
    for name, array in arrays.items():
        check_entry(name, array, entries[name])


def check_text_mask(condition: Condition) -> None:
    """Raises `ValueError` if `text_mask` has other rows than `text`, or keeps none of one; it may lack."""
    assert isinstance(condition, Mapping)
    if "text_mask" not in condition:
        return
    rows, mask = np.shape(condition["text"])[:2], np.asarray(condition["text_mask"])
    if mask.shape != rows or not mask.any(axis=1).all():
        raise ValueError(
            f"text_mask has shape {mask.shape}; give booleans {rows}, True for at least one row of "
            "each text."
        )


def check_entry(name: str, array: np.ndarray, entry: Entry) -> None:
    """Raises `ValueError` unless an array has the axes and the values of its entry."""
    if array.ndim != 1 + len(entry.shape) or not all(map(fits, array.shape[1:], entry.shape)):
        wanted = ", ".join(["B", *map(axis_text, entry.shape)])
        raise ValueError(f"{name} has shape {array.shape}; this model takes [{wanted}].")
    if entry.kind == "bool":
        if array.dtype != np.bool_:
            raise ValueError(f"{name} has dtype {array.dtype}; give booleans.")
        return
    if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
        raise ValueError(f"{name} has dtype {array.dtype}; give real numbers.")
    if not np.isfinite(array.astype(np.float32)).all():
        raise ValueError(f"{name} has values that are NaN or infinite.")
    if entry.kind == "positive" and not (array > 0).all():
        raise ValueError(f"{name}={array.min()}: give positive numbers.")


def fits(length: int, wanted: int | None) -> bool:
    """Returns whether an axis has a wanted length."""
    return wanted is None or length == wanted or (wanted < 0 and 1 <= length <= -wanted)


def axis_text(wanted: int | None) -> str:
    """Returns how a message writes an axis."""
    if wanted is None:
        return "any"
    return str(wanted) if wanted >= 0 else f"1 to {-wanted}"
