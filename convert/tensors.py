"""The result of a reader: named tensors that are read from the file one at a time."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qdit_jax.errors import UserError

if TYPE_CHECKING:
    from qdit_convert.kernels import StoredKernel

CHUNK = 1 << 22


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file: its shape and dtype at once, its values when `read` is called.

    Attributes:
        problem: what it is if it is not an array of numbers, such as a sparse tensor.
        quantized: the weight as the file stores it, if that is quantized; `shape` is that of the
            weight then, and it has no plain values to read.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    problem: str = ""
    quantized: StoredKernel | None = None

    @property
    def nbytes(self) -> int:
        if self.quantized is not None:
            return self.quantized.nbytes
        return math.prod(self.shape) * self.dtype.itemsize


def unreadable(shape: tuple[int, ...], dtype: np.dtype, problem: str) -> StoredTensor:
    """Returns a tensor whose values cannot be read: `problem` says what it is.

    Raises:
        UserError: if `shape` is not a shape.
    """
    if any(type(n) is not int or n < 0 for n in shape):
        raise UserError("the pickle inside describes a tensor with an impossible size.")

    def read() -> np.ndarray:
        raise UserError(f"a tensor cannot be read: it is {problem}.")

    return StoredTensor(shape, dtype, read, problem)


@dataclass(frozen=True)
class StateDict:
    """The named tensors of one network.

    Attributes:
        label: what error messages call the source.
        tensors: by the names of the file, without wrappers.
        others: entries that are no tensors: their name and kind.
        weights: the wrapper that the tensors came from (`"ema"`, `"model"`, ...), or `"flat"`.
        hints: plain settings that lay beside the weights (a training script's arguments).
        raw: whether the weights are averaged ones, and the file holds the raw ones too.
        notes: what was done to the names and what was left out, to be said to the user.
    """

    label: str
    tensors: Mapping[str, StoredTensor]
    others: Mapping[str, str] = field(default_factory=dict)
    weights: str = "flat"
    hints: Mapping[str, object] = field(default_factory=dict)
    raw: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class FileSpan:
    """A run of bytes in a file, read with ordinary reads: a mapped file that shrinks would crash.

    `crc` is the checksum of the whole span, or None where the file has none.
    """

    path: Path
    offset: int
    nbytes: int
    crc: int | None = None
    verified: list[bool] = field(default_factory=list, compare=False)

    def read(self, first: int, count: int) -> np.ndarray:
        """Returns `count` bytes from byte `first` of the span as uint8.

        Raises:
            UserError: if the file is shorter than it was, or the checksum differs.
        """
        with self.path.open("rb") as file:
            if self.crc is not None and not self.verified and count < self.nbytes:
                self._verify(_checksum(file, self.offset, self.nbytes))
            file.seek(self.offset + first)
            data = np.fromfile(file, dtype=np.uint8, count=count)
        if data.size != count:
            raise UserError(f"{self.path.name} ended early while its tensors were being read.")
        if self.crc is not None and not self.verified:
            self._verify(zlib.crc32(data.data))
        return data

    def _verify(self, crc: int) -> None:
        if crc != self.crc:
            raise UserError(
                f"{self.path.name} is damaged: the checksum of the {self.nbytes} bytes from "
                f"{self.offset} on differs from the recorded one; fetch the file again."
            )
        self.verified.append(True)


def _checksum(file, offset: int, nbytes: int) -> int:
    file.seek(offset)
    crc = 0
    while nbytes > 0:
        chunk = file.read(min(CHUNK, nbytes))
        if not chunk:
            break
        crc = zlib.crc32(chunk, crc)
        nbytes -= len(chunk)
    return crc


def bfloat16() -> np.dtype:
    """Returns NumPy's bfloat16, which exists only once `ml_dtypes` is imported."""
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def is_floating(dtype: np.dtype) -> bool:
    """Returns whether convert takes weights of this dtype: 64, 32 or 16 bit floats, or bfloat16."""
    return dtype in (np.dtype("f8"), np.dtype("f4"), np.dtype("f2"), bfloat16())


def shape_text(shape: tuple[int, ...]) -> str:
    """Returns `[2, 3]` for `(2, 3)`."""
    return "[" + ", ".join(str(n) for n in shape) + "]"


def listing(names: list[str], limit: int = 5) -> str:
    """Returns the first `limit` names, and how many more there are."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


@contextmanager
def about(label: str | Path) -> Iterator[None]:
    """Puts `label` in front of the message of any `UserError` that is raised inside."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{label}: {error}") from None
