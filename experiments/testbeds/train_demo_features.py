"""Trains the small digit classifier behind "Fréchet distance (demo features)".

    python experiments/testbeds/train_demo_features.py --data mnist_t10k.npz

Takes about 2 minutes on one CPU core. Expected: 98.6% of the 1,000 held-out digits right.
Writes `features.safetensors` (float16 weights) and `features_stats.npz` (mean and covariance of the
features of all images) to `qdit_jax/assets`. Without `--data`, scikit-learn's 8x8 digits serve.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from demo_data import load_digits
from flax.traverse_util import flatten_dict
from safetensors.numpy import save

from qdit_jax import models
from qdit_jax.metrics import extract, moments, statistics, write_reference

ASSETS = Path(models.__file__).parent.parent / "assets"
NUM_HELD_OUT = 1000
MAX_SHIFT = 1


def float16_bytes(params: Any) -> bytes:
    """Returns safetensors of a parameter tree in float16, the names its paths."""
    flat = flatten_dict(params, sep="/")
    return save({name: np.asarray(leaf, np.float16) for name, leaf in flat.items()})


def shifted(images: jax.Array, key: jax.Array) -> jax.Array:
    """Returns every image moved by up to `MAX_SHIFT` pixels each way, background filled in."""
    border = ((0, 0), (MAX_SHIFT, MAX_SHIFT), (MAX_SHIFT, MAX_SHIFT), (0, 0))
    padded = jnp.pad(images, border, constant_values=-1)
    starts = jax.random.randint(key, (len(images), 2), 0, 2 * MAX_SHIFT + 1)
    crop = lambda image, start: jax.lax.dynamic_slice(image, (*start, 0), images.shape[1:])  # noqa: E731
    return jax.vmap(crop)(padded, starts)


def optimizer(num_steps: int) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0, 3e-3, num_steps // 20, num_steps)
    return optax.adamw(schedule, weight_decay=1e-3)


@partial(jax.jit, static_argnames=("num_steps",), donate_argnums=(0,))
def train_step(state, images, labels, key, *, num_steps):
    """Returns the state after one step, and the loss."""
    params, momenta = state

    def loss(params):
        logits = models.DigitFeatures().apply({"params": params}, shifted(images, key))["logits"]
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), 0.05)
        return optax.softmax_cross_entropy(logits, targets).mean()

    value, gradient = jax.value_and_grad(loss)(params)
    updates, momenta = optimizer(num_steps).update(gradient, momenta, params)
    return (optax.apply_updates(params, updates), momenta), value


def train(images, labels, *, num_steps: int, batch_size: int, seed: int):
    """Returns the trained params; prints the loss of every epoch."""
    key = jax.random.key(seed)
    params = models.DigitFeatures().init(key, images[:1])["params"]
    steps_per_epoch = len(images) // batch_size
    num_epochs = math.ceil(num_steps / steps_per_epoch)
    num_steps = num_epochs * steps_per_epoch
    state = params, optimizer(num_steps).init(params)
    rng = np.random.default_rng(seed)
    for epoch in range(num_epochs):
        losses = []
        for batch in rng.permutation(len(images))[: steps_per_epoch * batch_size].reshape(
            -1, batch_size
        ):
            key, use = jax.random.split(key)
            state, loss = train_step(state, images[batch], labels[batch], use, num_steps=num_steps)
            losses.append(loss)
        print(f"epoch {epoch + 1}/{num_epochs}: loss {np.mean(losses):.4f}", flush=True)
    return state[0]


def held_out_split(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices of training and held-out images: a fixed permutation, its end held out."""
    order = np.random.default_rng(0).permutation(count)
    num_held_out = min(NUM_HELD_OUT, count // 5)
    return order[:-num_held_out], order[-num_held_out:]


def accuracy(features_fn, pixels: np.ndarray, labels: np.ndarray) -> float:
    guesses = extract(features_fn, np.array_split(pixels, len(pixels) // 200)).probabilities.argmax(
        1
    )
    return float((guesses == labels).mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", help="MNIST's test split as .npz; default: scikit-learn's digits")
    parser.add_argument("--steps", type=int, default=840, help="rounded up to whole epochs")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ASSETS)
    args = parser.parse_args()

    images, labels = load_digits(args.data, models.DEMO_SIZE)
    fitted, held_out = held_out_split(len(images))
    params = train(
        images[fitted],
        labels[fitted],
        num_steps=args.steps,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / models.DEMO_WEIGHTS).write_bytes(float16_bytes(jax.device_get(params)))

    pixels = np.round((images + 1) * 127.5).astype(np.uint8)
    features_fn = models.demo_features_fn(args.out / models.DEMO_WEIGHTS)
    right = accuracy(features_fn, pixels[held_out], labels[held_out])
    print(f"held out: {right:.1%} of {len(held_out)} digits right (weights in float16)")
    found = extract(features_fn, np.array_split(pixels, len(pixels) // 200))
    write_reference(
        args.out / models.DEMO_STATISTICS,
        pool=statistics(moments(found.pool)),
        features="demo",
        num_images=len(pixels),
    )
    print(f"wrote {args.out / models.DEMO_WEIGHTS} and {args.out / models.DEMO_STATISTICS}")


if __name__ == "__main__":
    main()
