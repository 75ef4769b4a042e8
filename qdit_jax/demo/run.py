"""The demonstration: the packaged checkpoint, quantized in several ways and compared in pairs."""

from __future__ import annotations

import dataclasses
import json
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import resources
from typing import Any, Literal

import jax
import numpy as np

from qdit_jax import metrics
from qdit_jax.calibration import Stats, calibrate, collect_items, default_sampler
from qdit_jax.checkpoint import Checkpoint, load, save, with_dtype
from qdit_jax.demo.pages import SHOWN, TIMING, write_pictures, write_summary
from qdit_jax.evaluation import (
    Contender,
    Protocol,
    Scoring,
    merge,
    run_evaluation,
    sample_shape,
    summarize,
)
from qdit_jax.files import AnyPath, PathLike, as_path, check_free, replaced_file
from qdit_jax.methods import CalibrationData, quantize
from qdit_jax.models import asset
from qdit_jax.ptq import quantize_params
from qdit_jax.recipes import Recipe
from qdit_jax.report import provenance
from qdit_jax.sampling import check_seed
from qdit_jax.types import Params

# `(total, unit, text)` -> a context whose value has `update(count)`.
BarFn = Callable[[int, str, str], AbstractContextManager[Any]]

WEIGHTS = "demo_dit.safetensors"
NUM_HEADS = 4
BATCH_SIZE = 10  # one of each digit
# What the method `best` makes: title -> group size.
BEST = {"W4A8, groups of 32, best": 32, "W4A8, per channel, best": 0}
NUM_FITTED, BATCH_FITTED = 32, 32  # trajectories that `best` looks at, inputs per call
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
    dtype: str = "float32"
    quick: bool = False


def recipes(params: Params, quick: bool) -> dict[str, Recipe]:
    """Returns the recipes that are compared, by title; the last is bad on purpose."""

    def uniform(
        name: str, group_size: int, act_mode: Literal["dynamic", "static"] = "dynamic"
    ) -> Recipe:
        return Recipe.preset(name, params, group_size=group_size, act_mode=act_mode)

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

    Returns what metrics.json holds. `say` gets the results as text, the log the current stage;
    `bar_fn` returns progress bars.

    Raises:
        UserError: if `out` exists and is not an earlier demonstration.
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
    checkpoint = with_dtype(convert_packaged(out / "model"), settings.dtype)
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
    if not settings.quick:
        note("3/5 quantize: two of them by the method best, which looks at the network's inputs")
        checkpoints |= fitted(checkpoint, settings, out)
    note("4/5 sample: the same noise and labels with each")
    models, pictures = compare(checkpoints, settings, bar_fn)
    note("5/5 report")
    content = {
        "settings": dataclasses.asdict(settings),
        "made": provenance(),
        "models": models,
        "timing": TIMING,
    }
    with replaced_file(out / "metrics.json", "figures") as temporary:
        temporary.write_text(json.dumps(content, indent=1))
    write_pictures(out / "pictures.png", pictures)
    write_summary(out / "report.html", content, pictures)
    say(table_of(models))
    say(f"wrote {out / 'report.html'}, {out / 'pictures.png'} and {out / 'metrics.json'}")
    return content


def fitted(checkpoint: Checkpoint, settings: DemoSettings, out: AnyPath) -> dict[str, Checkpoint]:
    """Returns the checkpoints that the method `best` makes of some recipes, written to `out`."""
    items = collect_items(
        checkpoint,
        jax.random.fold_in(jax.random.key(settings.seed), 2),
        NUM_FITTED,
        sampler=default_sampler(checkpoint, settings.num_steps),
        guidance=settings.guidance,
    )
    data = CalibrationData(items=items, batch_size=BATCH_FITTED)
    found = {}
    for title, size in BEST.items():
        recipe = Recipe.preset("w4a8", checkpoint.params, group_size=size)
        folder = out / f"{recipe_folder(recipe)}-best"
        quantize(checkpoint, "best", recipe, data=data, out=folder, overwrite=True)
        found[title] = load(folder)
    return found


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
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Returns each checkpoint's numbers, compared with the first one, and its first pictures."""
    contenders = [
        Contender(title, with_dtype(checkpoint, settings.dtype))
        for title, checkpoint in checkpoints.items()
    ]
    first = contenders[0].checkpoint
    protocol = Protocol(
        default_sampler(first, settings.num_steps),
        {"steps": settings.num_steps},
        num_samples=settings.num_samples,
        seed=settings.seed,
        guidance=settings.guidance,
        numerics=settings.numerics,
        batch_size=BATCH_SIZE,
    )
    few = metrics.ScoreSettings(min_samples=2)
    scoring = Scoring("demo", settings=few, batch_size=settings.num_samples)
    judge = scoring.judge((settings.num_samples, *sample_shape(first)), "demo")
    with tempfile.TemporaryDirectory() as folder:
        with bar_fn(settings.num_samples, "sample", "sampling") as bar:
            run = run_evaluation(contenders, protocol, folder, bar.update, num_probed=0)
        files = [run.folder / f"{i}.npz" for i in range(len(contenders))]
        for i, file in enumerate(files):
            merge(run.folder, run.ranges, f"{i}/images", file, "arr_0")
        summary, scores = summarize(run, contenders), judge.scores(files)
        pictures = {
            contender.title: next(metrics.image_batches(file, SHOWN))
            for contender, file in zip(contenders, files, strict=True)
        }
    models = [  # the samples of this network are images already: its latents are the pictures
        {
            "title": model["title"],
            "bytes": model["bytes"],
            "seconds": (seconds := settings.num_samples * model["seconds_per_sample"]),
            "seconds_with_compilation": seconds + model["compile_seconds"],
            "closeness_db": summary["paired"].get(model["title"], {}).get("latent_snr_db"),
            metrics.DEMO_FRECHET_DISTANCE: found["frechet_distance"],
        }
        for model, found in zip(summary["models"], scores, strict=True)
    ]
    return models, pictures


def table_of(models: Sequence[Mapping[str, Any]]) -> str:
    """Returns the comparison as lines of text."""
    lines = [
        f"{'model':28} {'bytes':>10} {'closeness, dB (95%)':>24} {'Fréchet*':>9} {'seconds':>8}"
    ]
    for m in models:
        near = "-" if m["closeness_db"] is None else interval_text(m["closeness_db"])
        distance = m[metrics.DEMO_FRECHET_DISTANCE]
        lines.append(
            f"{m['title']:28} {m['bytes']:>10,} {near:>24} {distance:>9.2f} {m['seconds']:>8.2f}"
        )
    return "\n".join([*lines, f"* {metrics.DEMO_FRECHET_DISTANCE}", TIMING])


def interval_text(interval: Mapping[str, float]) -> str:
    return "{estimate:.1f} ({low:.1f} to {high:.1f})".format(**interval)


def recipe_folder(recipe: Recipe) -> str:
    act = recipe.rules[0].spec.act
    return recipe.name + ("-static" if act is not None and act.mode == "static" else "")
