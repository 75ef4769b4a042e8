"""A file of conditions: an `.npz` whose arrays have the names of a condition's entries, N first.

`null_*` entries (N rows, or one for all) are the null condition; `prompts`, `[N]` texts, is kept for
reports. Floating-point arrays may be float32, float16 or bfloat16 (which NumPy writes as 2 bytes without a type).
"""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np

from qdit_jax.errors import UserError
from qdit_jax.files import PathLike, as_path, write_arrays
from qdit_jax.models import ENTRIES, NULL, Network, as_condition
from qdit_jax.sampling.conditions import check_entries, check_lengths, num_conditions

PROMPTS = "prompts"
MADE_BY = "write it with `qdit embed-text`, or numpy.savez"


@dataclasses.dataclass(frozen=True, eq=False)
class Conditions:
    """Prepared conditions of N prompts, and what the prompts say where that is known."""

    condition: dict[str, np.ndarray]
    prompts: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return num_conditions(self.condition) or 0

    def taken(self, rows: Sequence[int]) -> Conditions:
        """Returns those of the prompts `rows`; a null entry of one row stays as it is.

        Raises:
            ValueError: if there is no row, or one is out of range.
        """
        count = len(self)
        if not rows:
            raise ValueError("rows is empty; choose one prompt or more.")
        if bad := [row for row in rows if not 0 <= row < count]:
            raise ValueError(f"row {bad[0]} is out of range; there are prompts 0 to {count - 1}.")
        index = np.asarray(rows)
        found = {
            name: entry if name.startswith(NULL) and len(entry) == 1 else entry[index]
            for name, entry in self.condition.items()
        }
        prompts = None if self.prompts is None else tuple(self.prompts[row] for row in rows)
        return Conditions(found, prompts)


def read_conditions(
    path: PathLike, model: Network | None = None, rows: Sequence[int] | None = None
) -> Conditions:
    """Returns the conditions in a file.

    Args:
        path: of the `.npz`; may be a URL.
        model: the network that is to take them, which they are checked against.
        rows: the prompts to keep; all by default.

    Raises:
        UserError: if the file cannot be read, or an entry's name, dtype, shape or values do not fit.
    """
    source = as_path(path)
    try:
        with source.open("rb") as file, np.load(file, allow_pickle=False) as data:
            arrays = {name: typed(data[name]) for name in data.files}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {MADE_BY}.") from None
    except (OSError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} holds no conditions ({error}); {MADE_BY}.") from error
    prompts = arrays.pop(PROMPTS, None)
    try:
        found = Conditions(checked_arrays(arrays, model, str(path)), None)
        texts = None if prompts is None else checked_prompts(prompts, len(found))
        found = dataclasses.replace(found, prompts=texts)
        return found if rows is None else found.taken(rows)
    except UserError:
        raise
    except ValueError as error:
        text = str(error)
        raise UserError(text if text.startswith(str(path)) else f"{path}: {text}") from error


def typed(array: np.ndarray) -> np.ndarray:
    """Returns an array as it was written: NumPy reads bfloat16 back as 2 bytes without a type."""
    return array.view(ml_dtypes.bfloat16) if array.dtype.str[1:] == "V2" else array


def checked_arrays(
    arrays: Mapping[str, np.ndarray], model: Network | None, source: str
) -> dict[str, np.ndarray]:
    """Returns the entries of a file, checked as far as they can be without or with the network."""
    if not arrays:
        raise ValueError(f"{source} holds no arrays; {MADE_BY}.")
    if model is not None:
        return check_entries(model, arrays, source)
    if strange := [name for name in arrays if name.removeprefix(NULL) not in ENTRIES]:
        raise ValueError(
            f"{source}: the entry {strange[0]!r} is not known; entries are {', '.join(ENTRIES)}, "
            f"{NULL}* of them, and {PROMPTS}."
        )
    check_lengths(arrays)
    return dict(arrays)


def checked_prompts(prompts: np.ndarray, count: int) -> tuple[str, ...]:
    """Returns the texts of a file; raises `ValueError` unless there is one per condition."""
    if prompts.dtype.kind != "U" or prompts.shape != (count,):
        raise ValueError(
            f"{PROMPTS} has dtype {prompts.dtype} and shape {prompts.shape}; give {count} texts."
        )
    return tuple(map(str, prompts))


def write_conditions(
    path: PathLike, condition: Mapping[str, Any], prompts: Sequence[str] | None = None
) -> None:
    """Writes conditions, N first, and their prompts to an `.npz` that `read_conditions` reads.

    Raises:
        ValueError: if an entry's name is not known, or entries differ in number.
    """
    arrays = {
        name: np.asarray(entry) for name, entry in jax.device_get(as_condition(condition)).items()
    }
    checked_arrays(arrays, None, "condition")
    if prompts is not None:
        texts = np.asarray(list(prompts), dtype=str)
        checked_prompts(texts, num_conditions(arrays) or 0)
        arrays[PROMPTS] = texts
    write_arrays(path, arrays, "conditions")
