"""What the device that this runs on makes of quantized products: right ones first, then how fast.

    python experiments/accelerators/bench_accelerator.py --out runs/accelerator            # at most 8 minutes on a GPU or TPU
    python experiments/accelerators/bench_accelerator.py --model tiny --seconds 20 --out runs/tiny      # on a CPU

Three parts, each until its share of `--seconds` is over; what was not reached is named:

1. numerics: every implementation that the device has, against float64, in several formats. The first wrong
   product ends the run, for its time would mean nothing.
2. blocks: on an NVIDIA Hopper or a TPU, the kernels' blocks that are fastest for each layer. They are kept in
   `gpu_tiles.json` or `tpu_blocks.json` of `qdit_jax/kernels` (`--tiles`), a row per device and shape, and the kernels
   take them from then on.
3. steps: a guided step of the network with random weights (`qdit bench`) in float32, bfloat16, W8A8, W4A8
   with two levels of scales, W4A8 in groups of 128, FP8 and W4A16, at each of `--samples`, by every implementation.

Writes OUT/bench_accelerator.json and .md, with device, date and versions. The same command goes on with
the steps that are missing. Nothing is expected yet: it has not run on a GPU or TPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from accelerator_checks import SHAPES, checks, device_name
from block_sweep import GPU, TPU, keep, layers_of, swept

import qdit_jax as qdit
from qdit_jax.kernels import unsupported_reason
from qdit_jax.models import DiT, published_config
from qdit_jax.report import provenance
from qdit_jax.speed import Row, recipe_named
from qdit_jax.types import Progress

TINY = {"input_size": 8, "hidden_size": 128, "depth": 2, "num_heads": 2, "num_classes": 10}
INTEGER = ("w4a8-fast", "w8a8-fast", "w4a8-g128", "fp8_e4m3")  # by integer numerics
WEIGHTS_ALONE = ("w4a16-g128",)
SHARES = {"numerics": 0.25, "blocks": 0.6, "steps": 1.0}  # of the seconds, by when each part ends


class OutOfTimeError(Exception):
    """Raised between two measurements."""


@dataclasses.dataclass
class Clock:
    """When the parts of a run end."""

    seconds: float
    began: float = dataclasses.field(default_factory=time.monotonic)

    def is_over(self, part: str) -> bool:
        return time.monotonic() - self.began > SHARES[part] * self.seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="DiT-XL/2", help="a published size, or tiny")
    parser.add_argument(
        "--samples", type=int, nargs="*", default=[8, 1, 32], help="of a step, the first ones first"
    )
    parser.add_argument("--seconds", type=float, default=420, help="of the whole run (%(default)s)")
    parser.add_argument("--rounds", type=int, default=11, help="timed rounds (%(default)s)")
    parser.add_argument("--tiles", type=Path, help="the table of blocks to add to (the package's)")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    clock = Clock(args.seconds)
    found: dict[str, Any] = {
        "device": device_name(),
        "made": provenance(),
        "model": args.model,
        "left_out": [],
    }
    model = DiT(**(TINY if args.model == "tiny" else published_config(args.model)))
    found["numerics"] = right_products(args.model == "tiny", clock, found["left_out"])
    save(found, args.out)
    wrong = [row for row in found["numerics"] if not row.get("passed", True)]
    if wrong:
        raise SystemExit(f"wrong products, nothing is timed: {json.dumps(wrong, indent=1)}")
    found["blocks"] = fastest_blocks(model, args, clock, found["left_out"])
    save(found, args.out)
    found["steps"] = timed_steps(model, args, clock, found["left_out"])
    save(found, args.out)


def right_products(is_small: bool, clock: Clock, left_out: list[str]) -> list[dict[str, Any]]:
    """Returns the rows of `checks`."""
    rows = []
    for row in checks(SHAPES[:1] if is_small else SHAPES):
        rows.append(row)
        if clock.is_over("numerics"):
            left_out.append(f"numerics after {row['recipe']} {row['shape']}: out of time")
            break
    ran = [row for row in rows if "error" in row]
    print(f"{len(ran)} products by {sorted({row['implementation'] for row in ran})}", flush=True)
    return rows


def fastest_blocks(
    model: DiT, args: argparse.Namespace, clock: Clock, left_out: list[str]
) -> list[dict[str, Any]]:
    """Returns the rows of `swept`, which are added to the table as well."""
    platform = TPU if jax.default_backend() == "tpu" else GPU
    spec = recipe_named("w4a8-fast").rules[0].spec
    reason = unsupported_reason(
        (128, 128), spec.weight, spec.act, "integer", platform.kernel, dtype="bfloat16"
    )
    if reason is not None:
        left_out.append(f"blocks: {reason}")
        return []
    width, hidden = model.hidden_size, int(model.hidden_size * model.mlp_ratio)
    sizes = ((width, hidden), (hidden, width), (width, 3 * width), (width, width))
    tokens = model.num_tokens(model.sample_shape())
    rows: list[dict[str, Any]] = []
    kind, table = jax.devices()[0].device_kind, args.tiles or platform.table
    for layer in layers_of(platform, sizes, [2 * samples for samples in args.samples], tokens):
        if clock.is_over("blocks"):
            left_out.append(f"blocks of {layer}: out of time")
            continue
        found = swept(platform, layer)
        print(layer, *(row["tiles"] for row in found), flush=True)
        keep(platform, found, kind, provenance(), table)
        rows += found
    return rows


def timed_steps(
    model: DiT, args: argparse.Namespace, clock: Clock, left_out: list[str]
) -> list[dict[str, Any]]:
    """Returns the rows of `qdit.bench`, in the order in which they were measured."""
    checkpoint = qdit.Checkpoint(model, random_params(model))
    state = args.out / "steps"

    def stop_in_time(_: Progress) -> None:
        if clock.is_over("steps"):
            raise OutOfTimeError

    for samples in args.samples:
        for recipes, numerics in ((INTEGER, "integer"), (WEIGHTS_ALONE, "simulated")):
            what = f"steps of {samples} samples, {', '.join(recipes)}"
            if clock.is_over("steps"):
                left_out.append(f"{what}: out of time")
                continue
            try:
                qdit.bench(
                    checkpoint,
                    recipes,
                    batches=(samples,),
                    numerics=(numerics,),
                    num_rounds=args.rounds,
                    state=state,
                    progress_fn=stop_in_time,
                )
            except OutOfTimeError:
                left_out.append(f"{what}: out of time, some rows may be missing")
    return read_rows(state)


def read_rows(state: Path) -> list[dict[str, Any]]:
    """Returns what was measured, also by earlier runs of the same command."""
    file = state / "bench.json"
    return list(json.loads(file.read_text())["entries"].values()) if file.exists() else []


def random_params(model: DiT) -> Any:
    """Returns normal weights, made on the device."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs())["params"]
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    values = [0.02 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, values)


