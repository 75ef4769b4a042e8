"""Trains a small Latte on moving digits: the packaged video model.

python experiments/testbeds/train_moving.py --data mnist_t10k.npz --out runs/video
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
from qdit_jax.models.latte import Latte
from qdit_jax.report import save_grid

MOVING = Latte(input_size=16, num_frames=8, patch_size=4, in_channels=1, num_classes=10)
MODELS = {
    "demo": MOVING.clone(hidden_size=96, depth=6, num_heads=3),
    # For tests: trained in seconds, to no use.
    "tiny": MOVING.clone(hidden_size=64, depth=2, num_heads=2),
}
SETTINGS = {"demo": (6000, 16, 1e-3), "tiny": (100, 32, 1e-3)}


def save_preview(path: Path, model: Latte, params: Any) -> None:
    """Writes the frames of a video of each digit: 30 DDIM steps, guidance 1.5."""
    noise = jax.random.normal(jax.random.key(1), (10, *model.sample_shape()))
    denoise_fn = qdit.denoiser(model, params, guidance=1.5)
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
)


def main(argv: Sequence[str] | None = None) -> None:
    train(SUBJECT, __doc__, argv)


if __name__ == "__main__":
    main()
