"""Reads a `.pt` file of `torch.save` without torch: a stored zip of one pickle and raw storages."""

from __future__ import annotations

import struct
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from qdit_convert.pickle_reader import REMEDY, read_pickle
from qdit_convert.tensors import FileSpan, listing
from qdit_convert.torch_names import known_names, refuse_modules
from qdit_convert.torch_tensors import ElementType, Storage
from qdit_jax.errors import UserError

MAX_PICKLE = 1 << 28
ZIP_ERRORS = (
    zipfile.BadZipFile,
    struct.error,
    NotImplementedError,
    ValueError,
    OverflowError,
    EOFError,
    IndexError,
    OSError,
    RuntimeError,
)


def read_torch_zip(path: Path) -> object:
    """Returns the object that was saved: dictionaries, lists and `StoredTensor`s.

    Raises:
        UserError: if the file is damaged, or holds anything but tensors and plain settings.
    """
    entries = _entries(path)
    pickles = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if not pickles:
        raise UserError("this zip archive holds no data.pkl; torch.save did not write it.")
    if len(pickles) > 1:
        raise UserError(
            f"this zip archive holds several files of torch.save ({listing(sorted(pickles))}); "
            "convert cannot tell which is meant."
        )
    prefix = pickles[0].removesuffix("data.pkl")
    data = _small(entries[f"{prefix}data.pkl"])
    if f"{prefix}byteorder" in entries and _small(entries[f"{prefix}byteorder"]) == b"big":
        raise UserError(
            "the file was written on a big-endian machine, which convert does not read."
        )
    names = known_names()
    refuse_modules(data, names)
    return read_pickle(data, names, _Storages(entries, prefix).persistent)


class _Storages:
    """Turns the persistent ids of the pickle into storages of the zip."""

    def __init__(self, entries: dict[str, FileSpan], prefix: str) -> None:
        self.entries, self.prefix = entries, prefix
        self.known: dict[tuple[str, str], Storage] = {}

    def persistent(self, identity: Sequence[Any]) -> Storage:
        kind, storage_type, key, _, count = identity  # the device, such as cuda:0, does not matter
        element = getattr(storage_type, "value", None)
        if kind != "storage" or not isinstance(element, ElementType):
            raise UserError("the pickle inside refers to something that is not a storage.")
        if type(count) is not int or not isinstance(key, str):
            raise UserError("the pickle inside describes a storage without a size.")
        if (key, element.name) not in self.known:
            self.known[key, element.name] = self._storage(key, element, count)
        return self.known[key, element.name]

    def _storage(self, key: str, element: ElementType, count: int) -> Storage:
        name = f"{self.prefix}data/{key}"
        if name not in self.entries:
            raise UserError(f"the storage {name} is missing from the file.")
        span, nbytes = self.entries[name], count * element.dtype.itemsize
        if count < 0 or nbytes > span.nbytes:
            raise UserError(
                f"the storage {name} should have {nbytes} bytes, but has {span.nbytes}."
            )
        return Storage(span.path, element, count, lambda: span)


def _entries(path: Path) -> dict[str, FileSpan]:
    """Returns where each stored entry of the zip lies."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            _refuse_programs(archive.namelist())
            _refuse_repeats(archive.namelist())
            return {info.filename: _span(path, file, info, size) for info in archive.infolist()}
    except UserError:
        raise
    except zipfile.BadZipFile as error:
        if "not a zip file" in str(error):
            raise UserError(
                f"the zip archive ends early (it has {size:,} bytes); fetch the file again."
            ) from None
        raise UserError("the zip archive is damaged; fetch the file again.") from None
    except ZIP_ERRORS:
        raise UserError("the zip archive is damaged; fetch the file again.") from None


def _refuse_programs(names: list[str]) -> None:
    if any(name.endswith("/constants.pkl") for name in names):
        raise UserError(f"this is a TorchScript program, not a file of weights; {REMEDY}.")


def _refuse_repeats(names: list[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(
            f"the zip archive holds {listing(twice)} more than once; fetch the file again, or save it "
            "anew where it came from."
        )


def _span(path: Path, file: IO[bytes], info: zipfile.ZipInfo, size: int) -> FileSpan:
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise UserError(
            f"the entry {info.filename} is compressed or encrypted, which torch.save never does."
        )
    file.seek(info.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise UserError("the zip archive is damaged; fetch the file again.")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    offset = info.header_offset + 30 + name_length + extra_length
    if offset + info.file_size > size:
        raise UserError(
            f"the zip archive ends early: {info.filename} needs {offset + info.file_size:,} bytes, "
            f"the file has {size:,}."
        )
    # torch writes 0 where checksums are switched off.
    return FileSpan(path, offset, info.file_size, info.CRC or None)


def _small(span: FileSpan) -> bytes:
    if span.nbytes > MAX_PICKLE:
        raise UserError(
            f"its description of the tensors has {span.nbytes:,} bytes, which is absurd."
        )
    return span.read(0, span.nbytes).tobytes()
