"""Reads a `.pt` file of `torch.save` without torch: a stored zip of one pickle and raw storages."""

from __future__ import annotations

import math
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qdit_convert.pickle_reader import (
    REMEDY,
    Name,
    Namespace,
    mentioned_names,
    new_dict,
    read_pickle,
)
from qdit_convert.tensors import FileSpan, StoredTensor, bfloat16
from qdit_jax.errors import UserError

MAX_PICKLE = 1 << 28
DTYPES = {
    "DoubleStorage": "f8",
    "FloatStorage": "f4",
    "HalfStorage": "f2",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
    "ComplexFloatStorage": "c8",
    "ComplexDoubleStorage": "c16",
}
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


@dataclass(frozen=True)
class Storage:
    """A typed run of numbers in the file, which several tensors may share."""

    span: FileSpan
    dtype: np.dtype
    count: int


@dataclass(frozen=True)
class StorageType:
    """The dtype that a storage's class stands for."""

    dtype: np.dtype


def read_torch_zip(path: Path) -> Any:
    """Returns the object that was saved: dictionaries, lists and `StoredTensor`s.

    Raises:
        UserError: if the file is damaged, or holds anything but tensors and plain settings.
    """
    entries = _entries(path)
    pickles = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if not pickles:
        raise UserError("this zip archive holds no data.pkl; torch.save did not write it.")
    prefix = min(pickles, key=len).removesuffix("data.pkl")
    data = _small(entries[f"{prefix}data.pkl"])
    if f"{prefix}byteorder" in entries and _small(entries[f"{prefix}byteorder"]) == b"big":
        raise UserError(
            "the file was written on a big-endian machine, which convert does not read."
        )
    _refuse_modules(data)
    return read_pickle(data, known_names(), _Storages(entries, prefix).persistent)


def known_names() -> dict[str, Name]:
    """Returns the globals that a file of weights may mention."""
    names = [
        Name("collections.OrderedDict", new_dict),
        Name("argparse.Namespace", Namespace),
        Name("torch._utils._rebuild_tensor_v2", rebuild_tensor),
        Name("torch._utils._rebuild_parameter", lambda tensor, *_: tensor),
        Name("torch.Size", tuple),
    ]
    for storage, code in DTYPES.items():
        dtype = bfloat16() if code == "bfloat16" else np.dtype(code)
        for module in ("torch", "torch.cuda"):
            names.append(Name(f"{module}.{storage}", StorageType(dtype)))
    return {name.name: name for name in names}


def rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> StoredTensor:
    """Returns the view of `storage` that torch would make: `offset` and `strides` in elements.

    Raises:
        UserError: if the view reaches outside the storage.
    """
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, Storage) or len(shape) != len(strides):
        raise UserError("the pickle inside describes a tensor without a storage.")
    if any(type(n) is not int or n < 0 for n in numbers):
        raise UserError("the pickle inside describes a tensor with an impossible size.")
    size = math.prod(shape)
    reach = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if size else 0
    if offset + reach > storage.count:
        raise UserError(
            f"a tensor reaches to element {offset + reach} of a storage of {storage.count}."
        )
    # A repeated element (stride 0) may be small in the file and enormous in memory.
    if size * storage.dtype.itemsize > max(storage.span.path.stat().st_size, 1 << 20):
        raise UserError("a tensor claims more bytes than the whole file has.")

    def read() -> np.ndarray:
        itemsize = storage.dtype.itemsize
        data = storage.span.read(offset * itemsize, reach * itemsize).view(storage.dtype)
        steps = tuple(s * itemsize for s in strides)
        return np.lib.stride_tricks.as_strided(data, tuple(shape), steps, writeable=False)

    return StoredTensor(tuple(shape), storage.dtype, read)


class _Storages:
    """Turns the persistent ids of the pickle into storages of the zip."""

    def __init__(self, entries: dict[str, FileSpan], prefix: str) -> None:
        self.entries, self.prefix = entries, prefix
        self.known: dict[tuple[str, Any], Storage] = {}

    def persistent(self, identity: Any) -> Storage:
        kind, storage_type, key, _, count = identity  # the device, such as cuda:0, does not matter
        if kind != "storage" or not isinstance(getattr(storage_type, "value", None), StorageType):
            raise UserError("the pickle inside refers to something that is no storage.")
        dtype = storage_type.value.dtype
        if type(count) is not int or not isinstance(key, str):
            raise UserError("the pickle inside describes a storage without a size.")
        if (key, dtype) not in self.known:
            self.known[key, dtype] = self._storage(key, dtype, count)
        return self.known[key, dtype]

    def _storage(self, key: str, dtype: np.dtype, count: int) -> Storage:
        name = f"{self.prefix}data/{key}"
        if name not in self.entries:
            raise UserError(f"the storage {name} is missing from the file.")
        span = self.entries[name]
        if count < 0 or count * dtype.itemsize > span.nbytes:
            raise UserError(
                f"the storage {name} should have {count * dtype.itemsize} bytes, "
                f"but has {span.nbytes}."
            )
        return Storage(span, dtype, count)


def _entries(path: Path) -> dict[str, FileSpan]:
    """Returns where each stored entry of the zip lies."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            _refuse_programs(archive.namelist())
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


def _span(path: Path, file: Any, info: zipfile.ZipInfo, size: int) -> FileSpan:
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


def _refuse_modules(data: bytes) -> None:
    """Refuses a whole pickled module, by the class that was pickled."""
    mentioned = mentioned_names(data)
    if not any(name.startswith("torch.nn.modules.") for name in mentioned):
        return
    known = known_names()
    first = next(name for name in mentioned if name not in known)
    raise UserError(
        f"this is a whole pickled object of class {first}, not a table of weights; convert runs no "
        f"code from a file ({REMEDY})."
    )
