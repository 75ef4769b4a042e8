"""Trains a small class-conditional DiT on real digits: the packaged one, or one as wide as DiT-XL.

    python experiments/testbeds/train_digits.py --data mnist_t10k.npz --out runs/demo
    python experiments/testbeds/train_digits.py --model wide --data mnist_t10k.npz --out runs/wide

About 30 minutes each on 2 free cores, measured: `demo` (width 128, depth 6, 16 tokens, 1.9M values)
8,000 steps of 0.17 to 0.27 s, 7,700 to 11,900 tokens per second; `wide` (width 1152, 16 heads, depth
2, 4 tokens, 48M values) 2,400 steps of 0.75 to 0.80 s, 640 to 680 tokens per second. A killed run
continues where it last saved. Every `--save-every` steps it writes `samples.png` (50 DDIM steps,
guidance 1.5, labels 0 to 9) and every 100 a point of `curve.csv`; at the end `demo_dit.safetensors`
or `wide_dit.safetensors`, the averaged weights in the facebook layout at half precision. Expected:
samples that are plainly digits; a noise error of 0.021 for `demo` and 0.025 for `wide`.

A gradient of `wide` takes 1.38 s of one core, which is what its 114 GFLOP take at the 82 GFLOP/s
that a large product reaches there; Adam, clipping and averaging are 13% of a step (of `demo`, under
2%). The loop has nothing left to gain on CPU but fewer products.

The packaged weights came from this run (`weights/demo_as_trained.safetensors`, with its curve in
`curves/demo.csv`), then from `inject_outliers.py` and `finetune_digits.py`. `build_testbed.py` runs
all stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from demo_data import load_digits
from training import Subject, train

import qdit_jax as qdit
from qdit_jax.models import DiT
from qdit_jax.report import save_grid

DIGITS = DiT(input_size=16, in_channels=1, num_classes=10)
MODELS = {
    "demo": DIGITS.clone(patch_size=4, hidden_size=128, depth=6, num_heads=4),
    # The width and the heads of DiT-XL.
    "wide": DIGITS.clone(patch_size=8, hidden_size=1152, depth=2, num_heads=16),
    # For tests: trained in seconds, to no use.
    "tiny": DIGITS.clone(patch_size=8, hidden_size=64, depth=1, num_heads=2),
}
SETTINGS = {"demo": (8000, 128, 1e-3), "wide": (2400, 128, 3e-4), "tiny": (100, 128, 1e-3)}


def draw(data: tuple[Any, Any], key: jax.Array, batch_size: int) -> tuple[jax.Array, jax.Array]:
    """Returns a batch of pictures and their labels."""
    images, labels = data
    pick = jax.random.randint(key, (batch_size,), 0, images.shape[0])
    return images[pick], labels[pick]


def save_preview(path: Path, model: DiT, params: Any) -> None:
    """Writes a picture of four samples of each digit: 50 DDIM steps, guidance 1.5."""
    shape = (40, model.input_size, model.input_size, model.in_channels)
    noise = jax.random.normal(jax.random.key(1), shape)
    denoise_fn = qdit.denoiser(model, params, guidance=1.5)
    samples = qdit.sample(denoise_fn, qdit.ddim(steps=50), noise, jnp.arange(40) % 10)
    save_grid(path, samples, columns=10, scale=3)


SUBJECT = Subject(
    name="dit",
    models=MODELS,
    settings=SETTINGS,
    load=lambda path, model: load_digits(path, model.input_size),
    draw=draw,
    preview=save_preview,
    num_tokens=lambda model: (model.input_size // model.patch_size) ** 2,
)


def main(argv: Sequence[str] | None = None) -> None:
    train(SUBJECT, __doc__, argv)


if __name__ == "__main__":
    main()
