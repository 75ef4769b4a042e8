"""One training loop for every small model of this folder: resumable, averaged, with its curve.

A *subject* is what a model learns: its networks by name, its data, how a batch is drawn, and a picture
of samples. `train_digits.py`, `train_captioned.py` and `train_moving.py` have one each.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from jaxtyping import Array, Float
from published_layout import write_published

import qdit_jax as qdit
from qdit_jax.files import replaced_file

NUM_TIMESTEPS = 1000
DROPOUT = 0.1
EMA_DECAY = 0.999
NUM_INNER = 100

# `(data, key, batch size)` -> samples and their condition.
Draw = Callable[[Any, jax.Array, int], tuple[jax.Array, Any]]


@dataclass(frozen=True)
class Subject:
    """What a small model learns.

    Attributes:
        name: ends the name of its weights, `<model>_<name>.safetensors`.
        models: networks by name; the first is the default.
        settings: of each model, unless given: steps, batch size, learning rate.
        load: returns the data for the file of pictures and a network.
        draw: returns a batch.
        preview: writes a picture of samples: path, network, params.
        num_tokens: of one sample.
        noisy_weight: the greatest weight of an error where noise exceeds the signal, see `loss_weights`.
    """

    name: str
    models: Mapping[str, nn.Module]
    settings: Mapping[str, tuple[int, int, float]]
    load: Callable[[str | None, Any], Any]
    draw: Draw
    preview: Callable[[Path, Any, Any], None]
    num_tokens: Callable[[Any], int]
    noisy_weight: float = 1.0


class State(NamedTuple):
    params: Any
    ema: Any
    opt_state: Any


def loss_fn(params, x, condition, key, model, min_snr_gamma, dropout=DROPOUT, noisy_weight=1.0):
    """Returns the weighted noise error plus the bound on the variance.

    The variance's share is the KL divergence of the posteriors with the mean held fixed
    (improved DDPM, arXiv:2102.09672, equation 16); at timestep 0 the clipped posterior is used.
    """
    schedule = qdit.diffusion.Schedule(qdit.diffusion.linear_betas(NUM_TIMESTEPS))
    alphas_cumprod = jnp.asarray(schedule.alphas_cumprod, jnp.float32)
    log_posterior = jnp.asarray(schedule.posterior_log_variance_clipped, jnp.float32)
    betas = jnp.asarray(schedule.betas, jnp.float32)
    key_t, key_noise, key_drop = jax.random.split(key, 3)
    batch = x.shape[0]
    # One timestep per stratum: lower variance of the gradient than independent draws.
    offsets = (jnp.arange(batch) + jax.random.uniform(key_t, (batch,))) / batch
    timestep = (offsets * NUM_TIMESTEPS).astype(jnp.int32)
    noise = jax.random.normal(key_noise, x.shape)
    dropped = jax.random.uniform(key_drop, (batch,)) < dropout
    condition = with_nulls(model, params, condition, dropped)

    def of_sample(values):
        return values.reshape(-1, *[1] * (x.ndim - 1))

    a = of_sample(alphas_cumprod[timestep])
    noisy = qdit.diffusion.noised(schedule, x, timestep, noise)
    out = model.apply({"params": params}, noisy, timestep, condition)
    predicted, fraction = jnp.split(out, 2, axis=-1)
    snr = a / (1 - a)
    weights = loss_weights(snr, min_snr_gamma, noisy_weight)
    simple = (weights * jnp.square(predicted - noise)).mean()

    low, high = of_sample(log_posterior[timestep]), of_sample(jnp.log(betas)[timestep])
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


def loss_weights(
    snr: Float[Array, "B ..."], gamma: float, noisy_weight: float = 1.0
) -> Float[Array, "B ..."]:
    """Returns the weights of squared errors of the predicted noise.

    At most `gamma / SNR` where there is little noise (Min-SNR, arXiv:2303.09556). Where noise exceeds the
    signal they are 1, or, as errors of the predicted sample count, `1 / SNR` up to `noisy_weight`: there the
    frames of a video agree on one place, or do not.
    """
    little = jnp.minimum(snr, gamma) / snr
    return jnp.maximum(little, jnp.minimum(1 / snr, noisy_weight))


def with_nulls(model: Any, params: Any, condition: Any, dropped: jax.Array) -> Any:
    """Returns the condition with the null one in the samples that `dropped [B]` names."""
    null = model.null_condition(condition, params)
    if null is None:
        return condition
    return jax.tree.map(
        lambda n, c: jnp.where(dropped.reshape(-1, *[1] * (c.ndim - 1)), n, c), null, condition
    )


@functools.partial(
    jax.jit,
    static_argnames=(
        "draw",
        "optimizer",
        "model",
        "num_inner",
        "batch_size",
        "gamma",
        "dropout",
        "noisy_weight",
    ),
)
def train_steps(
    state,
    data,
    key,
    step,
    *,
    draw,
    optimizer,
    model,
    num_inner,
    batch_size,
    gamma,
    dropout=DROPOUT,
    noisy_weight=1.0,
):
    """Returns the state after `num_inner` steps and their mean noise error; keys follow the step."""

    def body(state, i):
        step_key = jax.random.fold_in(key, i)
        pick_key, loss_key = jax.random.split(step_key)
        x, condition = draw(data, pick_key, batch_size)
        grad_fn = jax.grad(loss_fn, has_aux=True)
        grads, simple = grad_fn(
            state.params, x, condition, loss_key, model, gamma, dropout, noisy_weight
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(EMA_DECAY, (1 + i) / (10 + i))
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params)
        return State(params, ema, opt_state), simple

    state, simple = jax.lax.scan(body, state, step + jnp.arange(num_inner))
    return state, simple.mean()


def falling_rate(learning_rate: float, num_steps: int) -> optax.Schedule:
    """Returns a rate that rises for 500 steps and falls over the last fifth."""
    decay_steps = num_steps // 5
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, learning_rate, 500),
            optax.constant_schedule(learning_rate),
            optax.linear_schedule(learning_rate, 1e-5, decay_steps),
        ],
        [500, num_steps - decay_steps],
    )


def parse_args(subject: Subject, text: str | None, argv: Sequence[str] | None) -> Any:
    """Returns the options; those of the model fill what is not given."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawTextHelpFormatter
    )
    first = next(iter(subject.models))
    parser.add_argument("--data", help="npz of 28x28 digits; without it scikit-learn's 8x8 digits")
    parser.add_argument("--out", type=Path, default=Path("runs") / subject.name)
    parser.add_argument("--model", choices=subject.models, default=first)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--min-snr-gamma", type=float, default=5.0)
    parser.add_argument("--save-every", type=int, default=1000)
    parser.add_argument("--keep-snapshots", action="store_true", help="keep every save's weights")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    steps, batch_size, learning_rate = subject.settings[args.model]
    args.steps = args.steps or steps
    args.batch_size = args.batch_size or batch_size
    args.learning_rate = args.learning_rate or learning_rate
    return args


