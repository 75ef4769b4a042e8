"""What `qdit search` does once its options are read."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import jax

import qdit_jax as qdit
from qdit_jax.allocation import (
    EvolutionSettings,
    LostWorkerError,
    Rollout,
    Rollouts,
    SearchResult,
    frechet_objective,
    search,
    seeds,
    strategy_named,
)
from qdit_jax.calibration import default_sampler
from qdit_jax.cli.checkpoints import full_precision_checkpoint, guidance_of
from qdit_jax.cli.progress import Bar
from qdit_jax.cli.search_pictures import draw_front, draw_map
from qdit_jax.files import replaced_file
from qdit_jax.report import provenance


def run_search(args: argparse.Namespace) -> dict[str, Any]:
    """Searches, prints progress, and writes the results; only the first process writes."""
    join_others(args)
    checkpoint = full_precision_checkpoint(args.checkpoint, "a search compares with full precision")
    args.guidance = guidance_of(checkpoint, args.guidance)
    Rollout.of(checkpoint.model, None, args.guidance)  # refuses before the folder is made
    prepare_folder(args.out, args.force)
    is_first = jax.process_index() == 0
    progress = Progress(args, is_first)
    rollouts = Rollouts(
        num_steps=args.steps,
        guidance=args.guidance,
        num_batches=args.num_batches,
        batch_size=args.batch_size,
        per_device=args.per_device,
    )
    settings = None
    if args.method != "default":
        settings = EvolutionSettings(args.population, args.generations)
    try:
        result = search(
            checkpoint,
            jax.random.key(args.seed),
            budget=args.budget,
            objective=objective_of(args, checkpoint),
            strategy=strategy_named(args.method, settings),
            space=space_settings(args),
            rollouts=rollouts,
            state=args.out / "state",
            report_fn=progress,
        )
    except LostWorkerError as error:
        # A normal exit would wait for the lost process at JAX's barrier, and abort with a dump.
        print(f"\nqdit: error: {error}", file=sys.stderr, flush=True)
        os._exit(2)
    finally:
        progress.close()
    result.history["made"] = {**provenance(), "seed": args.seed}
    if is_first:
        write_result(args.out, result)
        print(summary(result))
        print(
            f"wrote {args.out}: next, qdit quantize {args.checkpoint} DIR --recipe "
            f"{args.out / 'recipe.json'}"
        )
    return {
        "out": args.out,
        "recipe": args.out / "recipe.json",
        "cost": result.budget.shown(result.history["cost"]),
        "limit": result.budget.shown(result.history["limit"]),
        "budget": result.history["budget"],
        "measured": len(result.history["measured"]),
        "report": result.history["report"],
        "seconds": result.history["seconds"],
        "made": result.history["made"],
    }


def join_others(args: argparse.Namespace) -> None:
    """Joins the other processes of a distributed search, if there are any."""
    given = (args.coordinator, args.num_processes, args.process_id)
    if args.distributed:
        jax.distributed.initialize()
    elif any(value is not None for value in given):
        if any(value is None for value in given):
            raise qdit.UserError("--coordinator, --num-processes and --process-id go together.")
        jax.distributed.initialize(*given)


def prepare_folder(out: Path, force: bool) -> None:
    """Makes the folder; a finished search is replaced only if `force`."""
    if (out / "recipe.json").exists() and not force:
        raise qdit.UserError(f"{out} holds a finished search; pass --force to replace it.")
    if jax.process_index() != 0:
        return
    if force and out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    if (out / "state").exists():
        logging.getLogger("qdit_jax").info("going on from %s", out / "state")


def space_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the options that describe the space, those that were given."""
    options = {
        "weight_bits": args.weight_bits,
        "act_bits": args.act_bits,
        "group_sizes": args.group_sizes,
        "sides": args.sides,
        "layers": args.layers,
        "pinned": dict(args.pin),
        "excluded": args.exclude,
    }
    return {name: value for name, value in options.items() if value}


def objective_of(args: argparse.Namespace, checkpoint: qdit.Checkpoint) -> Any:
    """Returns the objective's name, or the Fréchet distance from the reference given."""
    if args.objective != "frechet":
        return args.objective
    from qdit_jax import models as networks
    from qdit_jax.cli.evaluate_files import check_options, chosen_features
    from qdit_jax.metrics import check_network, read_reference

    if args.reference is None:
        raise qdit.UserError("--objective frechet needs --reference, an .npz or `demo`.")
    check_options(args)
    features_fn, _ = chosen_features(args)
    path = networks.asset(networks.DEMO_STATISTICS) if args.reference == "demo" else args.reference
    reference = read_reference(path)
    if reference.pool is None:
        raise qdit.UserError(f"{path} holds no statistics (mu, sigma).")
    check_network(reference, args.features[0], reference.pool.mean.size, path)
    guidance = None if args.method == "qdit-release" else args.guidance
    rollout = Rollout.of(checkpoint.model, default_sampler(checkpoint, args.steps), guidance)
    key = jax.random.split(jax.random.key(args.seed))[0]
    data = seeds(checkpoint.model, key, args.num_batches, args.batch_size)
    return frechet_objective(checkpoint, rollout, data, features_fn, reference.pool)


class Progress:
    """A bar with the best so far and the time left, and lines of text above it.

    It appears at the first rollout; the search says meanwhile how many there will be.
    """

    def __init__(self, args: argparse.Namespace, is_first: bool) -> None:
        self.bar = Bar(args, 0, "rollout", "searching")
        self.bar.shown = self.bar.shown and is_first
        self.is_told = is_first and not args.quiet

    def __call__(self, event: dict[str, Any]) -> None:
        """Shows what happened."""
        if event.get("total") is not None:
            self.bar.expect(event["total"])
        if event.get("best") is not None:
            self.bar.note(best=f"{event['best']:.5g}")
        if event.get("items"):
            self.bar.update(event["items"])
        if event.get("text") and self.is_told:
            self.bar.write(event["text"])

    def close(self) -> None:
        """Ends the bar."""
        self.bar.close()


def write_result(out: Path, result: SearchResult) -> None:
    """Writes history, pictures and, last of all, recipe.json: its presence means all is there."""
    with replaced_file(out / "history.json") as path:
        path.write_text(json.dumps(result.history, indent=1))
    with replaced_file(out / "front.png") as path:
        draw_front(path, result)
    with replaced_file(out / "map.png") as path:
        draw_map(path, result)
    with replaced_file(out / "recipe.json") as path:
        path.write_text(json.dumps(result.recipe.to_json(), indent=1))


def summary(result: SearchResult) -> str:
    """Returns the outcome in a few lines."""
    history = result.history
    report = history["report"]
    cost, limit = (result.budget.shown(history[name]) for name in ("cost", "limit"))
    spent = f"cost {cost:.6g} of {limit:.6g} allowed by {history['budget']}"
    if result.budget.is_mean_group:
        spent = f"mean group size {cost:.6g}, at least {limit:.6g} asked by {history['budget']}"
    lines = [
        spent,
        f"{len(history['measured'])} assignments measured, "
        f"{report['network_evaluations']:,} network evaluations, {history['seconds']:.0f} s",
    ]
    if "rank_correlation" in report:
        found = report["rank_correlation"]
        verdict = "passed" if report["passed"] else "below .9: chosen by measured errors"
        lines.append(
            f"rank correlation additive {found['additive']:.2f}, joint {found['joint']:.2f}: {verdict}"
        )
    return "\n".join(lines)
