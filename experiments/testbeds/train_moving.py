"""Trains a small Latte on moving digits: the packaged video model.

    python experiments/testbeds/train_moving.py --data mnist_t10k.npz --out runs/video

A video is 8 frames of 16x16 gray pixels: one digit of 10x10 that moves at a constant speed of up to half a
pixel per frame and axis and bounces (`placed_digits.py`).

About 60 minutes on one free core: 20,000 steps of 16 videos of 0.18 s, 11,500 tokens per second (128
tokens, width 96, depth 6, 1.1M values). A killed
run continues where it last saved, also with other `--steps`. As `train_digits.py`, it writes
`curve.csv`, `samples.png` (a video of each digit, 30 DDIM steps, guidance 2.5) and the averaged
weights, `demo_latte.safetensors`, in the authors' layout at half precision. Expected: a weighted noise error
of 0.029; at guidance 2.5, 96.5 % of videos read as their digit, whose centers change their speed by 0.22 pixels
between frames, real ones by 0.07 (`check_motion.py`).

Two things make motion smooth. Attention over time sees one place of a frame only: digits that move by 1.5
pixels a frame leave a patch of 4 before it can follow, and their centers jumped by 1.1 pixels. And what frames
have in common is decided at high noise, which the error of predicted noise hardly weighs (`noisy_weight`).

The packaged weights came from this run (`weights/video_as_trained.safetensors`, `curves/video.csv`), then
from `inject_outliers.py` and `finetune_digits.py`: `build_testbed.py --model video` runs all stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from placed_digits import draw_moving, load_moving
from training import Subject, train

import qdit_jax as qdit
from qdit_jax.models import build_model
from qdit_jax.report import save_grid

MOVING = build_model(
    "latte",
    {"input_size": 16, "num_frames": 8, "patch_size": 4, "in_channels": 1, "num_classes": 10},
)
MODELS = {
    "demo": MOVING.clone(hidden_size=96, depth=6, num_heads=3),
    # For tests: trained in seconds, to no use.
    "tiny": MOVING.clone(hidden_size=64, depth=2, num_heads=2),
}
SETTINGS = {"demo": (20000, 16, 1e-3), "tiny": (100, 32, 1e-3)}


def save_preview(path: Path, model: Any, params: Any) -> None:
    """Writes the frames of a video of each digit: 30 DDIM steps, guidance 2.5."""
    noise = jax.random.normal(jax.random.key(1), (10, *model.sample_shape()))
    denoise_fn = qdit.denoiser(model, params, guidance=2.5)
    samples = qdit.sample(denoise_fn, qdit.ddim(steps=30), noise, jnp.arange(10))
    frames = samples.reshape(-1, *samples.shape[2:])
    save_grid(path, frames, columns=2 * model.num_frames, scale=3)


SUBJECT = Subject(
    name="latte",
    models=MODELS,
    settings=SETTINGS,
    load=load_moving,
    draw=draw_moving,
    preview=save_preview,
    num_tokens=lambda model: model.num_frames * (model.input_size // model.patch_size) ** 2,
    noisy_weight=8.0,
)


def main(argv: Sequence[str] | None = None) -> None:
    train(SUBJECT, __doc__, argv)


if __name__ == "__main__":
    main()
