"""The real digits that the demo model and its feature network are trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def load_digits(path: str | None, size: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Returns `(images [N, size, size, 1] float32 in [-1, 1], labels [N] int32)`, as `read_digits`."""
    images, labels = read_digits(path)
    kind = Image.Resampling.BOX if images.shape[1] > size else Image.Resampling.BICUBIC
    scaled = [np.asarray(Image.fromarray(image).resize((size, size), kind)) for image in images]
    return np.stack(scaled)[..., None].astype(np.float32) / 127.5 - 1, labels


def read_digits(path: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns `(images [N, side, side] uint8, labels [N] int32)`.

    `path` is an `.npz` with `images` uint8 `[N, 28, 28]` and `labels` (MNIST's test split).
    Without it, scikit-learn's bundled 8x8 digits are used.
    """
    if path is None:
        from sklearn.datasets import load_digits as bundled_digits

        digits = bundled_digits()
        return np.uint8(digits.images * (255 / 16)), digits.target.astype(np.int32)
    if not Path(path).exists():
        raise FileNotFoundError(f"--data {path} does not exist; leave it out for the 8x8 digits.")
    with np.load(path) as data:
        return data["images"], data["labels"].astype(np.int32)
