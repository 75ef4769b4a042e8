"""Archives of arrays (`.npz`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qdit_jax.files.paths import PathLike
from qdit_jax.files.replacing import replaced_file


def write_arrays(
    path: PathLike, arrays: Mapping[str, Any], kind: str | None = None, *, compressed: bool = True
) -> None:
    """Writes arrays under their names to an `.npz` beside `path` and renames it.

    Args:
        kind: see `replaced_file`.
        compressed: smaller, but slower to write and to read; pictures' noise hardly shrinks.
    """
    import numpy as np  # here, as the command line's help takes this room but not NumPy

    write = np.savez_compressed if compressed else np.savez
    with replaced_file(path, kind) as temporary, open(temporary, "wb") as file:
        write(file, **arrays)
