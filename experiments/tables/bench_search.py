"""Measures the search: the cost of a candidate, and what each method finds for how much.

    python experiments/tables/bench_search.py --part cost --model demo,small
    python experiments/tables/bench_search.py --part methods --checkpoint demo_ckpt --bits w4a8 --out runs/search

`cost` times one candidate (traced sizes, rollout) against the rollout of a statically quantized
model of the same batch, interleaved; expected: 1.09 times on the demo model, 1.02 on a DiT-S/2, one
compilation.

`methods` searches with every method at equal bit operations for several keys, then measures the
winners and the uniform recipe on seeds that no search saw. It writes methods-BITS.json after every
search, which `experiments/tables/plot_search.py` makes a table and a figure of; a run with the same OUT
goes on from it. Expected on the demo model: the default search finds an error as low as the
evolution's with 1/544 of the evaluations that the published one needs.
About 2 minutes for `cost`, about an hour for `methods` with the settings below, on 2 cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import qdit_jax as qdit
from qdit_jax.allocation import (
    BitOps,
    Evaluator,
    EvolutionSettings,
    Rollout,
    Rollouts,
    cost_table,
    paired_error,
    recipe_of,
    search,
    search_space,
    seeds,
    strategy_named,
    total_cost,
    uniform_assignment,
)
from qdit_jax.calibration import default_sampler
from qdit_jax.metrics import paired_test
from qdit_jax.models import DiT, published_config, rows_per_sample
from qdit_jax.report import provenance
from qdit_jax.testing import realistic_dit

METHODS = ("qdit-paper", "qdit-release", "random", "default")
# 550 candidates, 800 images of 50 steps, conditional and null: the published evolution.
PAPER_EVALUATIONS = 550 * 800 * 50 * 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--part", choices=("cost", "methods"), required=True)
    add("--model", default="demo", help="of cost: demo, small (DiT-S/2 on 16x16 latents), or both")
    add("--checkpoint", type=Path, help="a checkpoint folder; a random network without it")
    add("--bits", default="w4a8")
    add("--group-sizes", type=int, nargs="+", default=[32, 64, 128, 192, 288])
    add("--budget", default="bitops=1.0x-g128")
    add("--methods", nargs="+", default=METHODS)
    add("--keys", type=int, default=3)
    add("--steps", type=int, default=10)
    add("--num-batches", type=int, default=8)
    add("--batch-size", type=int, default=16)
    add("--population", type=int, default=50)
    add("--generations", type=int, default=10)
    add("--evolution-batches", type=int, default=1)
    add("--fresh-batches", type=int, default=12, help="of the final measurement")
    add("--repeats", type=int, default=5)
    add("--out", type=Path, default=Path("runs/search"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part == "cost":
        results = [candidate_cost(name, args) for name in args.model.split(",")]
        (args.out / "cost.json").write_text(json.dumps(results, indent=1))
    else:
        compare(args)


def checkpoint_of(args: argparse.Namespace, name: str = "demo") -> qdit.Checkpoint:
    """Returns the checkpoint given, or a random network with outlier channels."""
    if args.checkpoint is not None and name == "demo":
        return qdit.load(args.checkpoint)
    config = {"input_size": 16, "patch_size": 4, "in_channels": 1, "depth": 6}
    if name == "small":
        config = {**published_config("DiT-S/2"), "input_size": 16, "in_channels": 4}
    model, params = realistic_dit(0, **config)
    assert isinstance(model, DiT)
    return qdit.Checkpoint(model, jax.tree.map(jax.numpy.asarray, params))


def candidate_cost(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Returns seconds of a candidate and of a plain quantized rollout, the least of several."""
    checkpoint = checkpoint_of(args, name)
    params = checkpoint.params
    rows = rows_per_sample(checkpoint.model)
    space = search_space(params, rows=rows, group_sizes=args.group_sizes)
    rollout = Rollout.of(checkpoint.model, default_sampler(checkpoint, args.steps), 1.5)
    data = seeds(checkpoint.model, jax.random.key(0), 1, args.batch_size)
    evaluator = Evaluator(space, params, paired_error(rollout, params, *data))
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, space.num_choices, (args.repeats, len(space.layers)))
    statics = [qdit.quantize_params(params, recipe=recipe_of(space, drawn[i])) for i in range(1)]
    run = jax.jit(lambda rollout, *rest: rollout(*rest))
    one = tuple(a[0] for a in data)
    began = time.perf_counter()
    evaluator(drawn[:1])
    compiled = time.perf_counter() - began
    times: dict[str, list[float]] = {"candidate": [], "quantized": [], "full": []}
    for assignment in drawn:
        for kind, call in (
            ("candidate", lambda a=assignment: evaluator(a)),
            ("quantized", lambda: run(rollout, statics[0], *one).block_until_ready()),
            ("full", lambda: run(rollout, params, *one).block_until_ready()),
        ):
            if not times[kind] and kind != "candidate":
                call()  # compiles
            began = time.perf_counter()
            call()
            times[kind].append(time.perf_counter() - began)
    least = {kind: min(values) for kind, values in times.items()}
    result = {
        "model": name,
        "seconds": least,
        "ratio": least["candidate"] / least["quantized"],
        "compilations": evaluator.num_compilations,
        "compile_seconds": compiled,
    }
    print(
        f"{name}: candidate {least['candidate']:.3f} s, quantized rollout {least['quantized']:.3f} s, "
        f"full precision {least['full']:.3f} s: ratio {result['ratio']:.3f} "
        f"({evaluator.num_compilations} compilation)",
        flush=True,
    )
    return result


