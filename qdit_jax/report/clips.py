"""Videos as files, and as rows of frames where pictures stand.

Videos are `[N, T, H, W, C]` in `[-1, 1]`, C = 1 (gray) or 3 (RGB), or already uint8.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from qdit_jax.errors import UserError
from qdit_jax.files import GENERATOR, PathLike, replaced_file
from qdit_jax.report.media import image_grid, to_uint8
from qdit_jax.types import AnyArray

CLIPS = (".gif", ".mp4")
FPS = 8  # frames per second, where nothing says otherwise
NUM_FRAMES = 8  # in a row of frames


def is_video(images: AnyArray) -> bool:
    """Returns whether samples are videos `[N, T, H, W, C]`, not images `[N, H, W, C]`."""
    return images.ndim == 5


def frame_numbers(num_frames: int, most: int = NUM_FRAMES) -> list[int]:
    """Returns at most `most` numbers of frames, evenly spread, the first and the last among them."""
    count = min(num_frames, most)
    return np.unique(np.linspace(0, num_frames - 1, count).round().astype(int)).tolist()


def frame_rows(
    videos: AnyArray, labels: Sequence[str] | None = None
) -> tuple[UInt8[np.ndarray, "M H W C"], int, list[str] | None]:
    """Returns frames of videos as images, columns per row (one row per video), and their labels.

    A video's label stands over its first frame.
    """
    shown = frame_numbers(videos.shape[1])
    frames = to_uint8(videos)[:, shown]
    texts = None
    if labels is not None:
        texts = [text if i == 0 else f"frame {n}" for text in labels for i, n in enumerate(shown)]
    return frames.reshape(-1, *frames.shape[2:]), len(shown), texts


def check_clip(path: PathLike) -> None:
    """Raises `UserError` if a clip of that name needs a package that is not installed."""
    if str(path).endswith(".mp4"):
        try:
            import imageio.v3  # noqa: F401
            import imageio_ffmpeg  # noqa: F401
        except ImportError:
            raise UserError(
                f"{path}: an .mp4 needs imageio with ffmpeg: pip install 'qdit-jax[video]'; or give a "
                "name that ends with .gif or .npz."
            ) from None


def save_clip(
    path: PathLike,
    videos: AnyArray,
    *,
    fps: float | int = FPS,
    columns: int | None = None,
    labels: Sequence[str] | None = None,
    scale: int = 1,
) -> None:
    """Writes all videos side by side as one `.gif` or `.mp4`, each under its label.

    Raises:
        UserError: if `path` holds anything but a clip from here, or a package is not installed.
    """
    check_clip(path)
    videos = to_uint8(videos)
    pictures = [
        image_grid(videos[:, i], columns=columns, labels=labels, scale=scale)
        for i in range(videos.shape[1])
    ]
    with replaced_file(path, "picture") as temporary:
        if str(path).endswith(".gif"):
            first, *rest = pictures
            first.save(
                temporary,
                format="GIF",
                save_all=True,
                append_images=rest,
                duration=round(1000 / fps),
                loop=0,
                comment=GENERATOR.encode(),
            )
        else:
            write_mp4(temporary, pictures, fps)


def write_mp4(
    path: PathLike, pictures: Sequence[Image.Image | np.ndarray], fps: float | int
) -> None:
    """Writes pictures as a film in H.264; its sides are cut to even numbers, as that needs."""
    import imageio.v2 as imageio

    height, width = (side - side % 2 for side in np.asarray(pictures[0]).shape[:2])
    writer: Any = imageio.get_writer(  # its declared type lacks `append_data`
        os.fspath(path),
        format="FFMPEG",
        fps=fps,
        codec="libx264",
        macro_block_size=1,
        output_params=["-metadata", f"comment={GENERATOR}"],
    )
    with warnings.catch_warnings(), writer:
        # JAX warns of every fork; this one starts ffmpeg and runs nothing of this process.
        warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
        for picture in pictures:
            writer.append_data(np.asarray(picture)[:height, :width])
