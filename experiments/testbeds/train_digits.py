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

import argparse
import functools
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from demo_data import load_digits
from facebook_layout import write_facebook

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
# Of each model, unless given: steps, learning rate.
SETTINGS = {"demo": (8000, 1e-3), "wide": (2400, 3e-4), "tiny": (100, 1e-3)}
NUM_TIMESTEPS = 1000
LABEL_DROPOUT = 0.1
EMA_DECAY = 0.999


class State(NamedTuple):
    params: Any
    ema: Any
    opt_state: Any


def loss_fn(params, image, label, key, model, min_snr_gamma, label_dropout=LABEL_DROPOUT):
    """Returns the noise error (Min-SNR weights, arXiv:2303.09556) plus the bound on the variance.

    The variance's share is the KL divergence of the posteriors with the mean held fixed
    (improved DDPM, arXiv:2102.09672, equation 16); at timestep 0 the clipped posterior is used.
    """
    schedule = qdit.diffusion.Schedule(qdit.diffusion.linear_betas(NUM_TIMESTEPS))
    alphas_cumprod = jnp.asarray(schedule.alphas_cumprod, jnp.float32)
    log_posterior = jnp.asarray(schedule.posterior_log_variance_clipped, jnp.float32)
    betas = jnp.asarray(schedule.betas, jnp.float32)
    key_t, key_noise, key_drop = jax.random.split(key, 3)
    batch = image.shape[0]
    # One timestep per stratum: lower variance of the gradient than independent draws.
    offsets = (jnp.arange(batch) + jax.random.uniform(key_t, (batch,))) / batch
    timestep = (offsets * NUM_TIMESTEPS).astype(jnp.int32)
    noise = jax.random.normal(key_noise, image.shape)
    label = jnp.where(
        jax.random.uniform(key_drop, (batch,)) < label_dropout, model.num_classes, label
    )
    a = alphas_cumprod[timestep][:, None, None, None]
    noisy = qdit.diffusion.noised(schedule, image, timestep, noise)
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
    jax.jit,
    static_argnames=("optimizer", "model", "num_inner", "batch_size", "gamma", "label_dropout"),
)
def train_steps(
    state,
    images,
    labels,
    key,
    step,
    *,
    optimizer,
    model,
    num_inner,
    batch_size,
    gamma,
    label_dropout=LABEL_DROPOUT,
):
    """Returns the state after `num_inner` steps and their mean noise error; keys follow the step."""

    def body(state, i):
        step_key = jax.random.fold_in(key, i)
        pick_key, loss_key = jax.random.split(step_key)
        pick = jax.random.randint(pick_key, (batch_size,), 0, images.shape[0])
        grad_fn = jax.grad(loss_fn, has_aux=True)
        grads, simple = grad_fn(
            state.params, images[pick], labels[pick], loss_key, model, gamma, label_dropout
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(EMA_DECAY, (1 + i) / (10 + i))
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params)
        return State(params, ema, opt_state), simple

    state, simple = jax.lax.scan(body, state, step + jnp.arange(num_inner))
    return state, simple.mean()


def save_preview(path: Path, model: DiT, params: Any) -> None:
    """Writes a picture of four samples of each digit: 50 DDIM steps, guidance 1.5."""
    shape = (40, model.input_size, model.input_size, model.in_channels)
    noise = jax.random.normal(jax.random.key(1), shape)
    denoise_fn = qdit.denoiser(model, params, guidance=1.5)
    samples = qdit.sample(denoise_fn, qdit.ddim(steps=50), noise, jnp.arange(40) % 10)
    save_grid(path, samples, columns=10, scale=3)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", help="npz of 28x28 digits; without it scikit-learn's 8x8 digits")
    parser.add_argument("--out", type=Path, default=Path("runs/digits"))
    parser.add_argument("--model", choices=MODELS, default="demo")
    parser.add_argument("--steps", type=int, help="8000 of demo, 2400 of wide")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, help="1e-3 of demo, 3e-4 of wide")
    parser.add_argument("--min-snr-gamma", type=float, default=5.0)
    parser.add_argument("--save-every", type=int, default=1000)
    parser.add_argument("--keep-snapshots", action="store_true", help="keep every save's weights")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    steps, learning_rate = SETTINGS[args.model]
    args.steps = args.steps or steps
    args.learning_rate = args.learning_rate or learning_rate
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    model = MODELS[args.model]
    num_tokens = (model.input_size // model.patch_size) ** 2
    images, labels = (jnp.asarray(a) for a in load_digits(args.data, model.input_size))
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
    params = model.init(key, images[:1], jnp.zeros(1), labels[:1])["params"]
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
            model=model,
            num_inner=100,
            batch_size=args.batch_size,
            gamma=args.min_snr_gamma,
        )
        while step < args.steps:
            began = time.perf_counter()
            state, loss = run(state, images, labels, key, jnp.int32(step))
            step += 100
            loss, seconds = float(loss), (time.perf_counter() - began) / 100
            tokens = num_tokens * args.batch_size / seconds
            print(
                f"step {step} loss {loss:.4f} {seconds:.3f} s/step {tokens:.0f} tokens/s",
                flush=True,
            )
            with open(args.out / "curve.csv", "a") as curve:
                curve.write(f"{step},{loss:.5f},{seconds:.4f}\n")
            if step % args.save_every == 0 or step >= args.steps:
                manager.save(step, args=ocp.args.StandardSave(state))
                save_preview(args.out / "samples.png", model, state.ema)
                weights = args.out / f"{args.model}_dit.safetensors"
                write_facebook(weights, state.ema)
                if args.keep_snapshots:
                    (args.out / "snapshots").mkdir(exist_ok=True)
                    shutil.copyfile(weights, args.out / "snapshots" / f"{step}.safetensors")


if __name__ == "__main__":
    main()
