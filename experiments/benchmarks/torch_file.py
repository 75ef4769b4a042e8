"""Writes `.pt` files as torch.save does, without torch and without holding more than one tensor.

For generated checkpoints and for tests; the layout is a stored zip of one pickle (protocol 2) and
one entry for every storage.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
    "complex64": "ComplexFloatStorage",
    "qint8": "QInt8Storage",
    "untyped": "storage.UntypedStorage",
}


@dataclass(frozen=True, eq=False)
class Storage:
    """The values of one storage: `chunks` makes the arrays that are written one after the other."""

    dtype: str
    count: int
    chunks: Callable[[], Iterable[np.ndarray]]


@dataclass(frozen=True, eq=False)
class Tensor:
    """A view of a storage; `offset` and `strides` count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    parameter: bool = False


@dataclass(frozen=True)
class Global:
    """A name that is mentioned and not called, such as `torch.float32`."""

    name: str


@dataclass(frozen=True)
class Object:
    """A call of a global, `name(*arguments)`, and the state that it is then given."""

    name: str
    arguments: tuple = ()
    state: Any = None


def tensor(array: np.ndarray) -> Tensor:
    """Returns `array` as a tensor with a storage of its own."""
    array = np.asarray(array, order="C")
    storage = Storage(array.dtype.name, array.size, lambda: [array])
    return Tensor(storage, 0, array.shape, contiguous_strides(array.shape))


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the strides of a row-major array, in elements."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def write_torch_file(path: Path, content: Any, device: str = "cpu") -> None:
    """Writes `content`: nested dicts, lists, tuples, numbers, strings, arrays, `Tensor`s, `Global`s, `Object`s."""
    pickle = _Pickle(device)
    data = pickle.dumps(content)
    name = Path(path).stem
    with Path(path).open("wb") as file:
        archive = _StoredZip(file)
        archive.add(f"{name}/data.pkl", [data])
        archive.add(f"{name}/byteorder", [b"little"])
        for index, storage in enumerate(pickle.storages):
            archive.add(f"{name}/data/{index}", (_raw(chunk) for chunk in storage.chunks()))
        archive.add(f"{name}/version", [b"3\n"])
        archive.close()


def write_old_torch_file(path: Path, content: Any, device: str = "cpu") -> None:
    """Writes `content` in the format from before torch 1.6: pickles in a row, then the storages."""
    pickle = _Pickle(device, id_tail=(None,))
    data = pickle.dumps(content)
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}
    with Path(path).open("wb") as file:
        for head in (0x1950A86A20F9469CFC6C, 1001, system):
            file.write(_Pickle(device).dumps(head))
        file.write(data)
        keys = [str(index) for index in range(len(pickle.storages))]
        file.write(_Pickle(device).dumps(keys))
        for storage in pickle.storages:
            file.write(struct.pack("<q", storage.count))
            for chunk in storage.chunks():
                file.write(_raw(chunk))


def _raw(chunk: np.ndarray) -> memoryview:
    return np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data


