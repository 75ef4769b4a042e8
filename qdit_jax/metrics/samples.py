"""Images in the `.npz` that evaluators of diffusion models share (`arr_0`, uint8, NHWC), or videos (NTHWC).

Dimensions: N images, B images of a batch, H and W rows and columns, C channels.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt8

from qdit_jax.files import PathLike, as_path, is_remote
from qdit_jax.metrics.clip_folder import folder_batches, folder_shape

MEMBER = "arr_0.npy"
Stream = Any  # what zipfile opens has no public type
# What the standard library raises for one damaged byte or another.
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    KeyError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


def image_shape(path: PathLike) -> tuple[int, ...]:
    """Returns `(N, H, W, C)` of the images in an `.npz`, `(N, T, H, W, C)` of videos, reading none.

    Of a folder of clips it reads the first one.

    Raises:
        ValueError: one sentence if the file has no `arr_0`, or it is not uint8 of such a shape.
    """
    if as_path(path).is_dir():
        return folder_shape(path)
    with open_archive(path) as archive, open_images(archive, path) as stream:
        return read_header(stream, path)


def image_batches(path: PathLike, batch_size: int) -> Iterator[UInt8[np.ndarray, "B *shape C"]]:
    """Yields the images of an `.npz`, or of a folder of clips, in order, one batch in memory at a time.

    Raises:
        ValueError: as `image_shape`, or if the file is damaged or its values lie in [0, 1].
    """
    is_folder = as_path(path).is_dir()
    darkest = True
    for batch in folder_batches(path, batch_size) if is_folder else stored(path, batch_size):
        darkest = darkest and batch.max() <= 1
        yield batch
    if darkest:
        what = "the clips" if is_folder else "arr_0"
        raise ValueError(f"{path}: no value of {what} exceeds 1; images must span 0 to 255.")


def stored(path: PathLike, batch_size: int) -> Iterator[UInt8[np.ndarray, "B *shape C"]]:
    """Yields the images of an `.npz` in order."""
    with open_archive(path) as archive, open_images(archive, path) as stream:
        count, *shape = read_header(stream, path)
        for start in range(0, count, batch_size):
            size = min(batch_size, count - start)
            yield read_batch(stream, (size, *shape), path)


def open_archive(path: PathLike) -> zipfile.ZipFile:
    """Returns the opened `.npz`; raises `ValueError` if it is none."""
    path = as_path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file.")
    try:
        return zipfile.ZipFile(path.open("rb") if is_remote(path) else path)
    except DAMAGE:
        raise ValueError(f"{path} is not an .npz file, or it is damaged.") from None


def open_images(archive: zipfile.ZipFile, path: PathLike) -> Stream:
    """Returns the stream of `arr_0`; raises `ValueError` naming what is there instead."""
    names = archive.namelist()
    if MEMBER not in names:
        found = ", ".join(name.removesuffix(".npy") for name in names) or "nothing"
        raise ValueError(f"{path} has no arr_0 with images; it holds {found}.")
    try:
        return archive.open(MEMBER)
    except DAMAGE:
        raise ValueError(f"{path}: arr_0 is damaged.") from None


def read_header(stream: Stream, path: PathLike) -> tuple[int, ...]:
    """Returns the checked shape of the array whose data follow in `stream`."""
    try:
        version = np.lib.format.read_magic(stream)
        reader = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
        shape, fortran_order, dtype = reader[version[0]](stream)
    except DAMAGE:
        raise ValueError(f"{path}: arr_0 is damaged.") from None
    check_kind(shape, dtype, path)
    if fortran_order:
        raise ValueError(f"{path}: arr_0 is in Fortran order; save it with np.ascontiguousarray.")
    return tuple(int(size) for size in shape)


def check_kind(shape: tuple[int, ...], dtype: np.dtype, path: PathLike) -> None:
    """Raises `ValueError` unless shape and dtype are those of uint8 NHWC images, or NTHWC videos."""
    if dtype != np.uint8:
        raise ValueError(
            f"{path}: arr_0 is {dtype}; images must be uint8 from 0 to 255 "
            "(from [-1, 1]: np.clip(127.5 * x + 128, 0, 255).astype(np.uint8))."
        )
    if len(shape) == 4 and shape[1] in (1, 3) and shape[3] not in (1, 3):
        raise ValueError(f"{path}: arr_0 has shape {shape}, channels first; transpose it to NHWC.")
    if len(shape) not in (4, 5) or shape[-1] not in (1, 3):
        raise ValueError(
            f"{path}: arr_0 has shape {shape}; images must be [N, H, W, 1 or 3], videos "
            "[N, T, H, W, 1 or 3]."
        )
    if 0 in shape:
        raise ValueError(f"{path}: arr_0 has shape {shape}: there is no image in it.")


def read_batch(stream: Stream, shape: tuple[int, ...], path: PathLike) -> np.ndarray:
    """Returns the next `shape` uint8 values of the stream."""
    size = math.prod(shape)
    try:
        data = stream.read(size)
    except DAMAGE:
        data = b""
    if len(data) != size:
        raise ValueError(f"{path}: arr_0 is truncated or damaged.")
    return np.frombuffer(data, np.uint8).reshape(shape)