def compare(args: argparse.Namespace) -> None:
    """Searches with every method and key; measures winners and the uniform recipe afresh."""
    checkpoint = checkpoint_of(args)
    weight_bits, act_bits = (int(bits) for bits in args.bits.removeprefix("w").split("a"))
    bits = {"weight_bits": weight_bits, "act_bits": act_bits, "group_sizes": args.group_sizes}
    space = search_space(checkpoint.params, rows=rows_per_sample(checkpoint.model), **bits)
    rollout = Rollout.of(checkpoint.model, default_sampler(checkpoint, args.steps), 1.5)
    # Seeds that no search saw: another key.
    fresh = seeds(checkpoint.model, jax.random.key(10_000), args.fresh_batches, args.batch_size)
    objective = paired_error(rollout, checkpoint.params, *fresh)
    size = int(args.budget.rpartition("-g")[2])
    uniform_bitops = total_cost(cost_table(space, BitOps()), uniform_assignment(space, size))
    path = args.out / f"methods-{args.bits}.json"
    results = started(path, args)
    known = {(row["method"], row["key"]) for row in results["runs"]}
    measure = {}

    def errors_of(found_space: Any, assignment: Any) -> np.ndarray:
        # The release's space has other choices (symmetric, weights only): its own program.
        if found_space not in measure:
            measure[found_space] = Evaluator(found_space, checkpoint.params, objective)
        return np.asarray(measure[found_space].measurements(assignment)[0]).ravel()

    uniform = errors_of(space, uniform_assignment(space, size))
    print(f"uniform {size}: {uniform.mean():.4g}", flush=True)
    results["uniform"] = {"error": float(uniform.mean()), "errors": uniform.tolist()}
    for key, method in itertools.product(range(args.keys), args.methods):
        if (method, key) in known:
            continue
        is_default = method == "default"
        settings = None if is_default else EvolutionSettings(args.population, args.generations)
        budget = f"mean-group={size}" if method == "qdit-release" else args.budget
        found = search(
            checkpoint,
            jax.random.key(key),
            budget=budget,
            strategy=strategy_named(method, settings),
            rollouts=Rollouts(
                num_steps=args.steps,
                num_batches=args.num_batches if is_default else args.evolution_batches,
                batch_size=args.batch_size,
                state=args.out / f"state-{args.bits}-{method}-{key}",
            ),
            # Symmetric is off for the release's search too: only what it varies is compared.
            space={**bits, "symmetric": False},
        )
        bitops = total_cost(cost_table(found.space, BitOps()), found.assignment)
        errors = errors_of(found.space, found.assignment)
        test = paired_test(errors, uniform)
        report = found.history["report"]
        row = {
            "method": method,
            "key": key,
            "error": float(errors.mean()),
            "errors": errors.tolist(),
            "relative_to_uniform": float(errors.mean() / uniform.mean() - 1),
            "interval": [test.difference.low, test.difference.high],
            "cost": found.history["cost"],
            "limit": found.budget.limit,
            "bitops_of_uniform": float(bitops / uniform_bitops),
            "network_evaluations": report["network_evaluations"],
            "seconds": found.history["seconds"],
            "made": provenance(),
            "rank_correlation": report.get("rank_correlation"),
        }
        results["runs"].append(row)
        path.write_text(json.dumps(results, indent=1))
        print(
            f"key {key} {method:12} error {row['error']:.4g} ({row['relative_to_uniform']:+.1%} "
            f"of uniform {size}; difference [{test.difference.low:.2g}, {test.difference.high:.2g}])  "
            f"{row['network_evaluations']:,} evaluations, "
            f"1/{PAPER_EVALUATIONS / row['network_evaluations']:.0f} of the published "
            f"evolution's, {row['seconds']:.0f} s  {row['rank_correlation'] or ''}",
            flush=True,
        )


def started(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the results so far of the same settings, or none."""
    varied = ("methods", "keys")  # rows are added for these
    settings = {k: str(v) for k, v in vars(args).items()}
    if path.exists():
        results = json.loads(path.read_text())
        others = {
            k: (v, settings.get(k))
            for k, v in results["settings"].items()
            if k not in varied and v != settings.get(k)
        }
        if others:
            raise SystemExit(f"{path} holds results of other settings {others}; use another --out.")
        return results
    return {"settings": settings, "runs": []}


if __name__ == "__main__":
    main()
