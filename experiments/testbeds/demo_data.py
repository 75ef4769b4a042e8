"""The real digits that the demo model and its feature network are trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def load_digits(path: str | None, size: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Returns `(images [N, size, size, 1] float32 in [-1, 1], labels [N] int32)`.

    `path` is an `.npz` with `images` uint8 `[N, 28, 28]` and `labels` (MNIST's test split).
    Without it, scikit-learn's bundled 8x8 digits are used, enlarged to `size`.
    """
    if path is not None:
        if not Path(path).exists():
            raise FileNotFoundError(
                f"--data {path} does not exist; leave it out for the 8x8 digits."
            )
        with np.load(path) as data:
            images, labels = data["images"], data["labels"]
    else:
        from sklearn.datasets import load_digits as bundled_digits

        digits = bundled_digits()
        images, labels = np.uint8(digits.images * (255 / 16)), digits.target
    kind = Image.Resampling.BOX if images.shape[1] > size else Image.Resampling.BICUBIC
    scaled = [np.asarray(Image.fromarray(image).resize((size, size), kind)) for image in images]
    return np.stack(scaled)[..., None].astype(np.float32) / 127.5 - 1, labels.astype(np.int32)
