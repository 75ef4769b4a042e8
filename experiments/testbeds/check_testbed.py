"""Says whether a checkpoint is hard enough for rankings of quantization methods to mean anything.

    python experiments/testbeds/check_testbed.py demo_dit.safetensors --num-heads 4 --out runs/testbed

Takes about 2 minutes on 2 cores for the demo model, 4 for the wide one. Expected for the shipped
one: every line of the gate passes (`testbed/` holds what was found on every state of both). Reads a checkpoint folder or PyTorch weights; prints each property with its figure and
its threshold, then the gate, in dB of final latents against full precision over the same noise,
labels and steps; writes `testbed.json` and `testbed.png`. Ends with status 1 where the gate fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from testbed_measures import Property, collect, conditions_of, measure, read_checkpoint

import qdit_jax as qdit
from qdit_jax.calibration import default_sampler
from qdit_jax.metrics import bootstrap_interval, paired_test, signal_to_noise_db
from qdit_jax.report import provenance
from qdit_jax.sampling import cyclic_conditions

FAITHFUL_DB = 30.0
COLLAPSE_DB = 12.0
COLLAPSED_DB = 10.0
APART_DB = 3.0
FULL = "full precision"
W8A8 = "W8A8 groups, dynamic"
A8_STATIC = "A8 static per tensor, weights as they are"
STATIC = "W4A8 per channel, static per tensor"
TOKEN = "W4A8 per channel, per token"
GROUPS = "W4A8 groups, static"
DYNAMIC = "W4A8 groups, dynamic"
A4_TOKEN = "W4A4 per channel, per token"
A4_GROUPS = "W4A4 groups, dynamic"


def recipes(group_size: int, others: Sequence[int] = ()) -> dict[str, qdit.Recipe]:
    """Returns the gate's recipes by name, and W4A8 dynamic in groups of the `others`."""
    preset = qdit.Recipe.preset
    found = {
        W8A8: preset("w8a8", group_size=group_size),
        A8_STATIC: preset("w16a8", group_size=0, act_mode="static"),
        STATIC: preset("w4a8", group_size=0, act_mode="static"),
        TOKEN: preset("w4a8", group_size=0),
        GROUPS: preset("w4a8", group_size=group_size, act_mode="static"),
        DYNAMIC: preset("w4a8", group_size=group_size),
        A4_TOKEN: preset("w4a4", group_size=0),
        A4_GROUPS: preset("w4a4", group_size=group_size),
    }
    return found | {f"{DYNAMIC}, {n}": preset("w4a8", group_size=n) for n in others}


def simulated(params: Any) -> Any:
    """Returns `params` with the weights that the codes stand for: what a simulation multiplies by.

    All recipes of one kind of activation quantizer then share a compilation.
    """
    is_quantized = lambda leaf: isinstance(leaf, qdit.QTensor)  # noqa: E731
    return jax.tree.map(
        lambda leaf: qdit.dequantize(leaf) if is_quantized(leaf) else leaf,
        params,
        is_leaf=is_quantized,
    )


def sample_all(
    checkpoint: qdit.Checkpoint,
    sampler: Any,
    recipes: dict[str, qdit.Recipe],
    *,
    num_samples: int,
    seeds: Sequence[int],
    guidance: float,
) -> dict[str, np.ndarray]:
    """Returns final latents `[seeds * samples, H, W, C]` of full precision and of every recipe."""
    model = checkpoint.model
    conditions = conditions_of(model)
    stats = qdit.calibrate(
        checkpoint,
        jax.random.key(10_000),
        num_samples,
        conditions=conditions,
        sampler=sampler,
        guidance=guidance,
        batch_size=num_samples,
    )
    settings = {FULL: checkpoint.params}
    for name, recipe in recipes.items():
        quantized = qdit.quantize_params(checkpoint.params, recipe=recipe, stats=stats)
        settings[name] = simulated(quantized)
    condition = cyclic_conditions(model, conditions, np.arange(num_samples))
    found = {}
    for name, params in settings.items():
        runs = [
            qdit.generate(
                dataclasses.replace(checkpoint, params=params, vae=None),
                sampler,
                condition,
                seed=seed,
                guidance=guidance if model.has_null else None,
                batch_size=num_samples,
            )
            for seed in seeds
        ]
        found[name] = np.concatenate(runs)
        print(f"  sampled {name}", file=sys.stderr, flush=True)
    return found


