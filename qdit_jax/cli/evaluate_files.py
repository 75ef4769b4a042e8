"""The work of `qdit evaluate` on ready-made files."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qdit_jax import metrics
from qdit_jax.cli.progress import Bar
from qdit_jax.errors import UserError
from qdit_jax.files import replaced_file
from qdit_jax.metrics import DEMO_FEATURES, INCEPTION_FEATURES
from qdit_jax.models import (
    DEMO_STATISTICS,
    FeaturesFn,
    asset,
    demo_features_fn,
    inception_features_fn,
)
from qdit_jax.report import provenance, save_picture, side_by_side

NUM_PICTURES = 64
FILE_BATCH = 64
ERRORS = {
    "frechet_distance_infinity": "frechet_distance_infinity_error",
    "inception_score": "inception_score_std",
    "kernel_distance": "kernel_distance_error",
}


@dataclasses.dataclass(frozen=True)
class Judge:
    """What samples are scored with: a feature network, a reference, and the scores' settings."""

    features_fn: FeaturesFn
    features: str
    reference_path: Path
    reference: metrics.Reference
    settings: metrics.ScoreSettings


def evaluate_files(args: argparse.Namespace) -> dict[str, Any]:
    """Scores `args.samples` against `args.reference`, prints a table, writes files asked for.

    Returns what metrics.json holds.

    Raises:
        ValueError: one sentence for anything in the input that would make a number meaningless.
    """
    args.batch_size = FILE_BATCH if args.batch_size is None else args.batch_size
    check_options(args)
    if args.reference is None:
        raise UserError("--samples needs --reference: a .npz file, or `demo`.")
    judge = chosen_judge(args, metrics.image_shape(args.samples), str(args.samples))
    (found,) = score_files(args, judge, [args.samples], args.batch_size)
    summary = describe(args, judge.features, found)
    print_table(summary)
    if args.out:
        with replaced_file(args.out) as temporary:
            temporary.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    if args.pictures:
        sources = {"samples": args.samples}
        if judge.reference.has_images:
            sources["reference"] = judge.reference_path
        write_pictures(args.pictures, sources)
    return summary


def chosen_judge(args: argparse.Namespace, shape: tuple[int, ...], name: str) -> Judge:
    """Returns what `name`, images of `shape [N, H, W, C]`, is to be scored with, all of it checked.

    Raises:
        ValueError: if network, reference and samples do not fit, or the samples are too few.
    """
    reference_path = demo_statistics() if args.reference == "demo" else Path(args.reference)
    reference = metrics.read_reference(reference_path)
    if reference.has_images:
        check_sizes(shape, metrics.image_shape(reference_path), args, name)
    features_fn, features = chosen_features(args)
    settings = metrics.ScoreSettings(
        split_size=args.split_size,
        kernel_samples=args.kernel_samples,
        min_samples=args.min_samples,
        seed=args.seed,
    )
    # A blank batch: what does not fit shows before anything long begins.
    size = min(args.batch_size, shape[0])
    blank = features_fn(np.zeros((size, *shape[1:]), np.uint8))["pool"]
    metrics.check_network(reference, features, blank.shape[1], reference_path)
    metrics.check_num_samples(shape[0], blank.shape[1], settings)
    return Judge(features_fn, features, reference_path, reference, settings)


def score_files(
    args: argparse.Namespace, judge: Judge, paths: Sequence[Path], batch_size: int
) -> list[dict[str, Any]]:
    """Returns the scores of the images in each file, by the names of `metrics.names`."""
    real = None
    if judge.reference.has_images:
        real = features_of(args, judge.features_fn, judge.reference_path, batch_size, "reference")
    return [
        metrics.scores(
            features_of(args, judge.features_fn, path, batch_size, path.stem),
            judge.reference,
            real,
            judge.settings,
        )
        for path in paths
    ]


def check_options(args: argparse.Namespace) -> None:
    """Raises `UserError` if options do not fit together."""
    kind, *rest = args.features
    if kind not in (DEMO_FEATURES, INCEPTION_FEATURES):
        raise UserError(f"--features {kind} is unknown; use `demo`, or `inception CKPT`.")
    if len(rest) != (kind == INCEPTION_FEATURES):
        raise UserError("--features takes `demo` alone, or `inception` and one checkpoint folder.")


