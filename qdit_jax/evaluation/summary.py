"""The numbers of a finished evaluation, as `metrics.json` holds them, from the shards on disk."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qdit_jax import metrics
from qdit_jax.checkpoint import dtype_of
from qdit_jax.evaluation.runs import Run
from qdit_jax.evaluation.store import collect
from qdit_jax.evaluation.trajectories import Contender
from qdit_jax.report import provenance

Table = Mapping[str, Sequence[np.ndarray]]  # a measure's arrays, one per shard

MEASURES = {
    "latent_snr_db": "final latents: signal to error, dB",
    "latent_worst_frame_db": "final latents: worst frame, dB",
    "latent_cosine": "final latents: cosine",
    "image_snr_db": "images: signal to error, dB",
    "image_worst_frame_db": "images: worst frame, dB",
    "image_psnr_db": "images: PSNR, dB",
    "image_ssim": "images: SSIM",
    "image_cosine": "images: cosine",
    "flicker_error": "flicker error (less is closer)",
}
ERRORS = {"flicker_error"}  # measures of which less is closer
FRAMES = {
    "latent_frame_db": "final latents: signal to error of each frame, dB",
    "image_frame_db": "images: signal to error of each frame, dB",
}
TRAJECTORY = {
    "output_db": "one call of the network, the same input",
    "drift_db": "the samples after each step (drift)",
}


def summarize(
    run: Run,
    contenders: Sequence[Contender],
    scores: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Returns settings, models, paired measures, trajectories and tests, JSON-serializable.

    `scores` are the distribution scores by title, stored in `metrics.json` as they are.
    """
    table = collect(run.folder, run.ranges)
    pairs = list(enumerate(contenders))[1:]
    device = sorted({str(name) for name in table["device"]})
    summary: dict[str, Any] = {
        "settings": {**run.settings, "device": device},
        "made": provenance(),
        "models": [model_facts(run, table, i, c) for i, c in enumerate(contenders)],
        "paired": {c.title: paired(table, i) for i, c in pairs},
        **clip_facts(table, contenders),
        "trajectory": {c.title: trajectory(table, i) for i, c in pairs},
        "scores": dict(scores or {}),
    }
    if len(contenders) == 3:
        summary["comparison"] = comparison(table, contenders)
    return summary


def model_facts(run: Run, table: Table, number: int, contender: Contender) -> dict[str, Any]:
    """Returns size, numerics and time of one contender."""
    checkpoint = contender.checkpoint
    seconds, compile_seconds = (
        np.array(table[f"{number}/{name}"], np.float64) for name in ("seconds", "compile_seconds")
    )
    batch = run.ranges[0][1] - run.ranges[0][0]
    return {
        "title": contender.title,
        "recipe": None if checkpoint.recipe is None else checkpoint.recipe.name,
        "numerics": precision(contender, run.settings["numerics"]),
        "dtype": dtype_of(checkpoint),
        "implementations": counted(table, number, "implementations"),
        "attention": counted(table, number, "attention"),
        "bytes": num_bytes(checkpoint.params),
        "seconds_per_sample": float(np.median(seconds)) / batch,
        "num_timings": len(seconds),
        "compile_seconds": float(compile_seconds.max()),
    }


def precision(contender: Contender, chosen: str) -> str:
    """Returns how the numbers of a contender were computed, in words."""
    quantized = contender.checkpoint.recipe is not None
    return f"quantized, {chosen} numerics" if quantized else "full precision"


def counted(table: Table, number: int, name: str) -> dict[str, int]:
    """Returns how many layers or attentions of a contender each implementation computed, on all its devices."""
    stored = {str(text) for text in table.get(f"{number}/{name}", ())}
    return {name: count for text in sorted(stored) for name, count in json.loads(text).items()}


def num_bytes(tree: object) -> int:
    """Returns the bytes of a leaf, or of all leaves of a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def measure(table: Table, number: int, name: str) -> np.ndarray | None:
    """Returns one measure of all samples, or None where it was not taken."""
    found = table.get(f"{number}/{name}")
    return np.concatenate(found) if found else None


def paired(table: Table, number: int) -> dict[str, dict[str, float]]:
    """Returns the mean of each measure with its 95% interval over samples, and the worst sample."""
    result = {}
    for name in MEASURES:
        values = of_all_samples(table, number, name)
        if values is not None:
            result[name] = with_worst(values, most=name in ERRORS)
    return result


def with_worst(values: np.ndarray, most: bool = False) -> dict[str, float]:
    """Returns the mean over samples with its 95% interval, the worst value, and whose it is.

    Args:
        most: whether the greatest value is the worst; else the least is.
    """
    number = int(values.argmax() if most else values.argmin())
    found = dataclasses.asdict(metrics.bootstrap_interval(values))
    return {**found, "worst": float(values[number]), "worst_sample": number}


def of_all_samples(table: Table, number: int, name: str) -> np.ndarray | None:
    """Returns one measure of all samples; None where a shard lacks it, as those of earlier releases."""
    if len(table.get(f"{number}/{name}", ())) != len(table[f"{number}/seconds"]):
        return None
    return measure(table, number, name)


def clip_facts(table: Table, contenders: Sequence[Contender]) -> dict[str, Any]:
    """Returns `frames`, errors frame by frame, and `flickering` of each model; empty for images."""
    frames: dict[str, Any] = {}
    flickering: dict[str, Any] = {}
    for number, contender in enumerate(contenders):
        if found := frame_errors(table, number):
            frames[contender.title] = found
        values = of_all_samples(table, number, "temporal_flickering")
        if values is not None:
            flickering[contender.title] = with_worst(values)
    found = {"frames": frames, "flickering": flickering}
    return {name: value for name, value in found.items() if value}


def frame_errors(table: Table, number: int) -> dict[str, Any]:
    """Returns the mean and the worst error of each frame over samples, and the worst frame of all."""
    result: dict[str, Any] = {}
    for name in FRAMES:
        values = of_all_samples(table, number, name)
        if values is None:
            continue
        sample, frame = np.unravel_index(values.argmin(), values.shape)
        result[name] = {
            "mean": values.mean(axis=0).tolist(),
            "worst": values.min(axis=0).tolist(),
            "worst_frame": {
                "frame": int(frame),
                "sample": int(sample),
                "db": float(values[sample, frame]),
            },
        }
    return result


def trajectory(table: Table, number: int) -> dict[str, Any]:
    """Returns errors in dB at each timestep with 95% intervals over samples."""
    timestep = table[f"{number}/timestep"][0]
    result: dict[str, Any] = {"timestep": timestep.tolist()}
    for name in TRAJECTORY:
        values = measure(table, number, name)
        if values is None or len(values) < 2:
            continue
        ends = metrics.bootstrap_band(values)
        result[name] = {
            key: end.tolist() for key, end in zip(("mean", "low", "high"), ends, strict=True)
        }
        result[name]["num_samples"] = len(values)
    return result


def comparison(table: Table, contenders: Sequence[Contender]) -> dict[str, Any]:
    """Returns the paired test of the second contender against the third, for every measure."""
    tests = {}
    for name in MEASURES:
        a, b = (of_all_samples(table, number, name) for number in (1, 2))
        if a is not None and b is not None:
            tests[name] = dataclasses.asdict(metrics.paired_test(a, b))
    return {"a": contenders[1].title, "b": contenders[2].title, "a_minus_b": tests}