def decibels(latents: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the signal to the error of full precision, a sample, of every recipe."""
    full = latents[FULL]
    return {name: signal_to_noise_db(full, x) for name, x in latents.items() if name != FULL}


def gate(db: dict[str, np.ndarray]) -> list[Property]:
    """Returns the gate's lines from decibels a sample of every recipe."""
    mean = {name: float(values.mean()) for name, values in db.items()}
    recovered = mean[GROUPS] - mean[STATIC]
    recoverable = max(mean[DYNAMIC] - mean[STATIC], 1e-6)
    dynamic = paired_test(db[DYNAMIC], db[GROUPS]).difference
    return [
        Property("W8A8 is full precision: dB", mean[W8A8], FAITHFUL_DB),
        Property("W4A8 static collapses: dB below 10", COLLAPSED_DB - mean[STATIC], 0.0),
        Property("W4A8 static below groups: dB", recovered, COLLAPSE_DB),
        Property("groups recover most: share", recovered / recoverable, 0.5),
        Property(
            "dynamic recovers more: dB, low end",
            dynamic.low,
            0.0,
            f"{dynamic.estimate:+.2f} [{dynamic.low:+.2f}, {dynamic.high:+.2f}]",
        ),
        Property("W4A4 below W4A8, groups: dB", mean[DYNAMIC] - mean[A4_GROUPS], APART_DB),
        Property("W4A4 per token below groups: dB", mean[A4_GROUPS] - mean[A4_TOKEN], APART_DB),
    ]


def print_table(title: str, lines: list[Property]) -> None:
    print(f"\n{title}")
    for line in lines:
        threshold = "" if line.least is None else f">= {line.least:g}"
        verdict = "" if line.least is None else ("pass" if line.passes else "FAIL")
        print(f"  {line.name:54} {line.value:8.2f}  {threshold:8} {verdict:5} {line.note}".rstrip())


def write_json(path: Path, settings: dict, properties: Any, decibels: Any, lines: Any) -> None:
    """Writes what was measured, when and where, beside and renamed."""
    content = {
        "made": provenance(),
        "settings": settings,
        "properties": [{**line._asdict(), "passes": line.passes} for line in properties],
        "decibels": {name: dataclasses.asdict(found) for name, found in decibels.items()},
        "gate": [{**line._asdict(), "passes": line.passes} for line in lines],
    }
    temporary = path.with_suffix(".unfinished")
    temporary.write_text(json.dumps(content, indent=1))
    temporary.replace(path)


def write_figure(
    path: Path,
    seen: dict[str, dict[str, np.ndarray]],
    latents: dict[str, np.ndarray],
    db: dict[str, np.ndarray],
) -> None:
    """Writes channels' sizes over time of two layers, and the first samples of every recipe."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(13, 9), width_ratios=(1, 2))
    last = max(
        int(name.split("/")[0].removeprefix("blocks_")) for name in seen if "blocks_" in name
    )
    for axis, layer in zip(axes[:, 0], ("attn/qkv", "mlp/fc1"), strict=True):
        name = f"blocks_{last // 2}/{layer}"
        axis.semilogy(np.sort(seen[name]["channel_max"][0], axis=1)[::6].T[::-1])
        axis.set(title=f"{name}: channels' absmax, steps", xlabel="channel, sorted")
    for axis, part in zip(axes[:, 1], np.array_split(np.array(list(latents)), 2), strict=True):
        rows = [np.concatenate(list(pictures_of(latents[name])), axis=1) for name in part]
        axis.imshow(np.concatenate(rows), cmap="gray", vmin=-1, vmax=1)
        height = rows[0].shape[0]
        labels = [f"{n}\n{db[n].mean():.1f} dB" if n in db else n for n in part]
        axis.set_yticks(height * (np.arange(len(part)) + 0.5), labels, fontsize=8)
        axis.set_xticks([])
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def pictures_of(latents: np.ndarray) -> np.ndarray:
    """Returns ten gray pictures of the first samples: of videos the first and the last frame of five."""
    if latents.ndim == 5:
        latents = latents[:5, [0, -1]].reshape(-1, *latents.shape[2:])
    return latents[:10, ..., 0]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--num-heads", type=int, help="of weights that are not a published size")
    parser.add_argument("--out", type=Path, default=Path("runs/testbed"))
    parser.add_argument("--group-size", type=int, help="default: 32 below width 512, else 128")
    parser.add_argument(
        "--group-sizes", type=int, nargs="*", default=[], help="W4A8 dynamic at these too"
    )
    parser.add_argument("--samples", type=int, default=20, help="of each seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--only-measure", action="store_true", help="no gate: weights and inputs")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    checkpoint = read_checkpoint(args.checkpoint, args.num_heads)
    if args.group_size is None:
        args.group_size = 32 if checkpoint.model.hidden_size < 512 else 128
    sampler = default_sampler(checkpoint, args.steps)
    seen = collect(checkpoint, sampler, jax.random.key(20_000), args.samples, args.guidance)
    properties = measure(checkpoint, seen)
    print_table(f"Properties of {args.checkpoint}", properties)
    if args.only_measure:
        return 0
    latents = sample_all(
        checkpoint,
        sampler,
        recipes(args.group_size, args.group_sizes),
        num_samples=args.samples,
        seeds=range(args.seeds),
        guidance=args.guidance,
    )
    db = decibels(latents)
    print(f"\nFinal latents against full precision, dB, groups of {args.group_size}")
    intervals = {name: bootstrap_interval(values) for name, values in db.items()}
    for name, found in intervals.items():
        print(f"  {name:54} {found.estimate:8.2f}  [{found.low:.2f}, {found.high:.2f}]")
    lines = gate(db)
    print_table("Gate", lines)
    args.out.mkdir(parents=True, exist_ok=True)
    kept = ("group_size", "samples", "seeds", "steps", "guidance", "num_heads")
    settings = {"checkpoint": args.checkpoint.name} | {name: vars(args)[name] for name in kept}
    write_figure(args.out / "testbed.png", seen, latents, db)
    write_json(args.out / "testbed.json", settings, properties, intervals, lines)
    passed = all(line.passes for line in lines)
    print(f"\nThe gate {'passes' if passed else 'FAILS'}; wrote {args.out}/testbed.json and .png")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
