"""Finished modules of a block reconstruction on disk, so that a run that was stopped resumes."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from qdit_jax.checkpoint import first_difference
from qdit_jax.errors import UserError
from qdit_jax.files import PathLike, as_path, write_arrays


@dataclasses.dataclass(frozen=True)
class Result:
    """What was found for one module, as it is kept on disk.

    Attributes:
        codes: packed, by the kernels' names within the module.
        scales: learned step sizes, by the quantizers' names within the module.
        nearest, learned: relative squared output errors, on held-out items where there are any.
    """

    codes: dict[str, Any]
    scales: dict[str, Any]
    nearest: float
    learned: float


class Unfinished:
    """Finished modules of a run that may be stopped, one file each in a folder."""

    def __init__(self, folder: PathLike, settings: dict[str, Any]) -> None:
        self.folder, self.settings = as_path(folder), settings
        self.folder.mkdir(parents=True, exist_ok=True)

    def read(self, number: int) -> Result | None:
        """Returns what was found for a module, or None if it is not finished.

        Raises:
            UserError: if the file is unreadable, or was written with other settings.
        """
        path = self.folder / f"{number:04d}.npz"
        if not path.exists():
            return None
        try:
            with path.open("rb") as file, np.load(file) as data:
                found = {name: data[name] for name in data.files}
            saved = json.loads(str(found["settings"]))
            nearest, learned = map(float, found["errors"])
        except (OSError, KeyError, ValueError) as error:
            raise UserError(
                f"{path} is not an unfinished quantization ({error}); delete it."
            ) from error
        if (other := first_difference(saved, self.settings)) is not None:
            raise UserError(
                f"{self.folder} holds an unfinished quantization with other settings or another "
                f"checkpoint (its {other} is not the same); delete it to start over."
            )
        parts = {
            kind: {n.removeprefix(f"{kind}/"): x for n, x in found.items() if n.startswith(kind)}
            for kind in ("codes", "scales")
        }
        return Result(**parts, nearest=nearest, learned=learned)

    def write(self, number: int, result: Result) -> None:
        """Writes a finished module; a reader never sees half of it."""
        named = flatten_dict({"codes": result.codes, "scales": result.scales}, sep="/")
        errors = np.array([result.nearest, result.learned])
        told = {"settings": json.dumps(self.settings, sort_keys=True), "errors": errors}
        write_arrays(self.folder / f"{number:04d}.npz", {**named, **told})
