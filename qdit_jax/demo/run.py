"""The demonstration: the packaged checkpoint, quantized in several ways and compared in pairs."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import jax

from qdit_jax import metrics
from qdit_jax.calibration import Stats, calibrate, collect_items, default_sampler
from qdit_jax.checkpoint import Checkpoint, load, save, with_dtype
from qdit_jax.evaluation import PAGES, Scoring, evaluate
from qdit_jax.files import AnyPath, PathLike, as_path, check_free, replaced_file
from qdit_jax.methods import CalibrationData, quantize
from qdit_jax.models import asset
from qdit_jax.ptq import quantize_params
from qdit_jax.recipes import Recipe
from qdit_jax.sampling import check_seed
from qdit_jax.types import Params, Progress, ProgressFn, untold

WEIGHTS = "demo_dit.safetensors"
NUM_HEADS = 4
BATCH_SIZE = 10  # one of each digit
# What the method `best` makes: title -> group size.
BEST = {"W4A8, groups of 32, best": 32, "W4A8, per channel, best": 0}
NUM_FITTED, BATCH_FITTED = 32, 32  # trajectories that `best` looks at, inputs per call
RESULTS = {"stats.npz": "statistics", **PAGES}
TITLE = "A diffusion transformer in 4 to 8 bits"
TIMING = (
    "Seconds are those of all samples, by the median batch of one run on a machine that may have "
    "been busy: noisy."
)
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


def run_demo(
    out: PathLike,
    settings: DemoSettings,
    say: Callable[[str], None] = print,
    progress_fn: ProgressFn = untold,
) -> dict[str, Any]:
    """Runs every stage and writes its results to the folder `out`; an earlier demonstration is renewed.

    Returns what metrics.json holds. `say` gets the results as text, the log the current stage;
    `progress_fn` is told of the samples of every stage.

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
    note(f"1/4 convert: the packaged PyTorch-layout weights -> {out / 'model'}")
    checkpoint = with_dtype(convert_packaged(out / "model"), settings.dtype)
    note("2/4 calibrate: ranges of every layer's input, over timesteps, labels and the null class")
    stats = calibrate_packaged(checkpoint, settings, progress_fn)
    stats.save(out / "stats.npz")
    note("3/4 quantize: one checkpoint per recipe")
    checkpoints = {}
    for title, recipe in recipes(checkpoint.params, settings.quick).items():
        folder = out / recipe_folder(recipe)
        params = quantize_params(checkpoint.params, recipe=recipe, stats=stats)
        save(folder, dataclasses.replace(checkpoint, params=params, recipe=recipe), overwrite=True)
        checkpoints[title] = load(folder)
    if not settings.quick:
        note("3/4 quantize: two of them by the method best, which looks at the network's inputs")
        checkpoints |= fitted(checkpoint, settings, out)
    note("4/4 compare: the same noise and labels with each")
    summary = compare(checkpoint, checkpoints, settings, out, progress_fn)
    say(table_of(summary))
    say(f"wrote {out / 'report.html'}, {out / 'pictures.png'} and {out / 'metrics.json'}")
    return summary


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


def calibrate_packaged(
    checkpoint: Checkpoint, settings: DemoSettings, progress_fn: ProgressFn
) -> Stats:
    """Returns statistics of 20 trajectories, two of each digit (10 when quick)."""
    num_samples = 10 if settings.quick else 20
    key = jax.random.fold_in(jax.random.key(settings.seed), 1)
    progress_fn(Progress(total=num_samples, stage="calibrating"))
    return calibrate(
        checkpoint,
        key,
        num_samples,
        sampler=default_sampler(checkpoint, settings.num_steps),
        guidance=settings.guidance,
        batch_size=num_samples,
        progress_fn=progress_fn,
    )


def compare(
    checkpoint: Checkpoint,
    quantized: Mapping[str, Checkpoint],
    settings: DemoSettings,
    out: AnyPath,
    progress_fn: ProgressFn,
) -> dict[str, Any]:
    """Compares each checkpoint with full precision; writes figures, pictures and page to `out`.

    Returns the figures, as `qdit.evaluate` does.
    """
    few = metrics.ScoreSettings(min_samples=2)
    progress_fn(Progress(stage="sampling"))
    with tempfile.TemporaryDirectory() as folder:
        summary = evaluate(
            {title: with_dtype(found, settings.dtype) for title, found in quantized.items()},
            against=checkpoint,
            num_samples=settings.num_samples,
            sampler=default_sampler(checkpoint, settings.num_steps),
            scoring=Scoring("demo", settings=few, batch_size=settings.num_samples),
            out=folder,
            title=TITLE,
            progress_fn=progress_fn,
            seed=settings.seed,
            guidance=settings.guidance,
            numerics=settings.numerics,
            batch_size=BATCH_SIZE,
            num_probed=0,
        )
        for name, kind in PAGES.items():
            with replaced_file(out / name, kind) as temporary:
                shutil.copyfile(Path(folder) / name, temporary)
    return summary


def table_of(summary: Mapping[str, Any]) -> str:
    """Returns the comparison as lines of text."""
    head = ("model", "bytes", "closeness, dB (95%)", "Fréchet*", "seconds")
    lines = ["{:28} {:>10} {:>24} {:>9} {:>8}".format(*head)]
    for model in summary["models"]:
        title = model["title"]
        paired, score = summary["paired"].get(title), summary["scores"][title]
        near = "-"
        if paired is not None:
            near = "{estimate:.1f} ({low:.1f} to {high:.1f})".format(**paired["latent_snr_db"])
        distance = score["frechet_distance"]["value"]
        seconds = model["seconds_per_sample"] * summary["settings"]["num_samples"]
        lines.append(
            f"{title:28} {model['bytes']:>10,} {near:>24} {distance:>9.2f} {seconds:>8.2f}"
        )
    return "\n".join([*lines, f"* {metrics.DEMO_FRECHET_DISTANCE}", TIMING])


def recipe_folder(recipe: Recipe) -> str:
    act = recipe.rules[0].spec.act
    return recipe.name + ("-static" if act is not None and act.mode == "static" else "")