def train(subject: Subject, text: str | None, argv: Sequence[str] | None = None) -> None:
    """Trains as the options say; a killed run continues where it last saved."""
    args = parse_args(subject, text, argv)
    args.out.mkdir(parents=True, exist_ok=True)
    model: Any = subject.models[args.model]
    data = jax.tree.map(jnp.asarray, subject.load(args.data, model))
    key = jax.random.key(args.seed)
    rate = falling_rate(args.learning_rate, args.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.0))
    x, condition = subject.draw(data, key, 1)
    params = model.init(key, x, jnp.zeros(1), condition)["params"]
    state = State(params, params, optimizer.init(params))
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager((args.out / "state").resolve(), options=options) as manager:
        step = manager.latest_step() or 0
        if step:
            state = manager.restore(step, args=ocp.args.StandardRestore(state))
            print(f"continuing from step {step}", flush=True)
        cut_curve(args.out / "curve.csv", step)
        while step < args.steps:
            began = time.perf_counter()
            state, loss = train_steps(
                state,
                data,
                key,
                jnp.int32(step),
                draw=subject.draw,
                optimizer=optimizer,
                model=model,
                num_inner=NUM_INNER,
                batch_size=args.batch_size,
                gamma=args.min_snr_gamma,
                noisy_weight=subject.noisy_weight,
            )
            step += NUM_INNER
            tell(args, step, float(loss), time.perf_counter() - began, subject.num_tokens(model))
            if step % args.save_every == 0 or step >= args.steps:
                manager.save(step, args=ocp.args.StandardSave(state))
                save(subject, args, model, state.ema, step)


def cut_curve(path: Path, step: int) -> None:
    """Takes the points after a step away: what a killed run had not saved is trained again."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    with replaced_file(path) as temporary:
        temporary.write_text("".join(line for line in lines if int(line.split(",")[0]) <= step))


def tell(args: Any, step: int, loss: float, seconds: float, num_tokens: int) -> None:
    """Prints a point of the curve and adds it to `curve.csv`."""
    seconds /= NUM_INNER
    tokens = num_tokens * args.batch_size / seconds
    print(f"step {step} loss {loss:.4f} {seconds:.3f} s/step {tokens:.0f} tokens/s", flush=True)
    with open(args.out / "curve.csv", "a") as curve:
        curve.write(f"{step},{loss:.5f},{seconds:.4f}\n")


def save(subject: Subject, args: Any, model: Any, params: Any, step: int) -> None:
    """Writes the averaged weights in the published layout, and the picture of samples."""
    weights = args.out / f"{args.model}_{subject.name}.safetensors"
    write_published(weights, params)
    subject.preview(args.out / "samples.png", model, params)
    if args.keep_snapshots:
        (args.out / "snapshots").mkdir(exist_ok=True)
        shutil.copyfile(weights, args.out / "snapshots" / f"{step}.safetensors")