def save(found: dict[str, Any], out: Path) -> None:
    """Writes the figures, and a table of them."""
    (out / "bench_accelerator.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "bench_accelerator.md").write_text("\n".join(lines(found)) + "\n")


def lines(found: dict[str, Any]) -> Sequence[str]:
    """Returns the Markdown."""
    made = ", ".join(f"{name} {value}" for name, value in found["made"].items())
    text = [f"# {found['model']} on {found['device']}", "", f"Measured there: {made}.", ""]
    ran = [row for row in found["numerics"] if "error" in row]
    text += ["| implementation | recipe | numerics | dtype | shape | greatest error |"]
    text += ["|---|---|---|---|---|---|"]
    for row in ran:
        shape = " x ".join(map(str, row["shape"]))
        text.append(
            f"| {row['implementation']} | {row['recipe']} | {row['numerics']} | {row['dtype']} "
            f"| {shape} | {row['error']:.1e}{'' if row['passed'] else ' WRONG'} |"
        )
    if found.get("blocks"):
        text += ["", "| rows | K | N | recipe | tokens | fastest blocks | us |"]
        text += ["|---|---|---|---|---|---|---|"]
    for row in found.get("blocks", []):
        blocks = ", ".join(f"{name} {value}" for name, value in row["tiles"].items())
        us = min(row["microseconds"].values())
        text.append(f"| {' | '.join(map(str, row['layer'].values()))} | {blocks} | {us} |")
    if found.get("steps"):
        text += ["", "| samples | network | by | ms a step | ratio | of peak | weights MB | dB |"]
        text += ["|---|---|---|---|---|---|---|---|"]
    for row in (Row.from_json(entry) for entry in found.get("steps", [])):
        by = ", ".join(f"{name} {count}" for name, count in row.implementations.items())
        ms, ratio = row.milliseconds, row.ratio
        text.append(
            f"| {row.batch} | {row.title} | {by} | {ms.median:.2f} ({ms.low:.2f} to {ms.high:.2f}) "
            f"| {ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f}) "
            f"| {'' if row.peak_share is None else f'{row.peak_share:.1%}'} "
            f"| {row.weight_bytes / 1e6:.1f} | {'' if row.db is None else f'{row.db:.1f}'} |"
        )
    return [*text, "", *(f"- Left out: {reason}" for reason in found["left_out"])]


if __name__ == "__main__":
    main()
