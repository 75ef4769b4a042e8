"""Tables of measured blocks: JSON files of this package, a row per kind of device and shape.

`{device kind: [{"shape": {...}, "tiles": {...}, ...}]}`; the fields of both are those of a platform's dataclasses.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any, Generic, TypeVar

import jax

ShapeT = TypeVar("ShapeT")
TilesT = TypeVar("TilesT")


@functools.cache
def packaged(file: str) -> Any:
    """Returns what a file of this package holds, read once."""
    return json.loads(files("qdit_jax.kernels").joinpath(file).read_text())


@dataclasses.dataclass(frozen=True)
class Table(Generic[ShapeT, TilesT]):
    """A table of measured blocks.

    Attributes:
        file: in this package.
        backend: of JAX, whose devices it has rows of.
        shape_type, tiles_type: dataclasses, of what a row is for and what it says.
    """

    file: str
    backend: str
    shape_type: type[ShapeT]
    tiles_type: type[TilesT]

    def device(self) -> str | None:
        """Returns the kind of device that JAX runs on; None if it is not of this backend."""
        is_here = jax.default_backend() == self.backend
        return jax.devices()[0].device_kind if is_here else None

    def rows(self) -> Mapping[ShapeT, TilesT]:
        """Returns the rows of the device that JAX runs on."""
        device = self.device()
        return {} if device is None else self.rows_of(packaged(self.file), device)

    def forget(self) -> None:
        """Makes the next product read the table anew, after rows were added to it."""
        packaged.cache_clear()

    def rows_of(self, table: Mapping[str, Any], device: str) -> dict[ShapeT, TilesT]:
        """Returns `{shape: tiles}` of one kind of device in a table that was read.

        Raises:
            ValueError: if a row lacks a field, has an unknown one or one that is no whole number (or
                word); it names the file, the device, the row and the field.
        """
        found = {}
        for number, row in enumerate(table.get(device, [])):
            where = f"{self.file}, {device}, row {number}"
            shape, tiles = (
                made(kind, row.get(name) if isinstance(row, dict) else None, f"{where}, {name}")
                for name, kind in (("shape", self.shape_type), ("tiles", self.tiles_type))
            )
            found[shape] = tiles
        return found


def made(kind: Any, values: Any, where: str) -> Any:
    """Returns an object of a dataclass, made of the fields that a row has."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: it is {values!r}; give its fields.")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in values:
        if name not in fields:
            raise ValueError(f"{where}: {name!r} is not known; use {', '.join(fields)}.")
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise ValueError(f"{where}: {name!r} is missing.")
    for name, value in values.items():
        if isinstance(fields[name].default, str):
            is_right, word = isinstance(value, str), "a word"
        else:
            is_right, word = type(value) is int and value >= 0, "a whole number of 0 or more"
        if not is_right:
            raise ValueError(f"{where}: {name}={value!r} is not {word}.")
    return kind(**values)


def closest(
    table: Mapping[ShapeT, TilesT],
    num_rows: int,
    rows_fn: Callable[[ShapeT], int],
    allowed: Callable[[ShapeT, TilesT], bool],
) -> TilesT | None:
    """Returns the allowed tiles of the shape with the nearest number of rows.

    None if no shape has between half and twice as many: blocks of one number of rows say little about ten
    times as many.
    """
    near = [shape for shape, tiles in table.items() if allowed(shape, tiles)]
    if not near:
        return None
    found = min(near, key=lambda shape: (abs(rows_fn(shape) - num_rows), rows_fn(shape)))
    rows = rows_fn(found)
    return table[found] if rows <= 2 * num_rows and num_rows <= 2 * rows else None
