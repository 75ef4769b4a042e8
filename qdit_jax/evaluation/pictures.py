"""The first samples of an evaluation as pictures: differences, captions, and videos that move."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from qdit_jax.evaluation.runs import Run
from qdit_jax.evaluation.store import first_samples
from qdit_jax.evaluation.trajectories import Contender
from qdit_jax.files import AnyPath
from qdit_jax.report import (
    frame_numbers,
    frame_rows,
    image_grid,
    is_video,
    save_clip,
    side_by_side,
)

NUM_SHOWN = 16
NUM_CAPTIONED = 10
NUM_VIDEOS = 4
MAX_GAIN = 16
MOST_DETAILED = 3  # models up to which the page shows differences and the ranges of single layers
SIDE, READABLE = 48, 128  # pixels of a small picture, and of one that a caption stands over
CLIP = "clips.gif"


def first_pictures(run: Run, contenders: Sequence[Contender]) -> list[np.ndarray] | None:
    """Returns the first samples of each contender, `[N, H, W, C]` or videos; None for latents."""
    found = [
        first_samples(run.folder, run.ranges, f"{i}/images", NUM_SHOWN)
        for i in range(len(contenders))
    ]
    shown = [images for images in found if images is not None]
    return shown if len(shown) == len(found) else None


def compared_pictures(
    run: Run, contenders: Sequence[Contender], prompts: Sequence[str] | None = None
) -> Image.Image | None:
    """Returns the first samples of each contender with differences; None for latents.

    A video is a row of frames. Images of `prompts` stand under them, a row for each prompt.
    """
    images = first_pictures(run, contenders)
    if images is None:
        return None
    columns: int | None = None
    if is_video(images[0]):
        columns = len(frame_numbers(images[0].shape[1]))
        images = [frame_rows(videos[:NUM_VIDEOS])[0] for videos in images]
    elif prompts is not None:
        return captioned(images, [contender.title for contender in contenders], prompts)
    groups = {contenders[0].title: images[0]}
    for contender, shown in zip(contenders[1:], images[1:], strict=True):
        groups[contender.title] = shown
        if len(images) > MOST_DETAILED:
            continue
        difference, gain = difference_images(images[0], shown)
        of = f" ({contender.title})" if len(images) > 2 else ""
        groups[f"difference x{gain}{of}"] = difference
    return side_by_side(groups, columns=columns, scale=scale_to(SIDE, images[0]))


def captioned(
    images: Sequence[np.ndarray], titles: Sequence[str], prompts: Sequence[str]
) -> Image.Image:
    """Returns a row for each prompt, a column for each model: the prompt stands over the first."""
    count = min(NUM_CAPTIONED, len(images[0]))
    rows = np.stack([shown[:count] for shown in images], axis=1)
    labels = [label for i in range(count) for label in (prompts[i % len(prompts)], *titles[1:])]
    scale = scale_to(READABLE, images[0])
    flat = rows.reshape(-1, *rows.shape[2:])
    return image_grid(flat, columns=len(titles), labels=labels, scale=scale)


def save_compared_clip(folder: AnyPath, run: Run, contenders: Sequence[Contender]) -> bytes | None:
    """Writes the first videos of each contender, side by side and moving, and returns the GIF.

    A row for each video, a column for each model. None, and nothing written, for images.
    """
    videos = first_pictures(run, contenders)
    if videos is None or not is_video(videos[0]):
        return None
    count = min(NUM_VIDEOS, len(videos[0]))
    rows = np.stack([shown[:count] for shown in videos], axis=1)
    titles = [contender.title for contender in contenders]
    save_clip(
        folder / CLIP,
        rows.reshape(-1, *rows.shape[2:]),
        columns=len(titles),
        labels=titles * count,
        scale=scale_to(READABLE, videos[0]),
    )
    return (folder / CLIP).read_bytes()


def scale_to(side: int, images: np.ndarray) -> int:
    """Returns how often a pixel is repeated, that rows are about `side` pixels or more."""
    return max(1, side // images.shape[-3])


def difference_images(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, int]:
    """Returns absolute differences times a power of two that just uses the range, and that gain."""
    difference = np.abs(a.astype(int) - b)
    gain = 1
    while gain < MAX_GAIN and 2 * gain * np.quantile(difference, 0.999) <= 255:
        gain *= 2
    return np.minimum(difference * gain, 255).astype(np.uint8), gain
