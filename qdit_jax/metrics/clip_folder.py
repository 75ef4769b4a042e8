"""A folder of clips as a set of videos: `.gif`, `.mp4`, and `.npz` with `arr_0`, in the order of their names.

Dimensions: N clips, B clips of a batch, T frames, H and W rows and columns, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageSequence

from qdit_jax.files import AnyPath, PathLike, as_path

SUFFIXES = (".gif", ".mp4", ".npz")


def clip_files(folder: PathLike) -> list[AnyPath]:
    """Returns the clips in a folder, sorted by name.

    Raises:
        ValueError: if there is none.
    """
    folder = as_path(folder)
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    if not found:
        raise ValueError(f"{folder} holds no clip; clips end with {', '.join(SUFFIXES)}.")
    return found


def read_clip(path: AnyPath) -> UInt8[np.ndarray, "N T H W C"]:
    """Returns the clip in a file, N = 1; an `.npz` may hold several.

    Raises:
        ValueError: if it cannot be read, or is no clip of uint8.
    """
    readers = {".gif": read_gif, ".mp4": read_mp4, ".npz": read_npz}
    try:
        clips = readers[path.suffix.lower()](path)
    except ImportError:
        raise ValueError(
            f"{path}: an .mp4 needs imageio with ffmpeg: pip install 'qdit-jax[video]'; or give clips "
            "as .gif or .npz."
        ) from None
    except (OSError, KeyError, RuntimeError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as a clip: {error}.") from error
    clips = clips if clips.ndim == 5 else clips[None]
    if clips.dtype != np.uint8 or clips.ndim != 5 or clips.shape[-1] not in (1, 3):
        raise ValueError(
            f"{path} holds {clips.dtype} {clips.shape[1:]}; a clip is uint8 [T, H, W, 1 or 3]."
        )
    return clips


def read_gif(path: AnyPath) -> UInt8[np.ndarray, "T H W 3"]:
    """Returns the frames of a `.gif`."""
    with path.open("rb") as file, Image.open(file) as image:
        return np.stack([np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(image)])


def read_mp4(path: AnyPath) -> UInt8[np.ndarray, "T H W 3"]:
    """Returns the frames of an `.mp4`; needs imageio with ffmpeg."""
    import imageio.v2 as imageio

    reader: Any = imageio.get_reader(path, format="FFMPEG")
    with reader:
        return np.stack([np.asarray(frame) for frame in reader])


def read_npz(path: AnyPath) -> np.ndarray:
    """Returns `arr_0` of an `.npz`."""
    with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
        return data["arr_0"]


def folder_shape(folder: PathLike) -> tuple[int, ...]:
    """Returns `(N, T, H, W, C)` of the clips in a folder, the shape that the first one has."""
    files = clip_files(folder)
    first = read_clip(files[0])
    others = [read_npz(p) for p in files[1:] if p.suffix.lower() == ".npz"]
    more = sum(len(a) if a.ndim == 5 else 1 for a in others)
    return (len(first) + more + len(files) - 1 - len(others), *first.shape[1:])


def folder_batches(folder: PathLike, batch_size: int) -> Iterator[UInt8[np.ndarray, "B T H W C"]]:
    """Yields the clips of a folder in order, one batch in memory at a time.

    Raises:
        ValueError: if one cannot be read or has another shape than the first.
    """
    held: list[np.ndarray] = []
    shape: tuple[int, ...] | None = None
    for path in clip_files(folder):
        for clip in read_clip(path):
            shape = clip.shape if shape is None else shape
            if clip.shape != shape:
                raise ValueError(
                    f"{path} is a clip of {clip.shape} and the first one is of {shape}; clips of one "
                    "number of frames and one size are compared: cut or resize them to the same."
                )
            held.append(clip)
            if len(held) == batch_size:
                yield np.stack(held)
                held = []
    if held:
        yield np.stack(held)
