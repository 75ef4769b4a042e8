"""Reads the format that torch wrote before 1.6, without torch: pickles in a row, then the storages."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from qdit_convert.pickle_reader import read_pickle
from qdit_convert.tensors import FileSpan
from qdit_convert.torch_names import known_names, refuse_modules
from qdit_convert.torch_tensors import ElementType, Storage
from qdit_jax.errors import UserError

MAGIC = 0x1950A86A20F9469CFC6C
VERSION = 1001


def read_torch_legacy(path: Path) -> object:
    """Returns the object that was saved: dictionaries, lists and `StoredTensor`s.

    Raises:
        UserError: if the file is damaged, or holds anything but tensors and plain settings.
    """
    storages = _Storages(path)
    with path.open("rb") as file:
        magic, version, system = (read_pickle(file, {}, _refuse) for _ in range(3))
        if magic != MAGIC or version != VERSION:
            raise UserError(f"this is version {version} of torch's old format; 1001 is known.")
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise UserError(
                "the file was written on a big-endian machine, which convert does not read."
            )
        start, names = file.tell(), known_names()
        refuse_modules(file, names)
        file.seek(start)
        saved = read_pickle(file, names, storages.persistent)
        storages.place(read_pickle(file, {}, _refuse), file)
    return saved


def _refuse(_: object) -> NoReturn:
    raise UserError("the pickle inside refers to something that is not a storage.")


@dataclass
class _Storages:
    """Turns the persistent ids of the pickle into storages, which lie behind it in the file.

    `sizes` are the bytes of an element and of the whole, `spans` where it lies, by the storage's key.
    """

    path: Path
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    spans: dict[str, FileSpan] = field(default_factory=dict)

    def persistent(self, identity: Sequence[Any]) -> Storage:
        kind, storage_type, key, _, count, view = identity
        element = getattr(storage_type, "value", None)
        if kind != "storage" or not isinstance(element, ElementType):
            raise UserError("the pickle inside refers to something that is not a storage.")
        _, first, size = (None, 0, count) if view is None else view
        if any(type(n) is not int or n < 0 for n in (count, first, size)):
            raise UserError("the pickle inside describes a storage without a size.")
        itemsize = element.dtype.itemsize
        _, nbytes = self.sizes.setdefault(str(key), (itemsize, count * itemsize))
        if (first + size) * itemsize > nbytes:
            raise UserError(f"the storage {key} has {nbytes} bytes, too few for its tensors.")
        return Storage(self.path, element, size, partial(self.spans.__getitem__, str(key)), first)

    def place(self, keys: object, file: BinaryIO) -> None:
        """Finds the storages, which stand one after the other in the order of `keys`."""
        if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(self.sizes):
            raise UserError(
                "the file does not hold each storage of its tensors once; it is damaged."
            )
        end = self.path.stat().st_size
        for key in map(str, keys):
            header, (itemsize, nbytes) = file.read(8), self.sizes[key]
            if len(header) < 8 or file.tell() + nbytes > end:
                raise UserError(f"the file ends early (it has {end:,} bytes); fetch it again.")
            (count,) = struct.unpack("<q", header)
            if count * itemsize != nbytes:
                raise UserError(
                    f"the storage {key} should have {nbytes} bytes, but has {count * itemsize}."
                )
            self.spans[key] = FileSpan(self.path, file.tell(), nbytes)
            file.seek(nbytes, 1)
