"""The work of `qdit evaluate` on checkpoints."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qdit_jax.calibration import Stats, calibrate
from qdit_jax.checkpoint import Checkpoint
from qdit_jax.cli.checkpoints import diffusion_checkpoint, with_autoencoder
from qdit_jax.cli.evaluate_files import watched
from qdit_jax.cli.process import Process
from qdit_jax.cli.progress import Bar
from qdit_jax.cli.prompts_option import Inputs
from qdit_jax.errors import UserError
from qdit_jax.evaluation import (
    MEASURES,
    Contender,
    Judge,
    Protocol,
    Run,
    Scoring,
    check_inputs,
    compared_pictures,
    labeled,
    merge,
    run_evaluation,
    sample_shape,
    summarize,
    write_evaluation,
)
from qdit_jax.files import (
    AnyPath,
    as_path,
    check_apart,
    check_free,
    renewed_folder,
    replaced_file,
)
from qdit_jax.report import save_picture
from qdit_jax.sampling import (
    check_numerics,
    cyclic_conditions,
    denoiser,
    num_conditions,
    num_guided_channels,
)

DEFAULT_OUT = "qdit-evaluate"
PAGES = {"metrics.json": "figures", "pictures.png": "picture", "report.html": "report"}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Which checkpoints are sampled and how: the options of `qdit evaluate CKPT`.

    `options` are those of conditions and sizes, see `Inputs`.
    """

    checkpoint: AnyPath
    against: AnyPath | None
    compare: AnyPath | None
    vae: AnyPath | None
    process: Process
    num_samples: int
    seed: int
    batch_size: int | None
    numerics: str
    dtype: str | None
    range_samples: int
    options: Mapping[str, Any]

    def contenders(self) -> list[Contender]:
        """Returns the checkpoints, the reference first, each with an autoencoder if one is known."""
        paths = [p for p in (self.against, self.checkpoint, self.compare) if p is not None]
        found = [
            with_autoencoder(diffusion_checkpoint(path, self.dtype), self.vae) for path in paths
        ]
        check_all_numerics(found, self.numerics)
        known = next((c.vae for c in found if c.vae is not None), None)
        return [
            Contender(title, dataclasses.replace(c, vae=c.vae or known))
            for title, c in zip(titles(paths), found, strict=True)
        ]

    def inputs(self, contenders: list[Contender]) -> Inputs:
        """Returns what samples are made from, checked against the first network."""
        path = self.checkpoint if self.against is None else self.against
        return Inputs.of(self.options, contenders[0].checkpoint, path)

    def protocol(self, contenders: list[Contender], chosen: Inputs) -> Protocol:
        """Returns how all of them are sampled, with the first one's scheduler.

        Raises:
            UserError: if sampler or guidance do not fit one of them.
        """
        process, first = self.process, contenders[0].checkpoint
        channels = num_guided_channels(first.model, process.channels)
        for contender in contenders:  # checked before the folder is created
            denoiser(contender.checkpoint.model, {}, process.guidance, channels)
        sampler = process.sampler_of(first, chosen.settings.get("shape"))
        record = {"sampler": type(sampler).__name__, **process.settings}
        if (text := process.scheduler_text(first)) is not None:
            record["scheduler"] = text
            print(text)
        return Protocol(
            sampler,
            record,
            self.num_samples,
            seed=self.seed,
            guidance=process.guidance,
            guidance_channels=channels,
            numerics=self.numerics,
            batch_size=self.batch_size,
            **chosen.settings,
        )


def evaluate_models(
    comparison: Comparison, scoring: Scoring | None, *, out: AnyPath | None, force: bool
) -> dict[str, Any]:
    """Samples, measures, scores, prints tables and writes the folder `out`.

    Returns what metrics.json holds.

    Raises:
        ValueError: one sentence for anything that would make a number meaningless.
    """
    out = as_path(out or DEFAULT_OUT)
    if out.suffix in (".json", ".html", ".npz", ".png"):
        raise UserError(f"--out {out}: of checkpoints, it is a folder for all results.")
    given = [comparison.checkpoint, comparison.against, comparison.compare, comparison.vae]
    given.append(comparison.options["embeds"])
    inputs = [*given, *(scoring.inputs if scoring else ())]
    check_apart(out, inputs)
    for name, kind in PAGES.items():
        check_free(out / name, True, kind)
    contenders = comparison.contenders()
    chosen = comparison.inputs(contenders)
    protocol = comparison.protocol(contenders, chosen)
    check_inputs(contenders, protocol)
    judge = None
    if scoring is not None:
        name = str(comparison.checkpoint)
        judge = scoring.judge(
            (comparison.num_samples, *image_shape(contenders[0].checkpoint, chosen.shape)), name
        )
    with renewed_folder(out, force, "evaluation", inputs) as folder:
        run, files, scores = measured(contenders, protocol, judge, folder, chosen.prompts)
        summary = summarize(run, contenders, scores)
        if scoring is not None and judge is not None:
            summary["settings"]["reference"] = str(scoring.reference)
            summary["settings"]["features"] = judge.features
        stats = range_stats(contenders[0].checkpoint, protocol, comparison.range_samples, folder)
        write_results(folder, run, contenders, summary, stats)
    print_summary(summary)
    print(
        f"wrote {out / 'report.html'}, {out / 'metrics.json'} and "
        f"{out / files[-1 if len(files) < 3 else 1].name}"
    )
    return summary


