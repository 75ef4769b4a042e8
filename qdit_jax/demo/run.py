"""The demonstration: the packaged checkpoint, quantized in several ways and compared in pairs."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import resources
from typing import Any

import jax
import numpy as np

from qdit_jax import metrics
from qdit_jax.calibration import Stats, calibrate, default_sampler
from qdit_jax.checkpoint import Checkpoint, load, save
from qdit_jax.demo.pages import TIMING, write_pictures, write_summary
from qdit_jax.files import AnyPath, PathLike, as_path, check_free, replaced_file
from qdit_jax.models import DEMO_STATISTICS, asset, demo_features_fn
from qdit_jax.ptq import quantize_params
from qdit_jax.recipes import Recipe
from qdit_jax.report import provenance, to_uint8
from qdit_jax.sampling import check_seed, generate

# `(total, unit, text)` -> a context whose value has `update(count)`.
BarFn = Callable[[int, str, str], AbstractContextManager[Any]]

WEIGHTS = "demo_dit.safetensors"
NUM_HEADS = 4
RESULTS = {
    "stats.npz": "statistics",
    "metrics.json": "figures",
    "pictures.png": "picture",
    "report.html": "report",
}
MARKER = "demo.json"  # says that the folder is a demonstration, and of which settings


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """How much the demonstration computes."""

    num_samples: int = 100
    num_steps: int = 50
    guidance: float = 1.5
    seed: int = 0
    numerics: str = "simulated"
    quick: bool = False


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One way to run the model: its pictures and the figures of the comparison.

    `closeness` is the signal-to-error ratio of the samples against full precision in dB, the
    mean over samples with a 95% interval; None for full precision itself.
    """

    title: str
    images: np.ndarray
    num_bytes: int
    seconds: float
    first_seconds: float
    closeness: metrics.Interval | None
    frechet: float


def recipes(params: Any, quick: bool) -> dict[str, Recipe]:
    """Returns the recipes that are compared, by title; the last is bad on purpose."""

    def uniform(name: str, group_size: int, **options: Any) -> Recipe:
        return Recipe.preset(name, params, group_size=group_size, **options)

    chosen = {
        "W8A8, groups of 32": uniform("w8a8", 32),
        "W6A8, groups of 32": uniform("w6a8", 32),
        "W4A8, groups of 32": uniform("w4a8", 32),
        "W4A8, groups of 64": uniform("w4a8", 64),
        "W4A8, per channel": uniform("w4a8", 0),
        "W4A8, per channel, static": uniform("w4a8", 0, act_mode="static"),
    }
    kept = ("W8A8, groups of 32", "W4A8, groups of 32", "W4A8, per channel, static")
    return {title: chosen[title] for title in kept} if quick else chosen


@dataclasses.dataclass(frozen=True)
class NoBar:
    """A bar that shows nothing."""

    def update(self, count: int) -> None:
        """Shows nothing."""


def no_bar(total: int, unit: str, text: str) -> AbstractContextManager[Any]:
    return nullcontext(NoBar())


def run_demo(
    out: PathLike,
    settings: DemoSettings,
    say: Callable[[str], None] = print,
    bar_fn: BarFn = no_bar,
) -> dict[str, Any]:
    """Runs every stage and writes its results to the folder `out`; an earlier demonstration is renewed.

    Returns what metrics.json holds. `say` is given the results as text, the log what is being done;
    `bar_fn` makes progress bars.

    Raises:
        UserError: if `out` is there and holds anything but a demonstration.
        ValueError: if `settings.seed` is out of range.
    """
    check_seed(settings.seed)
    out = as_path(out)
    check_free(out, True, "demonstration")
    for name, kind in RESULTS.items():
        check_free(out / name, True, kind)
    with replaced_file(out / MARKER) as temporary:
        temporary.write_text(json.dumps({"demonstration": dataclasses.asdict(settings)}))
    note = logging.getLogger(__name__).info
    note(f"1/5 convert: the packaged PyTorch-layout weights -> {out / 'model'}")
    checkpoint = convert_packaged(out / "model")
    note("2/5 calibrate: ranges of every layer's input, over timesteps, labels and the null class")
    stats = calibrate_packaged(checkpoint, settings, bar_fn)
    stats.save(out / "stats.npz")
    note("3/5 quantize: one checkpoint per recipe")
    checkpoints = {"full precision": checkpoint}
    for title, recipe in recipes(checkpoint.params, settings.quick).items():
        folder = out / recipe_folder(recipe)
        params = quantize_params(checkpoint.params, recipe=recipe, stats=stats)
        save(folder, dataclasses.replace(checkpoint, params=params, recipe=recipe), overwrite=True)
        checkpoints[title] = load(folder)
    note("4/5 sample: the same noise and labels with each")
    outcomes = compare(checkpoints, settings, bar_fn)
    note("5/5 report")
    content = write_metrics(out / "metrics.json", outcomes, settings)
    write_pictures(out / "pictures.png", outcomes)
    write_summary(out / "report.html", outcomes, settings, content["made"])
    say(table_of(outcomes))
    say(f"wrote {out / 'report.html'}, {out / 'pictures.png'} and {out / 'metrics.json'}")
    return content


