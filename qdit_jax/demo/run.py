"""The demonstration: a packaged checkpoint, quantized in several ways and compared in pairs."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from qdit_jax import metrics
from qdit_jax.calibration import Stats, calibrate, collect_items, default_sampler
from qdit_jax.checkpoint import Checkpoint, load, save, with_dtype
from qdit_jax.demo.packaged import PACKAGED, Packaged
from qdit_jax.evaluation import CLIP, PAGES, Scoring, evaluate
from qdit_jax.files import AnyPath, PathLike, as_path, check_free, replaced_file
from qdit_jax.methods import CalibrationData, quantize
from qdit_jax.ptq import quantize_params
from qdit_jax.recipes import Recipe
from qdit_jax.sampling import check_seed
from qdit_jax.types import Params, Progress, ProgressFn, untold

BATCH_SIZE = 10  # one of each digit
NUM_FITTED, BATCH_FITTED = 32, 32  # trajectories that `best` looks at, inputs per call
RESULTS = {"stats.npz": "statistics", **PAGES}
TIMING = (
    "Seconds are those of all samples, by the median batch of one run on a machine that may have "
    "been busy: noisy."
)
MARKER = "demo.json"  # says that the folder is a demonstration, and of which settings


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """Which packaged model the demonstration takes, a name in `PACKAGED`, and how much it computes.

    `num_samples`, `num_steps` and `guidance` are by default the model's own.
    """

    model: str = "digits"
    num_samples: int | None = None
    num_steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    numerics: str = "simulated"
    dtype: str = "float32"
    quick: bool = False

    @property
    def packaged(self) -> Packaged:
        """Returns the packaged model."""
        if self.model not in PACKAGED:
            raise ValueError(
                f"model={self.model!r} is not known; use one of {', '.join(PACKAGED)}."
            )
        return PACKAGED[self.model]

    @property
    def samples(self) -> int:
        """Returns how many samples each checkpoint makes."""
        of_model = self.packaged.quick_samples if self.quick else self.packaged.num_samples
        return self.num_samples or of_model

    @property
    def steps(self) -> int:
        """Returns how many steps a sample takes."""
        of_model = self.packaged.quick_steps if self.quick else self.packaged.num_steps
        return self.num_steps or of_model

    @property
    def scale(self) -> float:
        """Returns the scale of guidance."""
        return self.packaged.guidance if self.guidance is None else self.guidance


def recipes(params: Params, sizes: tuple[int, int], quick: bool) -> dict[str, Recipe]:
    """Returns the recipes that are compared, by title; the last is bad on purpose."""

    def uniform(
        name: str, group_size: int, act_mode: Literal["dynamic", "static"] = "dynamic"
    ) -> Recipe:
        return Recipe.preset(name, params, group_size=group_size, act_mode=act_mode)

    fine, coarse = sizes
    chosen = {
        (eight := f"W8A8, groups of {fine}"): uniform("w8a8", fine),
        f"W6A8, groups of {fine}": uniform("w6a8", fine),
        (four := f"W4A8, groups of {fine}"): uniform("w4a8", fine),
        f"W4A8, groups of {coarse}": uniform("w4a8", coarse),
        "W4A8, per channel": uniform("w4a8", 0),
        (static := "W4A8, per channel, static"): uniform("w4a8", 0, act_mode="static"),
    }
    return {title: chosen[title] for title in (eight, four, static)} if quick else chosen


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
    packaged = settings.packaged
    out = as_path(out)
    check_free(out, True, "demonstration")
    for name, kind in {**RESULTS, CLIP: "picture"}.items():
        check_free(out / name, True, kind)
    with replaced_file(out / MARKER) as temporary:
        temporary.write_text(json.dumps({"demonstration": dataclasses.asdict(settings)}))
    note = logging.getLogger(__name__).info
    note(f"1/4 convert: the packaged PyTorch-layout weights -> {out / 'model'}")
    checkpoint = with_dtype(packaged.convert(out / "model"), settings.dtype)
    note(
        "2/4 calibrate: ranges of every layer's input, over timesteps, conditions and the null one"
    )
    stats = calibrate_packaged(checkpoint, settings, progress_fn)
    stats.save(out / "stats.npz")
    note("3/4 quantize: one checkpoint per recipe")
    checkpoints = {}
    for title, recipe in recipes(checkpoint.params, packaged.group_sizes, settings.quick).items():
        folder = out / recipe_folder(recipe)
        params = quantize_params(checkpoint.params, recipe=recipe, stats=stats)
        save(folder, dataclasses.replace(checkpoint, params=params, recipe=recipe), overwrite=True)
        checkpoints[title] = load(folder)
    if not settings.quick:
        note("3/4 quantize: two of them by the method best, which looks at the network's inputs")
        checkpoints |= fitted(checkpoint, settings, out)
    note("4/4 compare: the same noise and conditions with each")
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
        conditions=settings.packaged.conditions(),
        sampler=default_sampler(checkpoint, settings.steps),
        guidance=settings.scale,
    )
    data = CalibrationData(items=items, batch_size=BATCH_FITTED)
    found = {}
    sizes = {f"groups of {settings.packaged.group_sizes[0]}": settings.packaged.group_sizes[0]}
    for text, size in {**sizes, "per channel": 0}.items():
        recipe = Recipe.preset("w4a8", checkpoint.params, group_size=size)
        folder = out / f"{recipe_folder(recipe)}-best"
        quantize(checkpoint, "best", recipe, data=data, out=folder, overwrite=True)
        found[f"W4A8, {text}, best"] = load(folder)
    return found


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
        conditions=settings.packaged.conditions(),
        sampler=default_sampler(checkpoint, settings.steps),
        guidance=settings.scale,
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
    packaged, num_samples = settings.packaged, settings.samples
    few = metrics.ScoreSettings(min_samples=2)
    scoring = Scoring("demo", settings=few, batch_size=num_samples) if packaged.scored else None
    progress_fn(Progress(stage="sampling"))
    with tempfile.TemporaryDirectory() as folder:
        summary = evaluate(
            {title: with_dtype(found, settings.dtype) for title, found in quantized.items()},
            against=checkpoint,
            num_samples=num_samples,
            sampler=default_sampler(checkpoint, settings.steps),
            scoring=scoring,
            out=folder,
            title=packaged.title,
            prompts=packaged.prompts(),
            progress_fn=progress_fn,
            conditions=packaged.conditions(),
            seed=settings.seed,
            guidance=settings.scale,
            numerics=settings.numerics,
            batch_size=BATCH_SIZE,
            num_probed=0,
        )
        for name, kind in {**PAGES, CLIP: "picture"}.items():
            if not (Path(folder) / name).exists():
                continue
            with replaced_file(out / name, kind) as temporary:
                shutil.copyfile(Path(folder) / name, temporary)
    return summary


def table_of(summary: Mapping[str, Any]) -> str:
    """Returns the comparison as lines of text."""
    scores = summary["scores"]
    head = ["model", "bytes", "closeness, dB (95%)", "seconds", *(["Fréchet*"] if scores else [])]
    lines = [line_of(head)]
    for model in summary["models"]:
        title = model["title"]
        paired, near = summary["paired"].get(title), "-"
        if paired is not None:
            near = "{estimate:.1f} ({low:.1f} to {high:.1f})".format(**paired["latent_snr_db"])
        seconds = model["seconds_per_sample"] * summary["settings"]["num_samples"]
        cells = [title, f"{model['bytes']:,}", near, f"{seconds:.2f}"]
        if scores:
            cells.append(f"{scores[title]['frechet_distance']['value']:.2f}")
        lines.append(line_of(cells))
    notes = [f"* {metrics.DEMO_FRECHET_DISTANCE}"] if scores else []
    return "\n".join([*lines, *notes, TIMING])


def line_of(cells: Sequence[str]) -> str:
    """Returns a line of the table, the first cell to the left."""
    widths = (10, 24, 8, 9)[: len(cells) - 1]
    rest = (f"{cell:>{width}}" for cell, width in zip(cells[1:], widths, strict=True))
    return " ".join([f"{cells[0]:28}", *rest])


def recipe_folder(recipe: Recipe) -> str:
    act = recipe.rules[0].spec.act
    return recipe.name + ("-static" if act is not None and act.mode == "static" else "")
