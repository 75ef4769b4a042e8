"""Reads safetensors files: a JSON header, then the raw values of every tensor."""

from __future__ import annotations

import math
import struct
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qdit_convert.json_file import parse_json
from qdit_convert.tensors import FileSpan, StoredTensor, bfloat16
from qdit_jax.errors import UserError

MAX_HEADER = 100_000_000
DTYPES = {
    "F64": "f8",
    "F32": "f4",
    "F16": "f2",
    "I64": "i8",
    "I32": "i4",
    "I16": "i2",
    "I8": "i1",
    "U64": "u8",
    "U32": "u4",
    "U16": "u2",
    "U8": "u1",
    "BOOL": "?",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "c8",
}


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of a safetensors file by name.

    Raises:
        UserError: if the header is absurd, or its offsets overlap, leave gaps, or miss the file.
    """
    header, start = _header(path)
    header.pop("__metadata__", None)
    data_size = path.stat().st_size - start
    found = {name: _entry(name, entry) for name, entry in header.items()}
    _check_layout(found, data_size)
    return {
        name: StoredTensor(shape, dtype, partial(_read, path, start + begin, shape, dtype))
        for name, (dtype, shape, begin, _) in found.items()
    }


def read_file_metadata(path: Path) -> dict[str, str]:
    """Returns what the header of a safetensors file says beside its tensors; strings by name."""
    said = _header(path)[0].get("__metadata__")
    return dict(said) if isinstance(said, dict) else {}


def _header(path: Path) -> tuple[dict[str, Any], int]:
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        if len(first) < 8:
            raise UserError(f"the file has {size} bytes, too few for a safetensors header.")
        (length,) = struct.unpack("<Q", first)
        if length > MAX_HEADER:
            raise UserError(
                f"its safetensors header claims {length:,} bytes, which is absurd; this is another "
                "kind of file, or a damaged one."
            )
        if length > size - 8:
            raise UserError(
                f"the file ends early: its header has {length:,} bytes, the whole file {size:,}."
            )
        text = file.read(length)
    return parse_json(text, "its safetensors header"), 8 + length


def _entry(name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Returns dtype, shape, begin and end of a tensor, checked against each other."""
    try:
        code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sizes = (begin, end, *shape)
    except (TypeError, KeyError, ValueError):
        raise UserError(f"the header's entry {name!r} is malformed; the file is damaged.") from None
    if any(type(n) is not int or not 0 <= n < 2**63 for n in sizes):
        raise UserError(f"the header's entry {name!r} has an impossible size or offset.")
    dtype = _dtype(name, code)
    needed = math.prod(shape) * dtype.itemsize
    if end - begin != needed:
        raise UserError(
            f"{name!r} of shape {shape} needs {needed} bytes, but its offsets span {end - begin}."
        )
    return dtype, tuple(shape), begin, end


def _dtype(name: str, code: object) -> np.dtype:
    if code == "BF16":
        return bfloat16()
    if not isinstance(code, str) or code not in DTYPES:
        raise UserError(f"{name!r} has the dtype {str(code)[:40]!r}, which convert does not know.")
    if code.startswith("F8"):
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, DTYPES[code]))
    return np.dtype(DTYPES[code]).newbyteorder("<")


def _check_layout(found: dict[str, tuple], data_size: int) -> None:
    """Checks that the tensors cover the data exactly once."""
    position, before = 0, ""
    for name, (_, _, begin, end) in sorted(found.items(), key=lambda item: item[1][2:4]):
        if begin < position:
            raise UserError(f"the tensors {before!r} and {name!r} overlap; the file is damaged.")
        if begin > position:
            raise UserError(f"{begin - position} bytes before {name!r} belong to no tensor.")
        position, before = end, name
    if position > data_size:
        raise UserError(
            f"the file ends early: its header promises {position:,} bytes of values, "
            f"there are {data_size:,}."
        )
    if position < data_size:
        raise UserError(f"{data_size - position} bytes at the end belong to no tensor.")


def _read(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    data = FileSpan(path, offset, math.prod(shape) * dtype.itemsize)
    return data.read(0, data.nbytes).view(dtype).reshape(shape)