def convert_packaged(folder: AnyPath) -> Checkpoint:
    """Writes the packaged weights as a checkpoint and returns it as loaded from there."""
    import qdit_convert

    with resources.as_file(asset(WEIGHTS)) as source:
        qdit_convert.convert(source, folder, num_heads=NUM_HEADS, force=True)
    return load(folder)


def calibrate_packaged(checkpoint: Checkpoint, settings: DemoSettings, bar_fn: BarFn) -> Stats:
    """Returns statistics of 20 trajectories, two of each digit (10 when quick)."""
    num_samples = 10 if settings.quick else 20
    key = jax.random.fold_in(jax.random.key(settings.seed), 1)
    with bar_fn(num_samples, "sample", "calibrating") as bar:
        return calibrate(
            checkpoint,
            key,
            num_samples,
            sampler=default_sampler(checkpoint, settings.num_steps),
            guidance=settings.guidance,
            batch_size=num_samples,
            progress_fn=bar.update,
        )


def compare(
    checkpoints: dict[str, Checkpoint], settings: DemoSettings, bar_fn: BarFn
) -> list[Outcome]:
    """Returns an outcome for each checkpoint; the first one is the reference of the comparison."""
    outcomes: list[Outcome] = []
    features_fn = demo_features_fn()
    with resources.as_file(asset(DEMO_STATISTICS)) as file:
        reference = metrics.read_reference(file).pool
    assert reference is not None, "the packaged statistics lack a mean and covariance"
    with bar_fn(len(checkpoints), "model", "sampling") as bar:
        for title, checkpoint in checkpoints.items():
            images, first_seconds = timed(checkpoint, settings)
            _, seconds = timed(checkpoint, settings)
            closeness = None
            if outcomes:
                ratios = metrics.signal_to_noise_db(outcomes[0].images, images)
                closeness = metrics.bootstrap_interval(ratios)
            outcomes.append(
                Outcome(
                    title,
                    images,
                    sum(leaf.nbytes for leaf in jax.tree.leaves(checkpoint.params)),
                    seconds,
                    first_seconds,
                    closeness,
                    frechet_distance(images, features_fn, reference),
                )
            )
            bar.update(1)
    return outcomes


def timed(checkpoint: Checkpoint, settings: DemoSettings) -> tuple[np.ndarray, float]:
    """Returns the samples, digits 0 to 9 cyclically, and the wall time in seconds."""
    began = time.perf_counter()
    images = generate(
        checkpoint,
        default_sampler(checkpoint, settings.num_steps),
        np.arange(settings.num_samples) % len(checkpoint.model.all_conditions()),
        seed=settings.seed,
        guidance=settings.guidance,
        batch_size=settings.num_samples,
        numerics="simulated" if checkpoint.recipe is None else settings.numerics,
    )
    return images, time.perf_counter() - began


def frechet_distance(
    images: np.ndarray, features_fn: Callable[[np.ndarray], Any], reference: metrics.Statistics
) -> float:
    """Returns the Fréchet distance of samples to the real digits, by the packaged features."""
    pool = np.asarray(features_fn(to_uint8(images))["pool"])
    found = metrics.statistics(metrics.moments(pool))
    return metrics.frechet_distance(
        found.mean, found.covariance, reference.mean, reference.covariance
    )


def write_metrics(path: AnyPath, outcomes: list[Outcome], settings: DemoSettings) -> dict[str, Any]:
    """Writes the figures as JSON and returns what was written."""
    figures = [
        {
            "title": outcome.title,
            "bytes": outcome.num_bytes,
            "seconds": outcome.seconds,
            "seconds_with_compilation": outcome.first_seconds,
            "closeness_db": outcome.closeness and dataclasses.asdict(outcome.closeness),
            metrics.DEMO_FRECHET_DISTANCE: outcome.frechet,
        }
        for outcome in outcomes
    ]
    content = {
        "settings": dataclasses.asdict(settings),
        "made": provenance(),
        "models": figures,
        "timing": TIMING,
    }
    with replaced_file(path, "figures") as temporary:
        temporary.write_text(json.dumps(content, indent=1))
    return content


def table_of(outcomes: list[Outcome]) -> str:
    """Returns the comparison as lines of text."""
    lines = [
        f"{'model':28} {'bytes':>10} {'closeness, dB (95%)':>24} {'Fréchet*':>9} {'seconds':>8}"
    ]
    for o in outcomes:
        near = "-" if o.closeness is None else interval_text(o.closeness)
        lines.append(
            f"{o.title:28} {o.num_bytes:>10,} {near:>24} {o.frechet:>9.2f} {o.seconds:>8.2f}"
        )
    return "\n".join([*lines, f"* {metrics.DEMO_FRECHET_DISTANCE}", TIMING])


def interval_text(interval: metrics.Interval) -> str:
    return f"{interval.estimate:.1f} ({interval.low:.1f} to {interval.high:.1f})"


def recipe_folder(recipe: Recipe) -> str:
    act = recipe.rules[0].spec.act
    return recipe.name + ("-static" if act is not None and act.mode == "static" else "")