def demo_statistics() -> Path:
    """Returns the path of the packaged reference statistics."""
    return Path(str(asset(DEMO_STATISTICS)))


def check_sizes(samples: tuple, reference: tuple, args: argparse.Namespace, name: str) -> None:
    """Raises `UserError` if samples and reference images differ in size."""
    if samples[1:3] != reference[1:3]:
        raise UserError(
            f"{name} holds images of {samples[1]}x{samples[2]} and {args.reference} of "
            f"{reference[1]}x{reference[2]}; scores compare images of one size."
        )


def chosen_features(args: argparse.Namespace) -> tuple[FeaturesFn, str]:
    """Returns the feature function of `--features` and the name its scores are called by."""
    if args.features[0] == DEMO_FEATURES:
        return demo_features_fn(), DEMO_FEATURES
    from qdit_jax.checkpoint import load
    from qdit_jax.models import InceptionV3

    folder = args.features[1]
    checkpoint = load(folder)
    if not isinstance(checkpoint.model, InceptionV3):
        raise UserError(
            f"{folder} holds a {type(checkpoint.model).__name__}, not the Inception network; make "
            "one with `qdit convert pt_inception-2015-12-05-6726825d.pth OUT`."
        )
    half_pixel = getattr(args, "preprocessing", "published") == "port"
    return inception_features_fn(checkpoint.params, half_pixel=half_pixel), INCEPTION_FEATURES


def features_of(
    args: argparse.Namespace, features_fn: FeaturesFn, path: Path, batch_size: int, name: str
) -> metrics.Features:
    """Returns the features of all images in a file, with a progress bar."""
    count = metrics.image_shape(path)[0]
    batches = metrics.image_batches(path, batch_size)
    return metrics.extract(features_fn, progress(args, batches, count, name))


def progress(
    args: argparse.Namespace, batches: Iterator[np.ndarray], count: int, name: str
) -> Iterator[np.ndarray]:
    with Bar(args, count, "image", f"scoring {name}") as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))


def describe(args: argparse.Namespace, features: str, found: dict[str, Any]) -> dict[str, Any]:
    """Returns what `metrics.json` holds: every score with its name in reports and its error."""
    summary = {
        "samples": str(args.samples),
        "reference": str(args.reference),
        "features": features,
        "num_samples": found["num_samples"],
        "seed": args.seed,
        "made": provenance(),
        "scores": labelled(features, found),
    }
    if features == INCEPTION_FEATURES:
        summary["preprocessing"] = args.preprocessing
    return summary


def labelled(features: str, found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns every score with the name that its features allow, and its error if it has one."""
    entries = {}
    for name, value in found.items():
        if name == "num_samples" or name in ERRORS.values():
            continue
        entries[name] = {"label": metrics.label(name, features), "value": value}
        if ERRORS.get(name) in found:
            entries[name]["error"] = found[ERRORS[name]]
    return entries


def print_table(summary: dict[str, Any]) -> None:
    print(f"{summary['num_samples']:,} samples, {summary['features']} features")
    width = max(len(entry["label"]) for entry in summary["scores"].values())
    for entry in summary["scores"].values():
        error = f" ± {entry['error']:.2g}" if "error" in entry else ""
        digits = 4 if abs(entry["value"]) >= 1e-3 else 7
        print(
            f"  {entry['label']:<{width}}  {round(entry['value'], digits) + 0.0:.{digits}f}{error}"
        )


def write_pictures(path: Path, sources: dict[str, Path]) -> None:
    """Writes the first images of every source side by side, enlarged if they are small."""
    firsts = {
        title: next(metrics.image_batches(file, NUM_PICTURES)) for title, file in sources.items()
    }
    height = max(images.shape[1] for images in firsts.values())
    scale = max(1, math.floor(48 / height))
    save_picture(path, side_by_side(firsts, scale=scale))
