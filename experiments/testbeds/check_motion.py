"""Measures whether a model's moving digits can be read, and how smoothly they move.

    python experiments/testbeds/check_motion.py --data mnist_t10k.npz --out motion.json

A small convolutional network learns to read single frames of `placed_digits.py` (8,000 digits); it is then
asked about frames of the 2,000 other digits, and of videos that the packaged model makes (`--checkpoint`
takes another one): 30 DDIM steps, guidance 2.5, 20 videos per class. A video is read by the mean of its
frames' logits. `jerk` is the median change of the digit's speed from frame to frame, in pixels: the length of
the second difference of its center; a bounce is one such change, else it is 0 but for rounding to pixels. Nine
of ten changes stay below `jerk_p90`.

About a minute on 2 free cores.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float, Int
from placed_digits import draw_moving, load_moving
from tqdm import tqdm

import qdit_jax as qdit
from qdit_jax.demo import PACKAGED
from qdit_jax.report import provenance

HELD_OUT = 2000
Videos = Float[np.ndarray, "N F H W 1"]


class Reader(nn.Module):
    """Reads the digit of a frame."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W 1"]) -> Float[Array, "B 10"]:
        for width in (16, 32):
            x = nn.relu(nn.Conv(width, (3, 3))(x))
            x = nn.relu(nn.Conv(width, (3, 3), strides=2)(x))
        x = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="an .npz of digits; by default scikit-learn's")
    parser.add_argument("--checkpoint", help="a video model of digits (the packaged one)")
    parser.add_argument("--per-class", type=int, default=20, help="videos (%(default)s)")
    parser.add_argument("--reader-steps", type=int, default=800, help="of training (%(default)s)")
    parser.add_argument("--guidance", type=float, default=2.5, help="(%(default)s)")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    data = load_moving(args.data)
    order = np.random.default_rng(0).permutation(len(data["labels"]))
    held_out = min(HELD_OUT, len(order) // 5)
    seen, unseen = (
        {name: jnp.asarray(values[part]) for name, values in data.items()}
        for part in (order[held_out:], order[:held_out])
    )
    reader = trained_reader(seen, args.reader_steps)
    count = 10 * args.per_class
    real, digits = draw_moving(unseen, jax.random.key(2), count)
    labels = np.arange(count) % 10
    made = generated(args.checkpoint, labels, args.guidance)
    found = {
        "made": provenance(),
        "videos": count,
        "guidance": args.guidance,
        "real": measured(reader, np.asarray(real), np.asarray(digits)),
        "model": measured(reader, made, labels),
    }
    print(json.dumps({k: v for k, v in found.items() if k != "made"}, indent=1))
    args.out.write_text(json.dumps(found, indent=1) + "\n")


def trained_reader(data: dict[str, Array], num_steps: int) -> Any:
    """Returns the function from frames `[B, H, W, 1]` to logits `[B, 10]`."""
    reader, optimizer = Reader(), optax.adam(optax.cosine_decay_schedule(2e-3, num_steps))
    frames, _ = draw_moving(data, jax.random.key(0), 1)
    params = reader.init(jax.random.key(1), frames[:, 0])

    def loss_fn(params: Any, frames: Array, labels: Int[Array, " B"]) -> Array:
        logits = reader.apply(params, frames)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(params: Any, state: Any, key: Array) -> tuple[Any, Any]:
        keys = jax.random.split(key)
        videos, labels = draw_moving(data, keys[0], 128, num_frames=1)
        frames = videos[:, 0] + 0.05 * jax.random.normal(keys[1], videos[:, 0].shape)
        updates, state = optimizer.update(jax.grad(loss_fn)(params, frames, labels), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for number in tqdm(range(num_steps), desc="reader"):
        params, state = step(params, state, jax.random.fold_in(jax.random.key(3), number))
    return jax.jit(lambda frames: reader.apply(params, frames))


def generated(path: str | None, labels: Int[np.ndarray, " N"], guidance: float) -> Videos:
    """Returns a video of each label."""
    if path is not None:
        checkpoint = qdit.load(path)
    else:
        checkpoint = PACKAGED["video"].convert(Path("runs/check_motion_model"))
    return qdit.generate(checkpoint, qdit.ddim(steps=30), labels, guidance=guidance)


def measured(reader: Any, videos: Videos, labels: Int[np.ndarray, " N"]) -> dict[str, Any]:
    """Returns shares of frames and of videos that are read right, by digit too, and the jerk."""
    logits = np.asarray(reader(videos.reshape(-1, *videos.shape[2:])))
    logits = logits.reshape(*videos.shape[:2], 10)
    right = logits.mean(1).argmax(-1) == labels
    jerk = np.linalg.norm(np.diff(centers(videos), 2, axis=1), axis=-1)
    return {
        "frames_read": float((logits.argmax(-1) == labels[:, None]).mean()),
        "videos_read": float(right.mean()),
        "videos_read_by_digit": [round(float(right[labels == d].mean()), 2) for d in range(10)],
        "jerk": float(np.median(jerk)),
        "jerk_p90": float(np.quantile(jerk, 0.9)),
    }


def centers(videos: Videos) -> Float[np.ndarray, "N F 2"]:
    """Returns the center of what is bright in every frame, in pixels."""
    light = np.clip((videos[..., 0] + 1) / 2, 0.1, 1) - 0.1
    total = light.sum((2, 3)) + 1e-6
    rows, columns = (np.arange(size) for size in light.shape[2:])
    by_row = (light.sum(3) * rows).sum(2) / total
    by_column = (light.sum(2) * columns).sum(2) / total
    return np.stack([by_row, by_column], axis=-1)


if __name__ == "__main__":
    main()
