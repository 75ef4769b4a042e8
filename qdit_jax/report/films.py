"""One clip as a film: frames as they are, without a grid around them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from qdit_jax.files import PathLike, as_path, replaced_file
from qdit_jax.report.clips import write_mp4


class FilmFacts(NamedTuple):
    """What a film's file says: frames, frames per second, and rows and columns."""

    frames: int
    fps: float
    size: tuple[int, int]


def save_film(path: PathLike, clip: UInt8[np.ndarray, "T H W C"], fps: float | int) -> None:
    """Writes a clip as `.mp4` (H.264); sides are cut to even numbers, gray is repeated to three channels.

    Raises:
        UserError: if `path` holds anything but a clip from here.
    """
    frames = np.broadcast_to(clip, (*clip.shape[:3], 3))
    with replaced_file(path, "picture") as temporary:
        write_mp4(temporary, list(frames), fps)


def film_facts(path: PathLike) -> FilmFacts:
    """Returns what a film is, its frames counted.

    Raises:
        OSError, ValueError, RuntimeError: if it cannot be read.
    """
    import imageio.v2 as imageio

    reader: Any = imageio.get_reader(as_path(path), format="FFMPEG")
    with reader:
        meta = reader.get_meta_data()
        frames = sum(1 for _ in reader)
    columns, rows = meta["size"]
    return FilmFacts(frames, float(meta["fps"]), (int(rows), int(columns)))
