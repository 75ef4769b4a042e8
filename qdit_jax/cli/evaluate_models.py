"""The work of `qdit evaluate` on checkpoints."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qdit_jax.calibration import Stats, calibrate
from qdit_jax.checkpoint import Checkpoint
from qdit_jax.cli.checkpoints import diffusion_checkpoint, with_autoencoder
from qdit_jax.cli.evaluate_files import (
    FILE_BATCH,
    Judge,
    check_options,
    chosen_judge,
    labelled,
    score_files,
)
from qdit_jax.cli.progress import Bar
from qdit_jax.cli.sample_run import chosen_channels, chosen_sampler, own_walk_text
from qdit_jax.errors import UserError
from qdit_jax.evaluation import (
    MEASURES,
    Contender,
    Protocol,
    Run,
    compared_pictures,
    merge,
    run_evaluation,
    summarize,
    write_evaluation,
)
from qdit_jax.files import replaced_file
from qdit_jax.report import save_picture
from qdit_jax.sampling import (
    check_numerics,
    conditions_in_turn,
    decode,
    denoiser,
    num_guided_channels,
)

DEFAULT_OUT = Path("qdit-evaluate")


def evaluate_models(args: argparse.Namespace) -> dict[str, Any]:
    """Samples, measures, scores, prints tables and writes the folder `args.out`.

    Returns what metrics.json holds.

    Raises:
        ValueError: one sentence for anything that would make a number meaningless.
    """
    check_arguments(args)
    out = args.out or DEFAULT_OUT
    if out.suffix in (".json", ".html", ".npz", ".png"):
        raise UserError(f"--out {out}: of checkpoints, it is a folder for all results.")
    contenders = loaded(args)
    model = contenders[0].checkpoint.model
    args.guidance_channels = num_guided_channels(model, args.guidance_channels)
    for contender in contenders:  # what guidance does not fit, before the folder is made
        denoiser(contender.checkpoint.model, {}, args.guidance, args.guidance_channels)
    protocol = chosen_protocol(args, contenders)
    judge = None
    if args.reference is not None:
        judge = judge_of(args, contenders)
    if (out / "shards").exists():
        logging.getLogger("qdit_jax").info("going on from %s", out)
    with Bar(args, args.num_samples, "sample", "sampling", resumes=True) as bar:
        run = run_evaluation(contenders, protocol, out, bar.update)
    label = conditions_in_turn(model, None, np.arange(args.num_samples))
    files = merged(run, contenders, label)
    scores = {}
    if judge is not None:
        found = score_files(args, judge, files, args.batch_size or FILE_BATCH)
        scores = {
            c.title: labelled(judge.features, f) for c, f in zip(contenders, found, strict=True)
        }
    stats = range_stats(args, contenders[0].checkpoint, protocol, out / "ranges.npz")
    summary = summarize(run, contenders, scores)
    if judge is not None:
        summary["settings"]["reference"] = str(args.reference)
        summary["settings"]["features"] = judge.features
    write_results(out, run, contenders, summary, stats)
    print_summary(summary)
    print(
        f"wrote {out / 'report.html'}, {out / 'metrics.json'} and {files[-1 if len(files) < 3 else 1]}"
    )
    return summary


def check_arguments(args: argparse.Namespace) -> None:
    """Raises `UserError` if options do not fit together."""
    if args.compare is not None and args.against is None:
        raise UserError("--compare OTHER needs --against REF: both are held against it.")
    check_options(args)
    args.guidance_channels = chosen_channels(args)


def loaded(args: argparse.Namespace) -> list[Contender]:
    """Returns the contenders, the reference first, each with an autoencoder where one is known."""
    paths = [p for p in (args.against, args.checkpoint, args.compare) if p is not None]
    found = [with_autoencoder(diffusion_checkpoint(path), args.vae) for path in paths]
    check_all_numerics(args, found)
    known = next((c.vae for c in found if c.vae is not None), None)
    return [
        Contender(title, dataclasses.replace(c, vae=c.vae or known))
        for title, c in zip(titles(paths), found, strict=True)
    ]


def check_all_numerics(args: argparse.Namespace, found: list[Checkpoint]) -> None:
    """Raises `ValueError` if integer numerics has no effect on any of the checkpoints."""
    for i, checkpoint in enumerate(found):
        try:
            check_numerics(checkpoint.params, args.numerics)
            return
        except ValueError:
            if i == len(found) - 1:
                raise


def titles(paths: list[Path]) -> list[str]:
    """Returns the folders' names, or as much of each path as tells them apart."""
    names = [path.resolve().name for path in paths]
    if len(set(names)) == len(names):
        return names
    names = [str(path) for path in paths]
    if len(set(names)) == len(names):
        return names
    return [f"{name} ({i})" for i, name in enumerate(names, 1)]


