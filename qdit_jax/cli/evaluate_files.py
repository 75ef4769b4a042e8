"""The work of `qdit evaluate` on ready-made files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from qdit_jax import metrics
from qdit_jax.cli.progress import Bar
from qdit_jax.evaluation import Scoring, labeled
from qdit_jax.files import AnyPath, PathLike, check_apart, check_free, replaced_file
from qdit_jax.metrics import INCEPTION_FEATURES
from qdit_jax.report import provenance, save_picture, side_by_side

NUM_PICTURES = 64


def evaluate_files(
    samples: AnyPath,
    scoring: Scoring,
    *,
    out: AnyPath | None,
    pictures: AnyPath | None,
    force: bool,
) -> dict[str, Any]:
    """Scores a file of images, prints a table, and writes the files that are asked for.

    Returns what metrics.json holds.

    Raises:
        ValueError: one sentence for anything in the input that would make a number meaningless.
    """
    inputs = [samples, *scoring.inputs]
    for path, kind in ((out, "figures"), (pictures, "picture")):
        if path is not None:
            check_free(path, force, kind, inputs)
    if out is not None:
        check_apart(out, [pictures])
    judge = scoring.judge(metrics.image_shape(samples), str(samples))
    (found,) = judge.scores([samples], watched)
    summary = {
        "samples": str(samples),
        "reference": str(scoring.reference),
        "features": judge.features,
        "num_samples": found["num_samples"],
        "seed": scoring.settings.seed,
        "made": provenance(),
        "scores": labeled(judge.features, found),
    }
    if judge.features == INCEPTION_FEATURES:
        summary["preprocessing"] = scoring.preprocessing
    print_table(summary)
    if out:
        with replaced_file(out, "figures") as temporary:
            temporary.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    if pictures:
        sources = {"samples": samples}
        if judge.reference.has_images:
            sources["reference"] = judge.reference_path
        write_pictures(pictures, sources)
    return summary


def watched(batches: Iterator[np.ndarray], count: int, name: str) -> Iterator[np.ndarray]:
    """Yields the batches of a file and shows how many images were scored."""
    with Bar(count, "image", f"scoring {name}") as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))


def print_table(summary: dict[str, Any]) -> None:
    """Prints the scores, one per line."""
    print(f"{summary['num_samples']:,} samples, {summary['features']} features")
    width = max(len(entry["label"]) for entry in summary["scores"].values())
    for entry in summary["scores"].values():
        error = f" ± {entry['error']:.2g}" if "error" in entry else ""
        digits = 4 if abs(entry["value"]) >= 1e-3 else 7
        print(
            f"  {entry['label']:<{width}}  {round(entry['value'], digits) + 0.0:.{digits}f}{error}"
        )


def write_pictures(path: PathLike, sources: dict[str, AnyPath]) -> None:
    """Writes the first images of every source side by side, enlarged if they are small."""
    firsts = {
        title: next(metrics.image_batches(file, NUM_PICTURES)) for title, file in sources.items()
    }
    height = max(images.shape[1] for images in firsts.values())
    scale = max(1, math.floor(48 / height))
    save_picture(path, side_by_side(firsts, scale=scale))
