"""Measures what a search over transforms finds beside one over group sizes alone, both made by `best`.

    python experiments/tables/search_choices.py --out runs/search_choices

On the packaged model, for every setting: (a) the search of group sizes, quantized by `best`, which
then chooses transforms by itself; (b) the joint search of group sizes and transforms, quantized by
`best`; (c) groups of 128 throughout, quantized by `best`; and (d) the same with rounding to nearest
alone. Each is measured on samples that no search saw, and its cost is counted from what was made:
`best` adds maps, rotations and branches to (a) and (c) that no budget limited.

A run with the same OUT goes on from what it had: searches from their state, rows from
OUT/search_choices.json. About 25 minutes on 2 cores with other work. Expected at bitops=1.0x-g128: 31.2 dB
with transforms searched, 30.6 with sizes alone, 30.8 with groups of 128, 6.8 rounded to nearest.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

import qdit_convert
import qdit_jax as qdit
from qdit_jax.allocation import (
    Allocate,
    AllocationSettings,
    BitOps,
    Bytes,
    Rollout,
    Rollouts,
    describe,
    paired_error,
    recipe_of,
    search_space,
    seeds,
    uniform_assignment,
)
from qdit_jax.calibration import default_sampler
from qdit_jax.methods import CalibrationData, spread_items
from qdit_jax.models import rows_per_sample
from qdit_jax.quant import slots
from qdit_jax.report import provenance

HEADS = 4
SIZES = (32, 64, 128, 0)
TRANSFORMS = ("none", "smooth", "smooth+hadamard")
# (bits of activations, budget)
SETTINGS = ((8, "bitops=1.0x-g128"), (8, "bytes=1.0x-g128"))
STEPS, FIRST_UNSEEN = 10, 10_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the searches")
    parser.add_argument("--num-samples", type=int, default=64, help="that rows are measured on")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    source = Path(qdit.__file__).parent / "assets/demo_dit.safetensors"
    qdit_convert.convert(source, args.out / "ckpt", num_heads=HEADS, force=True)
    checkpoint = qdit.load(args.out / "ckpt")
    data = CalibrationData(num_samples=16, num_steps=20)
    data = CalibrationData(items=spread_items(checkpoint, data))
    error_fn = final_error(checkpoint, args.num_samples)
    table = Table(args.out / "search_choices.json")
    for seed in args.seeds:
        for act_bits, budget in SETTINGS:
            for name, make in recipes_of(
                checkpoint, data, act_bits, budget, seed, args.out
            ).items():
                key = f"w4a{act_bits} {budget} seed {seed}: {name}"
                table.row(key, lambda make=make: measured(checkpoint, data, error_fn, *make()))


class Table:
    """Rows by name in a JSON file, written after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def row(self, key: str, make: Callable[[], dict[str, Any]]) -> None:
        """Makes the row if it is not there, and prints it."""
        if key not in self.rows:
            began = time.perf_counter()
            self.rows[key] = make() | {
                "seconds": round(time.perf_counter() - began),
                "made": provenance(),
            }
            self.path.write_text(json.dumps(self.rows, indent=1))
        row = self.rows[key]
        print(key, {k: row[k] for k in ("final_db", "bytes", "bitops", "seconds")}, flush=True)


