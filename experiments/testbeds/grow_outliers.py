"""Measures which settings of a training make a DiT grow outliers, on many small trainings.

    python experiments/testbeds/grow_outliers.py --data mnist_t10k.npz --out runs/growth
    python experiments/testbeds/grow_outliers.py --out runs/growth --snapshots runs/wide/snapshots \
        --name wide --num-heads 16

The base: width 96, depth 4, 16 tokens, 1,500 steps of 64 digits at a constant learning rate of
1e-3, Adam, no weight decay; every variant changes what its name says. About 3 minutes a variant on
one core, 10 with 12 blocks. A killed run continues where it last saved, and what `growth.json` holds
is not measured again. The second command measures the weights that another training kept
(`train_digits.py --keep-snapshots`), `<step>.safetensors` each.

Writes `growth.json`, `growth.md` and `growth.png`. See `testbed/README.md` for what was found.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from check_testbed import DYNAMIC, GROUPS, STATIC, decibels, recipes, sample_all
from demo_data import load_digits
from finetune_digits import noise_error
from flax import serialization
from flax.traverse_util import flatten_dict
from growth_report import write_report
from testbed_measures import KINDS, collect, outlier_ratio, read_checkpoint, rms, spread
from train_digits import DIGITS, draw
from training import DROPOUT, State, train_steps

import qdit_jax as qdit
from qdit_jax.calibration import default_sampler

BASE = DIGITS.clone(patch_size=4, hidden_size=96, depth=4, num_heads=4)
SNAPSHOTS = (500, 1500, 4500)
COMPARED_AT = 1500
NUM_INNER = 100
BATCH_SIZE = 64
GUIDANCE = 1.5
SAMPLES = 20
SAMPLER_STEPS = 25


@dataclasses.dataclass(frozen=True)
class Variant:
    """The settings of one training; `decay_modulation` says whether adaLN's weights decay too."""

    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    decay_modulation: bool = True
    beta2: float = 0.999
    label_dropout: float = DROPOUT
    depth: int = 4
    width: int = 96
    patch_size: int = 4
    muon: bool = False
    steps: int = COMPARED_AT
    seed: int = 0


VARIANTS = {
    "base": Variant(steps=max(SNAPSHOTS)),
    "learning rate 3e-3": Variant(learning_rate=3e-3, steps=max(SNAPSHOTS)),
    "weight decay 1": Variant(weight_decay=1.0),
    "weight decay 1, not of modulation": Variant(weight_decay=1.0, decay_modulation=False),
    "base, seed 1": Variant(seed=1),
    "label dropout 0.3": Variant(label_dropout=0.3),
    "beta2 0.95": Variant(beta2=0.95),
    "depth 12": Variant(depth=12),
    "weight decay 0.1": Variant(weight_decay=0.1),
    "Muon in place of Adam": Variant(muon=True),
    "learning rate 3e-4": Variant(learning_rate=3e-4),
    "width 192": Variant(width=192),
    "4 tokens, depth 2": Variant(patch_size=8, depth=2),
    "4 tokens, depth 2, width 384": Variant(patch_size=8, depth=2, width=384),
    "4 tokens, depth 2, width 768": Variant(patch_size=8, depth=2, width=768),
}


def optimizer(variant: Variant) -> optax.GradientTransformation:
    """Returns Adam (or Muon) at a rate that rises for 200 steps and then stays."""
    rate = optax.linear_schedule(0.0, variant.learning_rate, 200)
    if variant.muon:
        update = optax.contrib.muon(rate, weight_decay=variant.weight_decay)
    else:
        mask = None if variant.decay_modulation else not_modulation
        decay = variant.weight_decay
        update = optax.adamw(rate, b2=variant.beta2, weight_decay=decay, mask=mask)
    return optax.chain(optax.clip_by_global_norm(1.0), update)


