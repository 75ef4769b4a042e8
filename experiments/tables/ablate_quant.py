"""Measures what each choice of quantization costs on one checkpoint, in paired error.

    qdit demo --out runs/demo                 # makes runs/demo/model
    python experiments/tables/ablate_quant.py runs/demo/model --out runs/ablation

About 4 minutes on 2 cores with the packaged model. Every setting samples the same noise and labels;
the figure is the signal-to-error ratio of the samples against full precision in dB, the mean over
samples with a bootstrap 95% interval, simulated numerics. Writes `ablation.json`, `ablation.md` and
`ablation.png`. Expected on the packaged model: groups of 32 well above larger ones; GPTQ and AdaRound
5 dB above rounding to nearest; dynamic above static activations; the range rule matters little.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

import qdit_jax as qdit
from qdit_jax import metrics
from qdit_jax.calibration import default_sampler
from qdit_jax.quant import adaround, gptq, ranges
from qdit_jax.report import provenance

SIZES = (32, 64, 0)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One cell of the table: what is varied, and the choice."""

    part: str
    bits: str = "w4a8"
    group_size: int = 32
    range_fn: Any = ranges.minmax
    round_fn: Callable | None = None
    act_mode: str = "dynamic"
    label: str = ""


def settings() -> Iterator[Setting]:
    """Yields a grid of bits and group sizes, then one choice varied at a time at W4A8."""
    for bits in ("w8a8", "w6a8", "w4a8", "w3a8", "w4a4"):
        for size in SIZES:
            yield Setting("bits x group size", bits, size, label=bits.upper())
    rules = {
        "min-max": ranges.minmax,
        "percentile .999": ranges.percentile(0.999),
        "least squared error": ranges.mse(),
        "qdit_release's rule": ranges.qdit_release,
    }
    for name, rule in rules.items():
        for size in SIZES:
            yield Setting("range of the weights", "w4a8", size, rule, label=name)
    for name, round_fn in {"nearest": None, "AdaRound": adaround, "GPTQ": gptq}.items():
        for size in SIZES:
            yield Setting("rounding", "w4a8", size, round_fn=round_fn, label=name)
    for mode in ("dynamic", "static per timestep", "static"):
        for size in SIZES:
            yield Setting("activations", "w4a8", size, act_mode=mode, label=mode)


def quantized(checkpoint: Any, setting: Setting, stats: Any, items: Any) -> Any:
    """Returns the checkpoint's parameters quantized as `setting` says."""
    recipe = qdit.Recipe.preset(
        setting.bits,
        checkpoint.params,
        group_size=setting.group_size,
        range_fn=setting.range_fn,
        act_mode="dynamic" if setting.act_mode == "dynamic" else "static",
        per_timestep=setting.act_mode == "static per timestep",
    )
    if setting.round_fn is None:
        return qdit.quantize_params(checkpoint.params, recipe=recipe, stats=stats)
    return qdit.round_params(
        checkpoint.model, checkpoint.params, items, recipe=recipe, round_fn=setting.round_fn
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="a full-precision checkpoint folder")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--num-samples", type=int, default=60)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = qdit.load(args.checkpoint)
    sampler = default_sampler(checkpoint, args.steps)
    key = jax.random.fold_in(jax.random.key(args.seed), 1)
    stats = qdit.calibrate(checkpoint, key, 20, sampler=sampler, guidance=args.guidance)
    items = qdit.collect_items(checkpoint, key, 64, sampler=sampler, guidance=args.guidance)

    def samples(params: Any) -> np.ndarray:
        changed = dataclasses.replace(checkpoint, params=params)
        labels = np.arange(args.num_samples) % checkpoint.model.num_classes
        return qdit.generate(
            changed,
            sampler,
            labels,
            seed=args.seed,
            guidance=args.guidance,
            batch_size=args.num_samples,
            decode_fn=None,
        )

    full, rows, known = samples(checkpoint.params), [], {}
    for setting in settings():
        same = dataclasses.replace(setting, part="", label="")
        if same not in known:
            ratios = metrics.signal_to_noise_db(
                full, samples(quantized(checkpoint, setting, stats, items))
            )
            known[same] = dataclasses.asdict(metrics.bootstrap_interval(ratios))
        rows.append(
            {"part": setting.part, "choice": setting.label, "group_size": setting.group_size}
            | known[same]
        )
        print(f"{setting.part:22} {line(rows[-1])}", flush=True)
    summary = {
        "made": provenance(),
        "settings": {k: str(v) for k, v in vars(args).items()},
        "numerics": "simulated",
        "rows": rows,
    }
    (args.out / "ablation.json").write_text(json.dumps(summary, indent=1))
    (args.out / "ablation.md").write_text(markdown(rows))
    picture(rows).savefig(args.out / "ablation.png", dpi=110)


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['choice']:22} group {row['group_size']:4}  "
        f"{row['estimate']:5.1f} ({row['low']:.1f} to {row['high']:.1f})"
    )


def by_choice(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[int, dict[str, Any]]]:
    """Returns the rows of every (part, choice) by group size, in order."""
    table: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in rows:
        table.setdefault((row["part"], row["choice"]), {})[row["group_size"]] = row
    return table


def markdown(rows: list[dict[str, Any]]) -> str:
    """Returns the table, one line a choice and one column a group size."""
    heads = ["groups of 32", "groups of 64", "per channel"]
    lines = ["| | | " + " | ".join(heads) + " |", "|" + "---|" * (2 + len(heads))]
    for (part, choice), found in by_choice(rows).items():
        cells = [
            f"{found[s]['estimate']:.1f} ({found[s]['low']:.1f} to {found[s]['high']:.1f})"
            for s in SIZES
        ]
        lines.append(f"| {part} | {choice} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def picture(rows: list[dict[str, Any]]) -> Figure:
    """Returns one panel per part: closeness over group sizes, one line per choice."""
    parts = list(dict.fromkeys(row["part"] for row in rows))
    chart = Figure(figsize=(3.6 * len(parts), 3.6), layout="constrained")
    panels = chart.subplots(1, len(parts), sharey=True)
    for axes, part in zip(panels, parts, strict=True):
        for (of, choice), found in by_choice(rows).items():
            if of != part:
                continue
            means = [found[s]["estimate"] for s in SIZES]
            spread = [
                [found[s]["estimate"] - found[s]["low"] for s in SIZES],
                [found[s]["high"] - found[s]["estimate"] for s in SIZES],
            ]
            axes.errorbar(range(len(SIZES)), means, spread, marker="o", capsize=3, label=choice)
        axes.set(title=part, xticks=range(len(SIZES)), xticklabels=["32", "64", "channel"])
        axes.set_xlabel("group size")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    panels[0].set_ylabel("closeness to full precision, dB")
    return chart


if __name__ == "__main__":
    main()