def recipes_of(
    checkpoint: qdit.Checkpoint,
    data: CalibrationData,
    act_bits: int,
    budget: str,
    seed: int,
    out: Path,
) -> dict[str, Callable[[], tuple[qdit.Recipe, str, dict[str, Any]]]]:
    """Returns what makes the recipe, the method and facts of every row, by its name."""
    settings = {"weight_bits": 4, "act_bits": act_bits, "group_sizes": SIZES}

    def uniform() -> qdit.Recipe:
        space = search_space(checkpoint.params, **settings)
        return recipe_of(space, uniform_assignment(space, 128), "uniform")

    def found(name: str, more: dict[str, Any]) -> tuple[qdit.Recipe, str, dict[str, Any]]:
        result = qdit.search(
            checkpoint,
            jax.random.key(seed),
            budget=budget,
            space={**settings, **more},
            strategy=Allocate(AllocationSettings(num_gate=20, rungs=(1, 4))),
            rollouts=Rollouts(
                num_steps=STEPS,
                num_batches=4,
                batch_size=8,
                num_calibration=1,
                num_probes=4,
                data=data,
                state=out / f"state-w4a{act_bits}-{budget}-{seed}-{name}",
            ),
            progress_fn=lambda event: event.text and print(" ", event.text, flush=True),
        )
        history = result.history
        report = history["report"]
        facts = {
            "search_seconds": round(history["seconds"]),
            "network_evaluations": report["network_evaluations"],
            "rank_correlation": report["rank_correlation"],
            "finalists": report["finalists"][-1]["fitness"],
            "cost": history["cost"],
            "limit": history["limit"],
            "chosen": {
                layer.path: describe(layer.choices[i])
                for layer, i in zip(result.space.layers, result.assignment, strict=True)
            },
        }
        return result.recipe, "best", facts

    return {
        "uniform 128, rtn": lambda: (uniform(), "rtn", {}),
        "uniform 128, best": lambda: (uniform(), "best", {}),
        "sizes searched, best": lambda: found("sizes", {}),
        "sizes and transforms searched, best": lambda: found("joint", {"transforms": TRANSFORMS}),
    }


def measured(
    checkpoint: qdit.Checkpoint,
    data: CalibrationData,
    error_fn: Callable[[Any], float],
    recipe: qdit.Recipe,
    method: str,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Returns the error of the network that a method makes of a recipe, and what it costs."""
    made = qdit.quantize(checkpoint, method, recipe, data=data)
    error = error_fn(made.params)
    found = {"final_db": round(-10 * math.log10(error), 3), "error": error}
    return found | costs_of(checkpoint, made) | facts | {"recipe": recipe.to_json()}


def costs_of(checkpoint: qdit.Checkpoint, made: qdit.Checkpoint) -> dict[str, float]:
    """Returns bytes and bit operations of the quantized layers, counted from what stands in them."""
    assert made.recipe is not None
    rows = rows_per_sample(checkpoint.model)
    specs = made.recipe.for_rounding().resolve(checkpoint.params)
    flat = flatten_dict(made.params, sep="/")
    plain = search_space(checkpoint.params, rows=rows, pinned={p: s for p, s in specs.items()})
    held = ops = 0.0
    for layer in plain.layers:
        spec = specs[layer.path]
        names = ("kernel", *slots("input"), *slots("output"))
        beside = {name: flat.get(f"{layer.path}/{name}") for name in names}
        held += sum(leaf.nbytes for leaf in jax.tree.leaves(list(beside.values())))
        turned = rotation_adds(beside["rotation"], layer.shape[0])
        branch = (
            0 if beside["low_rank"] is None else beside["low_rank"].down.shape[1] * sum(layer.shape)
        )
        mapped = 0 if beside["input_map"] is None else layer.shape[0]
        ops += BitOps()(layer, spec) + layer.rows * (1024 * mapped + 256 * (turned + branch))
    assert held >= sum(Bytes()(layer, specs[layer.path]) for layer in plain.layers)
    return {"bytes": held, "bitops": ops}


def rotation_adds(rotation: Any, channels: int) -> int:
    """Returns the multiply-adds of a regular Hadamard rotation per row of the input."""
    return 0 if rotation is None else channels * 4 * ((rotation.size.bit_length() - 1) // 2)


def final_error(checkpoint: qdit.Checkpoint, num_samples: int) -> Callable[[Any], float]:
    """Returns a function of parameters: the error of final latents on samples no search saw."""
    rollout = Rollout.of(checkpoint.model, default_sampler(checkpoint, STEPS), 1.5)
    data = seeds(checkpoint.model, jax.random.key(99), num_samples // 16, 16, FIRST_UNSEEN)
    objective = paired_error(rollout, checkpoint.params, *data)
    run = jax.jit(lambda objective, params, batch: objective.measure(params, batch))

    def error(params: Any) -> float:
        return float(np.mean([run(objective, params, i) for i in range(num_samples // 16)]))

    return error


if __name__ == "__main__":
    main()