def not_modulation(params: Any) -> Any:
    """Returns which params are no part of an adaLN layer."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "adaLN_modulation" not in jax.tree_util.keystr(path), params
    )


def train(
    variant: Variant, data: tuple[Any, Any], path: Path, limit: int, found: dict
) -> Iterator[int]:
    """Trains to `limit` steps, adds to `found` a measurement at every one of `SNAPSHOTS`, yields it.

    The state is kept in `path` once the caller has seen to the measurement.
    """
    images, labels = data
    model = BASE.clone(
        hidden_size=variant.width, depth=variant.depth, patch_size=variant.patch_size
    )
    key = jax.random.key(variant.seed)
    params = model.init(key, images[:1], jnp.zeros(1), labels[:1])["params"]
    update = optimizer(variant)
    state, step = State(params, params, update.init(params)), 0
    if path.exists():
        saved = serialization.from_bytes({"state": state, "step": 0}, path.read_bytes())
        state, step = jax.tree.map(jnp.asarray, saved["state"]), int(saved["step"])
    run = partial(
        train_steps,
        draw=draw,
        optimizer=update,
        model=model,
        num_inner=NUM_INNER,
        batch_size=BATCH_SIZE,
        gamma=5.0,
        dropout=variant.label_dropout,
    )
    began, seconds = time.perf_counter(), 0.0
    while step < min(limit, variant.steps):
        state, loss = run(state, data, key, jnp.int32(step))
        step += NUM_INNER
        if step in SNAPSHOTS:
            jax.block_until_ready(state)
            seconds = time.perf_counter() - began
            checkpoint = qdit.Checkpoint(model, jax.tree.map(np.asarray, state.ema))
            error = noise_error(state.ema, images[:1024], labels[:1024], model=model)
            found[str(step)] = measurement(checkpoint, step >= COMPARED_AT) | {
                "noise_error": float(error),
                "train_loss": float(loss),
                "seconds": round(seconds, 1),
            }
            yield step
            temporary = path.with_suffix(".unfinished")
            temporary.write_bytes(serialization.to_bytes({"state": state, "step": step}))
            temporary.rename(path)
            began = time.perf_counter()


def measurement(
    checkpoint: qdit.Checkpoint, sampled: bool, guidance: float = GUIDANCE
) -> dict[str, Any]:
    """Returns what the weights and inputs of a network's linear layers look like.

    By kind of layer, over its blocks; `sampled` adds what two recipes do to samples.
    """
    sampler = default_sampler(checkpoint, SAMPLER_STEPS)
    seen = collect(checkpoint, sampler, jax.random.key(20_000), SAMPLES, guidance)
    found: dict[str, Any] = {}
    kernels = flatten_dict(checkpoint.params, sep="/")
    for kind, suffix in KINDS.items():
        paths = [path for path in seen if path.startswith("blocks_") and path.endswith(suffix)]
        found[kind] = layer_figures(
            [seen[path] for path in paths],
            [np.asarray(kernels[f"{path}/kernel"], np.float32) for path in paths],
        )
    if sampled:
        size = 32 if checkpoint.model.hidden_size < 512 else 128
        chosen = {name: recipes(size)[name] for name in (STATIC, GROUPS, DYNAMIC)}
        latents = sample_all(
            checkpoint, sampler, chosen, num_samples=SAMPLES, seeds=[0], guidance=guidance
        )
        found["decibels"] = {name: float(a.mean()) for name, a in decibels(latents).items()}
    return found


def layer_figures(layers: list[dict[str, np.ndarray]], kernels: list[np.ndarray]) -> dict:
    """Returns the figures of one kind of layer: the median over blocks, of ratios the largest too.

    `kurtosis` is that of the channels' size, 1 when all are alike and K when there is but one.
    """
    ratios = [outlier_ratio(layer["channel_max"]) for layer in layers]
    sizes = [np.sqrt(np.square(layer["channel_rms"]).mean((0, 1))) for layer in layers]
    drifts = [a.max(0) / np.maximum(a.min(0), 1e-9) for a in (x["channel_max"][0] for x in layers)]
    figures = {
        "ratio": np.median(ratios),
        "largest_ratio": np.max(ratios),
        "kurtosis": np.median([np.mean(s**4) / np.mean(s**2) ** 2 for s in sizes]),
        "token_ratio": np.max([layer["token_ratio"].max() for layer in layers]),
        "drift": np.median([np.median(drift) for drift in drifts]),
        "drifting_share": np.median([np.mean(drift >= 3) for drift in drifts]),
        "weight_spread": np.median([spread(rms(k, 1)) / spread(rms(k, 0)) for k in kernels]),
        "weight_tails": np.median([np.abs(k).max() / rms(k, None) for k in kernels]),
    }
    return {name: round(float(value), 4) for name, value in figures.items()}


def write_json(path: Path, content: Any) -> None:
    temporary = path.with_suffix(".unfinished")
    temporary.write_text(json.dumps(content, indent=1))
    temporary.rename(path)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", help="as in train_digits.py")
    parser.add_argument("--out", type=Path, default=Path("runs/growth"))
    parser.add_argument("--only", nargs="*", choices=VARIANTS, help="default: all")
    parser.add_argument("--longest", type=int, default=max(SNAPSHOTS), help="steps, at most")
    parser.add_argument("--snapshots", type=Path, help="measure these instead of training")
    parser.add_argument("--name", help="of the training that --snapshots are from")
    parser.add_argument("--num-heads", type=int, help="of the model that --snapshots are of")
    parser.add_argument(
        "--guidance", type=float, default=GUIDANCE, help="for --snapshots (%(default)s)"
    )
    parser.add_argument("--report", action="store_true", help="only write the table and the figure")
    return parser.parse_args()


def measure_snapshots(args: argparse.Namespace, found: dict) -> Iterator[str]:
    for path in sorted(args.snapshots.glob("*.safetensors"), key=lambda p: int(p.stem)):
        if path.stem not in found:
            checkpoint = read_checkpoint(path, args.num_heads)
            found[path.stem] = measurement(checkpoint, args.guidance == GUIDANCE, args.guidance)
            yield path.stem


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "growth.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    if args.snapshots:
        for step in measure_snapshots(args, results.setdefault(args.name, {})):
            print(f"measured {args.name} at step {step}", flush=True)
            write_json(path, results)
    elif not args.report:
        data = tuple(jnp.asarray(a) for a in load_digits(args.data, BASE.input_size))
        # Every variant first, then those that go on for longer.
        for limit in (COMPARED_AT, args.longest):
            for name in args.only or VARIANTS:
                found = results.setdefault(name, {})
                state = args.out / f"{name.replace(' ', '_').replace(',', '')}.state"
                for step in train(VARIANTS[name], data, state, limit, found):
                    print(f"{name}: step {step} {found[str(step)]}", flush=True)
                    write_json(path, results)
    write_report(args.out, results)


if __name__ == "__main__":
    main()