def measured(
    contenders: list[Contender],
    protocol: Protocol,
    judge: Judge | None,
    out: AnyPath,
    prompts: Sequence[str] | None,
) -> tuple[Run, list[AnyPath], dict[str, Any]]:
    """Returns the samples' measures, the files of samples in the folder `out`, and their scores."""
    if (out / "shards").exists():
        logging.getLogger("qdit_jax").info("resuming from %s", out)
    with Bar(protocol.num_samples, "sample", "sampling", resumes=True) as bar:
        run = run_evaluation(contenders, protocol, out, bar.update)
    files = merged(run, contenders, named_conditions(contenders[0].checkpoint, protocol, prompts))
    if judge is None:
        return run, files, {}
    found = judge.scores(files, watched)
    scores = {c.title: labeled(judge.features, f) for c, f in zip(contenders, found, strict=True)}
    return run, files, scores


def check_all_numerics(found: list[Checkpoint], numerics: str) -> None:
    """Raises `ValueError` if integer numerics has no effect on any of the checkpoints."""
    for i, checkpoint in enumerate(found):
        try:
            check_numerics(checkpoint.params, numerics)
            return
        except ValueError:
            if i == len(found) - 1:
                raise


def titles(paths: list[AnyPath]) -> list[str]:
    """Returns the folders' names, or as much of each path as tells them apart."""
    names = [path.resolve().name for path in paths]
    if len(set(names)) == len(names):
        return names
    names = [str(path) for path in paths]
    if len(set(names)) == len(names):
        return names
    return [f"{name} ({i})" for i, name in enumerate(names, 1)]


def named_conditions(
    checkpoint: Checkpoint, protocol: Protocol, prompts: Sequence[str] | None
) -> dict[str, np.ndarray]:
    """Returns what stands beside the samples in files: classes, or the rows and texts of prompts."""
    index = np.arange(protocol.num_samples)
    if protocol.conditions is None:
        found = cyclic_conditions(checkpoint.model, None, index)
        return {} if found is None else {"label": np.asarray(found)}
    rows = index % (num_conditions(protocol.conditions) or 1)
    return {"row": rows, **({} if prompts is None else {"prompts": np.array(prompts)[rows]})}


def image_shape(
    checkpoint: Checkpoint, latents_shape: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Returns rows, columns and channels of a checkpoint's images.

    Raises:
        UserError: if it makes latents that nothing decodes.
    """
    if not decodes(checkpoint):
        raise UserError(
            "the models make latents and no autoencoder is known; give --vae CHECKPOINT to score "
            "images against --reference."
        )
    shape = sample_shape(checkpoint, latents_shape)
    if len(shape) != 3:
        raise UserError(
            "--reference scores images, and these models make videos; leave it out, or score frames as "
            "--samples."
        )
    return shape


def decodes(checkpoint: Checkpoint) -> bool:
    """Returns whether samples of the checkpoint are images."""
    return checkpoint.vae is not None or checkpoint.model.sample_shape()[-1] in (1, 3)


def merged(run: Run, contenders: list[Contender], named: Mapping[str, np.ndarray]) -> list[AnyPath]:
    """Writes the samples of each contender and returns the files, in their order.

    `samples.npz` is the checkpoint under evaluation.
    """
    names = ["samples.npz"]
    if len(contenders) > 1:
        names = ["reference_samples.npz", "samples.npz", "compared_samples.npz"]
    files = []
    for i, (contender, name) in enumerate(zip(contenders, names, strict=False)):
        is_image = decodes(contender.checkpoint)
        array, member = ("images", "arr_0") if is_image else ("latents", "latents")
        file = run.folder / name
        merge(run.folder, run.ranges, f"{i}/{array}", file, member, **named)
        files.append(file)
    return files


def range_stats(
    checkpoint: Checkpoint, protocol: Protocol, num_samples: int, folder: AnyPath
) -> Stats | None:
    """Returns the ranges of a model's inputs, cached in `folder`; None for 0 samples."""
    if num_samples == 0:
        return None
    file, count = folder / "ranges.npz", min(num_samples, protocol.num_samples)
    if file.is_file():
        return Stats.load(file)
    stats = calibrate(
        checkpoint,
        jax.random.key(protocol.seed),
        count,
        sampler=protocol.sampler,
        guidance=protocol.guidance,
        batch_size=count,
        conditions=protocol.conditions,
        shape=protocol.shape,
    )
    stats.save(file)
    return stats


def write_results(
    out: AnyPath,
    run: Run,
    contenders: list[Contender],
    summary: dict[str, Any],
    stats: Stats | None,
) -> None:
    """Writes metrics.json, pictures.png and report.html."""
    with replaced_file(out / "metrics.json", "figures") as temporary:
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
            f"{model['title']}: {model['numerics']} in {model['dtype']}, {model['bytes']:,} bytes "
            f"({first['bytes'] / model['bytes']:.2f}x smaller), "
            f"{model['seconds_per_sample']:.3g} s per sample{timed}"
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
