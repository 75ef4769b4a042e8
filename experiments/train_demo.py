"""Trains the small class-conditional DiT that the package carries, on real digits.

    python experiments/train_demo.py --data mnist_t10k.npz --out runs/demo --steps 30000

Takes about 2 hours on 2 cores (16x16 pixels, 16 tokens, 1.9M values); a killed run continues where
it last saved. Every `--save-every` steps it writes `samples.png` (50 DDIM steps, guidance 1.5,
labels 0 to 9) and a point of `curve.csv`; at the end `demo_dit.safetensors`, the averaged weights
in the facebook layout at half precision. Expected: samples that are plainly digits.
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from demo_data import load_digits
from facebook_layout import facebook_state_dict
from PIL import Image
from safetensors.numpy import save_file

from qdit_jax.models.dit import DiT

MODEL = DiT(
    input_size=16,
    patch_size=4,
    in_channels=1,
    hidden_size=128,
    depth=6,
    num_heads=4,
    num_classes=10,
)
NUM_TIMESTEPS = 1000
LABEL_DROPOUT = 0.1
EMA_DECAY = 0.999


class State(NamedTuple):
    params: Any
    ema: Any
    opt_state: Any


def noise_schedule() -> tuple[np.ndarray, np.ndarray]:
    """Returns `(alphas_cumprod, posterior_log_variance)` of the published linear schedule, `[1000]`."""
    betas = np.linspace(1e-4, 0.02, NUM_TIMESTEPS)
    alphas_cumprod = np.cumprod(1 - betas)
    previous = np.append(1.0, alphas_cumprod[:-1])
    variance = betas * (1 - previous) / (1 - alphas_cumprod)
    return alphas_cumprod, np.log(np.append(variance[1], variance[1:]))


def loss_fn(params, image, label, key, model, min_snr_gamma):
    """Returns the noise error (Min-SNR weights, arXiv:2303.09556) plus the bound on the variance.

    The variance's share is the KL divergence of the posteriors with the mean held fixed
    (improved DDPM, arXiv:2102.09672, equation 16); at timestep 0 the clipped posterior is used.
    """
    alphas_cumprod, log_posterior = (jnp.asarray(a, jnp.float32) for a in noise_schedule())
    betas = jnp.linspace(1e-4, 0.02, NUM_TIMESTEPS)
    key_t, key_noise, key_drop = jax.random.split(key, 3)
    batch = image.shape[0]
    # One timestep per stratum: lower variance of the gradient than independent draws.
    offsets = (jnp.arange(batch) + jax.random.uniform(key_t, (batch,))) / batch
    timestep = (offsets * NUM_TIMESTEPS).astype(jnp.int32)
    noise = jax.random.normal(key_noise, image.shape)
    label = jnp.where(
        jax.random.uniform(key_drop, (batch,)) < LABEL_DROPOUT, model.num_classes, label
    )
    a = alphas_cumprod[timestep][:, None, None, None]
    noisy = jnp.sqrt(a) * image + jnp.sqrt(1 - a) * noise
    out = model.apply({"params": params}, noisy, timestep, label)
    predicted, fraction = jnp.split(out, 2, axis=-1)
    snr = a / (1 - a)
    weight = jnp.minimum(snr, min_snr_gamma) / snr
    simple = (weight * jnp.square(predicted - noise)).mean()

    low, high = log_posterior[timestep], jnp.log(betas)[timestep]
    low, high = low[:, None, None, None], high[:, None, None, None]
    log_variance = (fraction + 1) / 2 * (high - low) + low
    mean_gap = (
        jax.lax.stop_gradient(predicted - noise)
        * jnp.exp(high)
        / jnp.sqrt((1 - a) * (1 - jnp.exp(high)))
    )
    kl = 0.5 * (
        log_variance - low + jnp.exp(low - log_variance) - 1 + mean_gap**2 * jnp.exp(-log_variance)
    )
    return simple + 0.1 * kl.mean(), simple


@functools.partial(
    jax.jit, static_argnames=("optimizer", "model", "num_inner", "batch_size", "gamma")
)
def train_steps(
    state, images, labels, key, step, *, optimizer, model, num_inner, batch_size, gamma
):
    """Returns the state after `num_inner` steps and their mean noise error; keys follow the step."""

    def body(state, i):
        step_key = jax.random.fold_in(key, i)
        pick_key, loss_key = jax.random.split(step_key)
        pick = jax.random.randint(pick_key, (batch_size,), 0, images.shape[0])
        grad_fn = jax.grad(loss_fn, has_aux=True)
        grads, simple = grad_fn(state.params, images[pick], labels[pick], loss_key, model, gamma)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(EMA_DECAY, (1 + i) / (10 + i))
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params)
        return State(params, ema, opt_state), simple

    state, simple = jax.lax.scan(body, state, step + jnp.arange(num_inner))
    return state, simple.mean()


@functools.partial(jax.jit, static_argnames=("model", "num_steps"))
def preview(params, key, labels, *, model, num_steps=50, guidance=1.5):
    """Returns DDIM samples `[B, H, W, C]` with guidance, to look at while training."""
    alphas_cumprod, _ = noise_schedule()
    timesteps = np.linspace(0, NUM_TIMESTEPS - 1, num_steps).round().astype(np.int32)
    a_now = alphas_cumprod[timesteps]
    a_next = np.append(1.0, a_now[:-1])
    noise = jax.random.normal(key, (len(labels), model.input_size, model.input_size, 1))
    both = jnp.concatenate([labels, jnp.full_like(labels, model.num_classes)])

    def body(x, step):
        timestep, a, a_prev = step
        out = model.apply(
            {"params": params}, jnp.concatenate([x, x]), jnp.full(both.shape, timestep), both
        )[..., :1]
        cond, null = jnp.split(out, 2)
        eps = null + guidance * (cond - null)
        clean = (x - jnp.sqrt(1 - a) * eps) / jnp.sqrt(a)
        return jnp.sqrt(a_prev) * clean + jnp.sqrt(1 - a_prev) * eps, None

    steps = tuple(
        jnp.asarray(v[::-1].copy(), d)
        for v, d in ((timesteps, jnp.int32), (a_now, jnp.float32), (a_next, jnp.float32))
    )
    return jax.lax.scan(body, noise, steps)[0]


def save_preview(path: Path, images: np.ndarray, columns: int = 10) -> None:
    rows = images[..., 0].reshape(-1, columns, *images.shape[1:3])
    grid = np.concatenate([np.concatenate(row, axis=1) for row in rows])
    pixels = np.clip(127.5 * grid + 128, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).resize(np.array(pixels.shape[::-1]) * 4, Image.Resampling.NEAREST).save(
        path
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", help="npz of 28x28 digits; without it scikit-learn's 8x8 digits")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--steps", type=int, default=30_000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--min-snr-gamma", type=float, default=5.0)
    parser.add_argument("--save-every", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    images, labels = (jnp.asarray(a) for a in load_digits(args.data, MODEL.input_size))
    key = jax.random.key(args.seed)
    decay_steps = args.steps // 5
    rate = optax.join_schedules(
        [
            optax.linear_schedule(0.0, args.learning_rate, 500),
            optax.constant_schedule(args.learning_rate),
            optax.linear_schedule(args.learning_rate, 1e-5, decay_steps),
        ],
        [500, args.steps - decay_steps],
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.0))
    params = MODEL.init(key, images[:1], jnp.zeros(1), labels[:1])["params"]
    state = State(params, params, optimizer.init(params))
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager((args.out / "state").resolve(), options=options) as manager:
        step = manager.latest_step() or 0
        if step:
            state = manager.restore(step, args=ocp.args.StandardRestore(state))
            print(f"continuing from step {step}", flush=True)
        run = functools.partial(
            train_steps,
            optimizer=optimizer,
            model=MODEL,
            num_inner=100,
            batch_size=args.batch_size,
            gamma=args.min_snr_gamma,
        )
        while step < args.steps:
            began = time.perf_counter()
            state, loss = run(state, images, labels, key, jnp.int32(step))
            step += 100
            loss, seconds = float(loss), (time.perf_counter() - began) / 100
            print(f"step {step} loss {loss:.4f} {seconds:.3f} s/step", flush=True)
            with open(args.out / "curve.csv", "a") as curve:
                curve.write(f"{step},{loss:.5f},{seconds:.4f}\n")
            if step % args.save_every == 0 or step >= args.steps:
                manager.save(step, args=ocp.args.StandardSave(state))
                samples = preview(state.ema, jax.random.key(1), jnp.arange(40) % 10, model=MODEL)
                save_preview(args.out / "samples.png", np.asarray(samples))
                weights = facebook_state_dict(state.ema, dtype=np.float16)
                save_file(weights, args.out / "demo_dit.safetensors")


if __name__ == "__main__":
    main()
