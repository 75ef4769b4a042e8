"""Pictures and sample archives, written so that a reader never sees half a file.

Images are `[B, H, W, C]` in `[-1, 1]`, C = 1 (gray) or 3 (RGB), or already uint8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from qdit_jax.files import GENERATOR, PathLike, replaced_file
from qdit_jax.types import AnyArray

BACKGROUND, INK = (255, 255, 255), (30, 30, 30)
GAP = 2  # pixels between cells
SMALLEST_FONT = 8


def to_uint8(images: AnyArray) -> UInt8[np.ndarray, "*B H W C"]:
    """Returns images of `[-1, 1]` as 0 to 255, by the published rule.

    `127.5 x + 128`, clamped and truncated; not-a-number becomes 0.  uint8 stays as it is.
    """
    images = np.asarray(images)
    if images.dtype == np.uint8:
        return images
    scaled = np.float32(127.5) * images.astype(np.float32) + np.float32(128)
    return np.clip(np.nan_to_num(scaled, nan=0.0), 0, 255).astype(np.uint8)


def image_grid(
    images: AnyArray,
    *,
    columns: int | None = None,
    labels: Sequence[str] | None = None,
    scale: int = 1,
) -> Image.Image:
    """Returns one RGB picture of all images, row by row, each under its label if there are labels.

    `columns` is by default the nearest to a square; `scale` repeats every pixel.

    Raises:
        ValueError: if there is no image, or there is not one label per image.
    """
    images = _checked(images)
    num_images, height, width = images.shape[:3]
    if labels is not None and len(labels) != num_images:
        raise ValueError(f"{len(labels)} labels for {num_images} images; give one per image.")
    if (columns is not None and columns < 1) or scale < 1:
        raise ValueError(f"columns={columns}, scale={scale}: use positive whole numbers.")
    columns = min(columns or int(np.ceil(np.sqrt(num_images))), num_images)
    rows = -(-num_images // columns)
    font_size = int(np.clip(height * scale // 8, 10, 20))
    strip = 0 if labels is None else font_size + 4
    cell = (width * scale + GAP, height * scale + strip + GAP)
    picture = Image.new("RGB", (columns * cell[0] + GAP, rows * cell[1] + GAP), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for i, image in enumerate(images):
        left, top = GAP + i % columns * cell[0], GAP + i // columns * cell[1]
        if labels is not None:
            _write(draw, (left, top), str(labels[i]), width * scale, font_size)
        picture.paste(_enlarged(image, scale), (left, top + strip))
    return picture


def save_grid(
    path: PathLike,
    images: AnyArray,
    *,
    columns: int | None = None,
    labels: Sequence[str] | None = None,
    scale: int = 1,
) -> None:
    """Writes `image_grid` to `path`; the suffix names the format, such as `.png`."""
    save_picture(path, image_grid(images, columns=columns, labels=labels, scale=scale))


def side_by_side(
    groups: Mapping[str, AnyArray],
    *,
    columns: int | None = None,
    labels: Sequence[str] | None = None,
    scale: int = 1,
) -> Image.Image:
    """Returns one RGB picture of several grids next to each other, each under its title."""
    if not groups:
        raise ValueError("there is no group of images to show; give at least one title and images.")
    grids = [
        image_grid(images, columns=columns, labels=labels, scale=scale)
        for images in groups.values()
    ]
    strip, gap = 26, 12
    width = sum(grid.width for grid in grids) + gap * (len(grids) - 1)
    picture = Image.new("RGB", (width, strip + max(grid.height for grid in grids)), BACKGROUND)
    draw, left = ImageDraw.Draw(picture), 0
    for title, grid in zip(groups, grids, strict=True):
        _write(draw, (left + GAP, 4), title, grid.width - GAP, 16)
        picture.paste(grid, (left, strip))
        left += grid.width + gap
    return picture


def save_picture(path: PathLike, picture: Image.Image) -> None:
    """Writes a picture beside `path` and renames it, so marked that it may be replaced.

    Raises:
        UserError: if `path` holds anything but such a picture.
    """
    mark = PngImagePlugin.PngInfo()
    mark.add_text("Software", GENERATOR)
    with replaced_file(path, "picture") as temporary:
        picture.save(temporary, pnginfo=mark, comment=GENERATOR)  # a format takes what it knows


def _checked(images: AnyArray) -> np.ndarray:
    images = to_uint8(images)
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or not images.shape[0]:
        raise ValueError(
            f"images have shape {images.shape}; give at least one as [B, H, W, 1] or [B, H, W, 3]."
        )
    return images


def _enlarged(image: np.ndarray, scale: int) -> Image.Image:
    image = np.broadcast_to(image, (*image.shape[:2], 3))
    return Image.fromarray(np.ascontiguousarray(image.repeat(scale, 0).repeat(scale, 1)))


def _write(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, width: int, size: int
) -> None:
    """Draws `text` at `corner`, smaller or cut where it would leave `width`."""
    while size > SMALLEST_FONT and draw.textlength(text, ImageFont.load_default(size)) > width:
        size -= 1
    font = ImageFont.load_default(size)
    while len(text) > 1 and draw.textlength(text, font) > width:
        text = text[:-1]
    draw.text(corner, text, INK, font)
