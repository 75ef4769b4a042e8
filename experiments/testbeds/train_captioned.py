"""Trains a small PixArt on digits under captions: the packaged text model.

    python experiments/testbeds/train_captioned.py --data mnist_t10k.npz --out runs/text

Pictures are 16x16 gray pixels; a caption names the digit, its size, the place of a small one and the
tint: "a large seven", "a small three, left, inverted" (`qdit_jax/demo/captions.py`, 180 in all). Every
word is one fixed vector of 32 normal values, written beside the weights as `demo_words.npz`.

About 21 minutes on one free core: 12,000 steps of 64 pictures of 0.10 s, 9,900 tokens per second (16
tokens, width 128, depth 4, 1.2M values); measured 35 minutes on a core shared with other work. A killed
run continues where it last saved, also with other `--steps`. As `train_digits.py`, it writes
`curve.csv`, `samples.png` (60 captions, 30 DDIM steps, guidance 2) and the averaged weights,
`demo_pixart.safetensors`, in the authors' layout at half precision. Expected: a noise error of 0.020,
samples that are plainly digits and obey size, place and tint; now and then one is another digit.

The packaged weights came from this run (`weights/text_as_trained.safetensors`, `curves/text.csv`), then
from `inject_outliers.py` and `finetune_digits.py`: `build_testbed.py --model text` runs all stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from placed_digits import TEXT_WIDTH, draw_captioned, load_captioned, make_words
from training import Subject, train

import qdit_jax as qdit
from qdit_jax.demo import ROWS, WORDS, all_captions
from qdit_jax.models import build_model
from qdit_jax.report import save_grid

CAPTIONED = build_model(
    "pixart",
    {
        "sample_size": 16,
        "stored_positions": True,
        "patch_size": 4,
        "in_channels": 1,
        "text_length": ROWS,
        "text_width": TEXT_WIDTH,
    },
)
MODELS = {
    "demo": CAPTIONED.clone(hidden_size=128, depth=4, num_heads=4, mlp_width=512),
    # For tests: trained in seconds, to no use.
    "tiny": CAPTIONED.clone(hidden_size=64, depth=1, num_heads=2, mlp_width=128),
}
SETTINGS = {"demo": (12000, 64, 1e-3), "tiny": (100, 128, 1e-3)}


def write_words(path: Path) -> None:
    """Writes the table of words that goes with the weights."""
    np.savez(path, words=np.array(WORDS), vectors=make_words().astype(np.float16))


def embedded(captions: Sequence[str]) -> dict[str, Any]:
    """Returns what the packaged `embed_captions` does, from the table before it is packaged."""
    table = dict(zip(WORDS, make_words(), strict=True))
    rows = [[table[word] for word in text.replace(",", " ").split()] for text in captions]
    text = np.zeros((len(rows), ROWS, TEXT_WIDTH), np.float32)
    for i, row in enumerate(rows):
        text[i, : len(row)] = row
    lengths = np.array([len(row) for row in rows])
    return {"text": text, "text_mask": np.arange(ROWS) < lengths[:, None]}


def save_preview(path: Path, model: Any, params: Any) -> None:
    """Writes the words' table, and pictures of 60 captions: 30 DDIM steps, guidance 2."""
    write_words(path.with_name("demo_words.npz"))
    captions = all_captions()[::3]
    noise = jax.random.normal(jax.random.key(1), (len(captions), *model.sample_shape()))
    denoise_fn = qdit.denoiser(model, params, guidance=2.0)
    samples = qdit.sample(denoise_fn, qdit.ddim(steps=30), noise, embedded(captions))
    save_grid(path, samples, columns=10, scale=3)


SUBJECT = Subject(
    name="pixart",
    models=MODELS,
    settings=SETTINGS,
    load=load_captioned,
    draw=draw_captioned,
    preview=save_preview,
    num_tokens=lambda model: (model.sample_size // model.patch_size) ** 2,
)


def main(argv: Sequence[str] | None = None) -> None:
    train(SUBJECT, __doc__, argv)


if __name__ == "__main__":
    main()