@dataclass
class _Pickle:
    """Writes the few pickle instructions that torch.save uses."""

    device: str
    storages: list[Storage] = field(default_factory=list)
    id_tail: tuple = ()  # what the older format writes at the end of a storage's identity

    def dumps(self, content: Any) -> bytes:
        out = io.BytesIO()
        out.write(b"\x80\x02")
        self.write(out, content)
        out.write(b".")
        return out.getvalue()

    def write(self, out: BinaryIO, value: Any) -> None:
        if isinstance(value, np.ndarray):
            value = tensor(value)
        if isinstance(value, Tensor):
            self.write(out, self.rebuilt(value))
        elif isinstance(value, Storage):
            self.write_storage(out, value)
        elif isinstance(value, Object):
            self.write_object(out, value)
        elif isinstance(value, Global):
            out.write(_global(value.name))
        elif isinstance(value, Mapping):
            out.write(b"}(")
            for key, item in value.items():
                self.write(out, key)
                self.write(out, item)
            out.write(b"u")
        elif isinstance(value, list):
            out.write(b"](")
            self.write_all(out, value)
            out.write(b"e")
        elif isinstance(value, tuple):
            out.write(b"(")
            self.write_all(out, value)
            out.write(b"t")
        else:
            out.write(_scalar(value))

    def write_all(self, out: BinaryIO, values: Iterable[Any]) -> None:
        for value in values:
            self.write(out, value)

    def write_object(self, out: BinaryIO, value: Object) -> None:
        out.write(_global(value.name))
        self.write(out, value.arguments)
        out.write(b"R")
        if value.state is not None:
            self.write(out, value.state)
            out.write(b"b")

    def write_storage(self, out: BinaryIO, storage: Storage) -> None:
        known = [id(s) for s in self.storages]
        if id(storage) not in known:
            self.storages.append(storage)
            known.append(id(storage))
        out.write(b"(" + _scalar("storage") + _global(f"torch.{STORAGES[storage.dtype]}"))
        key = str(known.index(id(storage)))
        for item in (key, self.device, storage.count, *self.id_tail):
            out.write(_scalar(item))
        out.write(b"tQ")

    def rebuilt(self, value: Tensor) -> Object:
        hooks = Object("collections.OrderedDict")
        view = (value.storage, value.offset, tuple(value.shape), tuple(value.strides), False, hooks)
        made = Object("torch._utils._rebuild_tensor_v2", view)
        if not value.parameter:
            return made
        return Object("torch._utils._rebuild_parameter", (made, True, hooks))


def _global(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def _scalar(value: Any) -> bytes:
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        packed = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(packed)]) + packed
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        text = value.encode()
        return b"X" + struct.pack("<I", len(text)) + text
    raise TypeError(f"cannot write a {type(value).__name__} into a torch file")


class _StoredZip:
    """A zip whose entries are stored, written in one pass; 64-bit sizes where they are needed.

    The sizes and checksums of an entry are filled in after its data, so that the data may stream.
    """

    ALIGNMENT = 64

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.entries: list[tuple[bytes, int, int, int]] = []

    def add(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        encoded, start = name.encode(), self.file.tell()
        padding = -(start + 30 + len(encoded) + 4) % self.ALIGNMENT
        self.file.write(self._local(encoded, 0, 0, padding))
        crc, size = 0, 0
        for chunk in chunks:
            crc = zlib.crc32(chunk, crc)
            size += len(chunk)
            self.file.write(chunk)
        end = self.file.tell()
        self.file.seek(start)
        self.file.write(self._local(encoded, crc, size, padding))
        self.file.seek(end)
        self.entries.append((encoded, start, crc, size))

    def _local(self, name: bytes, crc: int, size: int, padding: int) -> bytes:
        # torch pads with an extra field, so that storages begin at multiples of 64.
        size32 = min(size, 0xFFFFFFFF)
        head = struct.pack(
            "<IHHHHHIIIHH", 0x04034B50, 20, 0, 0, 0, 0, crc, size32, size32, len(name), 4 + padding
        )
        return head + name + struct.pack("<HH", 0x4246, padding) + b"Z" * padding

    def close(self) -> None:
        start = self.file.tell()
        for name, offset, crc, size in self.entries:
            self.file.write(self._central(name, offset, crc, size))
        length, count = self.file.tell() - start, len(self.entries)
        end = self.file.tell()
        self.file.write(
            struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, length, start)
        )
        self.file.write(struct.pack("<IIQI", 0x07064B50, 0, end, 1))
        self.file.write(
            struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
        )

    def _central(self, name: bytes, offset: int, crc: int, size: int) -> bytes:
        extra = struct.pack("<HHQQQ", 1, 24, size, size, offset)
        head = struct.pack(
            "<IHHHHHHIIIHHHHHII",
            *(0x02014B50, 45, 45, 0, 0, 0, 0, crc, 0xFFFFFFFF, 0xFFFFFFFF),
            *(len(name), len(extra), 0, 0, 0, 0, 0xFFFFFFFF),
        )
        return head + name + extra


def iter_chunks(count: int, size: int) -> Iterator[int]:
    """Yields the lengths of the chunks of at most `size` that make up `count`."""
    while count > 0:
        yield min(count, size)
        count -= size