def chosen_protocol(args: argparse.Namespace, contenders: list[Contender]) -> Protocol:
    sampler = chosen_sampler(args, contenders[0].checkpoint)
    record = {
        "sampler": type(sampler).__name__,
        "steps": args.steps,
        "eta": args.eta,
        "clip": args.clip,
    }
    walk = own_walk_text(args, contenders[0].checkpoint)
    if walk is not None:
        record["walk"] = walk
        print(walk)
    return Protocol(
        sampler,
        record,
        args.num_samples,
        seed=args.seed,
        guidance=args.guidance,
        guidance_channels=args.guidance_channels,
        numerics=args.numerics,
        batch_size=args.batch_size,
    )


def judge_of(args: argparse.Namespace, contenders: list[Contender]) -> Judge:
    """Returns what the images to come are scored with; checks sizes and counts beforehand."""
    shape = image_shape(contenders[0].checkpoint)
    if shape is None:
        raise UserError(
            "the models make latents and no autoencoder is known; give --vae CHECKPOINT to score "
            "images against --reference."
        )
    batch_size, args.batch_size = args.batch_size, args.batch_size or FILE_BATCH
    try:
        return chosen_judge(args, (args.num_samples, *shape), str(args.checkpoint))
    finally:
        args.batch_size = batch_size


def image_shape(checkpoint: Checkpoint) -> tuple[int, ...] | None:
    """Returns rows, columns and channels of a checkpoint's images; None if it makes latents."""
    shape = checkpoint.model.sample_shape()
    vae = checkpoint.vae
    if vae is None:
        return shape if shape[-1] in (1, 3) else None
    latents = jax.ShapeDtypeStruct((1, *shape), np.float32)
    return jax.eval_shape(lambda z: decode(vae, z), latents).shape[1:]


def merged(run: Run, contenders: list[Contender], label: np.ndarray) -> list[Path]:
    """Writes the samples of each contender and returns the files, in their order.

    `samples.npz` is the checkpoint under evaluation.
    """
    names = ["samples.npz"]
    if len(contenders) > 1:
        names = ["reference_samples.npz", "samples.npz", "compared_samples.npz"]
    files = []
    for i, (contender, name) in enumerate(zip(contenders, names, strict=False)):
        decoded = image_shape(contender.checkpoint) is not None
        array, member = ("images", "arr_0") if decoded else ("latents", "latents")
        file = run.folder / name
        merge(run.folder, run.ranges, f"{i}/{array}", file, member, label=label)
        files.append(file)
    return files


def range_stats(
    args: argparse.Namespace, checkpoint: Checkpoint, protocol: Protocol, file: Path
) -> Stats | None:
    """Returns the ranges of the first model's inputs, kept in `file` for the next time."""
    if args.range_samples == 0:
        return None
    count = min(args.range_samples, args.num_samples)
    if file.is_file():
        return Stats.load(file)
    stats = calibrate(
        checkpoint,
        jax.random.key(args.seed),
        count,
        sampler=protocol.sampler,
        guidance=args.guidance,
        batch_size=count,
    )
    stats.save(file)
    return stats


def write_results(
    out: Path,
    run: Run,
    contenders: list[Contender],
    summary: dict[str, Any],
    stats: Stats | None,
) -> None:
    """Writes metrics.json, pictures.png and report.html."""
    with replaced_file(out / "metrics.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    pictures = compared_pictures(run, contenders)
    if pictures is not None:
        save_picture(out / "pictures.png", pictures)
    write_evaluation(out / "report.html", summary, contenders, pictures, stats)


def print_summary(summary: dict[str, Any]) -> None:
    first = summary["models"][0]
    for model in summary["models"]:
        timed = "" if model["num_timings"] > 1 else ", one timing: noisy"
        print(
            f"{model['title']}: {model['numerics']}, {model['bytes']:,} bytes "
            f"({first['bytes'] / model['bytes']:.2f}x smaller), "
            f"{model['seconds_per_sample']:.3g} s a sample{timed}"
        )
    for title, measures in summary["paired"].items():
        print(
            f"{title} against {first['title']}, {summary['settings']['num_samples']:,} samples, 95% intervals"
        )
        for name, entry in measures.items():
            digits = 2 if name.endswith("_db") else 4
            low, high = (f"{entry[end]:.{digits}f}" for end in ("low", "high"))
            print(f"  {MEASURES[name]:36} {entry['estimate']:.{digits}f} ({low} to {high})")
    for name, test in summary.get("comparison", {}).get("a_minus_b", {}).items():
        difference = test["difference"]
        print(
            f"  {summary['comparison']['a']} minus {summary['comparison']['b']}, {MEASURES[name]}: "
            f"{difference['estimate']:.4g} ({difference['low']:.4g} to {difference['high']:.4g}), "
            f"p = {test['p_value']:.2g}"
        )
    for title, entries in summary["scores"].items():
        for entry in entries.values():
            error = f" ± {entry['error']:.2g}" if "error" in entry else ""
            print(f"  {title}: {entry['label']} {entry['value']:.4f}{error}")
