"""`evaluate`: checkpoints sampled in pairs, measured, scored, and written to a folder."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np

from qdit_jax import diffusion
from qdit_jax.calibration import Stats, calibrate, default_sampler
from qdit_jax.checkpoint import Checkpoint, load
from qdit_jax.errors import UserError
from qdit_jax.evaluation.pages import write_evaluation
from qdit_jax.evaluation.pictures import compared_pictures, save_compared_clip
from qdit_jax.evaluation.runs import Run, check_inputs, run_evaluation
from qdit_jax.evaluation.sample_file import sample_shape
from qdit_jax.evaluation.scoring import Judge, Scoring, Watch, labeled, unwatched
from qdit_jax.evaluation.store import merge
from qdit_jax.evaluation.summary import summarize
from qdit_jax.evaluation.trajectories import Contender, Protocol
from qdit_jax.files import AnyPath, PathLike, as_path, check_free, replaced_file
from qdit_jax.processes import ALONE, Processes, shared_folder
from qdit_jax.report import save_picture
from qdit_jax.sampling import cyclic_conditions, num_conditions
from qdit_jax.types import ProgressFn, untold

PAGES = {"metrics.json": "figures", "pictures.png": "picture", "report.html": "report"}
SAMPLES = ("reference_samples.npz", "samples.npz", "compared_samples.npz")
Source: TypeAlias = Checkpoint | PathLike


def evaluate(
    checkpoint: Source | Mapping[str, Source],
    *,
    against: Source | None = None,
    compare: Source | None = None,
    num_samples: int = 100,
    sampler: diffusion.Sampler | None = None,
    scoring: Scoring | None = None,
    range_samples: int = 0,
    out: PathLike | None = None,
    overwrite: bool = False,
    title: str | None = None,
    prompts: Sequence[str] | None = None,
    progress_fn: ProgressFn = untold,
    processes: Processes = ALONE,
    **settings: Any,
) -> dict[str, Any]:
    """Returns how far a checkpoint's samples are from a reference's, and their scores.

    All are sampled from the same noise and conditions. The result has the keys `settings`, `made`
    (date, versions, device), `models`, `paired` (measures with 95% intervals, by model), `trajectory`,
    `scores`, and with `compare` the paired tests `comparison`; it is what `metrics.json` holds.

    Args:
        checkpoint: a `Checkpoint`, or the path of one; or several by their titles.
        against: the reference, such as full precision; without it, only the times and scores of
            `checkpoint` are measured.
        compare: another checkpoint beside the first, against the same reference.
        sampler: of all of them; by default the first one's own, in 50 steps.
        scoring: against which images the samples are scored, and by which network.
        range_samples: of how many samples the report shows the ranges of layers' inputs.
        out: a folder for all results and pictures, in which a stopped call resumes; by default
            nothing is kept.
        overwrite: begin anew in a folder that holds another evaluation.
        title: of the report.
        prompts: the texts of `conditions`, one each: they stand over the pictures, and beside the
            samples in files.
        progress_fn: called with the number of samples just done.
        processes: that share the sampling, each on its own devices, and need `out`, which all of them
            see; the first one scores and writes, and all return the same.
        settings: further fields of `Protocol`: `seed`, `guidance`, `guidance_channels`, `numerics`,
            `batch_size`, `conditions`, `shape`, `num_probed`.

    Raises:
        UserError: if the checkpoints cannot be paired, or `out` holds something else.
        ValueError: for anything that would make a number meaningless.
    """
    if compare is not None and against is None:
        raise ValueError("compare needs against=REFERENCE: both are compared with it.")
    sources = named_sources(checkpoint, against, compare)
    contenders = with_known_autoencoder(
        [Contender(title, loaded(source)) for title, source in sources.items()]
    )
    first = contenders[0].checkpoint
    chosen = sampler or default_sampler(first, shape=settings.get("shape"))
    record = {
        "sampler": type(chosen).__name__,
        "steps": len(jax.tree.leaves(chosen.table)[0]),
    }
    protocol = Protocol(chosen, record, num_samples, **settings)
    check_inputs(contenders, protocol)
    if prompts is not None and len(prompts) != num_conditions(protocol.conditions):
        raise ValueError(
            f"{len(prompts)} prompts for {num_conditions(protocol.conditions) or 'no'} conditions; give "
            "the text of each."
        )
    judge = None if scoring is None else judge_of(scoring, contenders, protocol)
    if processes.are_several and out is None:
        raise ValueError("several processes need out, a folder that all of them see.")
    paths = [source for source in sources.values() if not isinstance(source, Checkpoint)]
    inputs = [as_path(path) for path in paths]
    inputs += scoring.inputs if scoring else []
    with results_folder(out, overwrite, inputs, processes) as folder:
        summary, _ = evaluated(
            contenders,
            protocol,
            folder,
            judge,
            range_samples,
            prompts=prompts,
            title=title,
            progress_fn=progress_fn,
            processes=processes,
        )
    return summary


def named_sources(
    checkpoint: Source | Mapping[str, Source], against: Source | None, compare: Source | None
) -> dict[str, Source]:
    """Returns the checkpoints by their titles, the reference first."""
    given: dict[str, Source] = dict(checkpoint) if isinstance(checkpoint, Mapping) else {}
    others = [against, None if given else checkpoint, compare]
    rest = [source for source in others if not (source is None or isinstance(source, Mapping))]
    named = dict(zip(titles(rest), rest, strict=True))
    if same := set(named) & set(given):
        raise ValueError(f"two checkpoints are called {min(same)!r}; give another title.")
    return {**named, **given} if against is not None else {**given, **named}


def loaded(source: Source) -> Checkpoint:
    """Returns the checkpoint, read where it is a path."""
    return source if isinstance(source, Checkpoint) else load(source)


@contextmanager
def results_folder(
    out: PathLike | None,
    overwrite: bool,
    inputs: Sequence[AnyPath],
    processes: Processes = ALONE,
) -> Iterator[AnyPath]:
    """Yields the folder of the results: `out`, or a temporary one."""
    if out is None:
        with tempfile.TemporaryDirectory(prefix="qdit-") as folder:
            yield Path(folder)
        return
    check_results(as_path(out))
    given = (as_path(out), overwrite, "evaluation", list(inputs))
    with shared_folder(*given, processes=processes) as folder:
        yield folder


def check_results(out: AnyPath) -> None:
    """Raises `UserError` if the pages of an evaluation would replace something else."""
    for name, kind in PAGES.items():
        check_free(out / name, True, kind)


def with_known_autoencoder(contenders: Sequence[Contender]) -> list[Contender]:
    """Returns the contenders, those without an autoencoder with that of another."""
    known = next((c.checkpoint.vae for c in contenders if c.checkpoint.vae is not None), None)
    return [
        dataclasses.replace(
            c, checkpoint=dataclasses.replace(c.checkpoint, vae=c.checkpoint.vae or known)
        )
        for c in contenders
    ]


def evaluated(
    contenders: list[Contender],
    protocol: Protocol,
    folder: AnyPath,
    judge: Judge | None = None,
    range_samples: int = 0,
    *,
    prompts: Sequence[str] | None = None,
    title: str | None = None,
    progress_fn: ProgressFn = untold,
    watch: Watch = unwatched,
    processes: Processes = ALONE,
) -> tuple[dict[str, Any], list[AnyPath]]:
    """Samples, measures and scores in a folder, and writes the pages there.

    Returns what metrics.json holds, and the files of samples.

    Args:
        prompts: the texts of the conditions, which are kept beside the samples.
        title: of the page.
        watch: wraps the batches of files that are scored, to show progress.
        processes: that share the sampling; the first one does the rest.
    """
    run = run_evaluation(contenders, protocol, folder, progress_fn, processes)
    files = sample_files(run, contenders)
    if processes.is_first:
        merge_samples(run, contenders, files, prompts, protocol)
        scores = {} if judge is None else scores_of(judge, files, contenders, watch)
        summary = summarize(run, contenders, scores)
        if judge is not None:
            summary["settings"]["reference"] = judge.reference_name
            summary["settings"]["features"] = judge.features
        stats = range_stats(contenders[0].checkpoint, protocol, range_samples, folder)
        title = title or "Evaluation of " + contenders[-1 if len(contenders) < 3 else 1].title
        write_results(folder, title, run, contenders, summary, stats, prompts)
    processes.meet("the results are written")
    if not processes.is_first:
        summary = json.loads((folder / "metrics.json").read_text())
    return summary, files


def judge_of(scoring: Scoring, contenders: Sequence[Contender], protocol: Protocol) -> Judge:
    """Returns the judge of the contenders' images; raises as `image_shape` and `Scoring.judge`."""
    shape = image_shape(contenders[0].checkpoint, protocol.shape)
    return scoring.judge((protocol.num_samples, *shape), contenders[:2][-1].title)


def scores_of(
    judge: Judge, files: Sequence[AnyPath], contenders: Sequence[Contender], watch: Watch
) -> dict[str, Any]:
    """Returns the scores of the contenders' files, by title."""
    found = judge.scores(files, watch)
    return {c.title: labeled(judge.features, f) for c, f in zip(contenders, found, strict=True)}


def titles(sources: Sequence[Source]) -> list[str]:
    """Returns names of checkpoints: of a path its last part, or as much as tells them apart."""
    names = [name_of(source) for source in sources]
    if len(set(names)) == len(names):
        return names
    names = [name_of(s) if isinstance(s, Checkpoint) else str(s) for s in sources]
    if len(set(names)) == len(names):
        return names
    return [f"{name} ({i})" for i, name in enumerate(names, 1)]


def name_of(source: Source) -> str:
    """Returns a folder's or file's name; of a checkpoint in memory its recipe's."""
    if not isinstance(source, Checkpoint):
        return str(as_path(source).resolve().name)
    return "full precision" if source.recipe is None else source.recipe.name


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
    """Returns rows, columns and channels of a checkpoint's images; of videos, the frames first.

    Raises:
        UserError: if it makes latents that nothing decodes.
    """
    if not decodes(checkpoint):
        raise UserError(
            "the models make latents and no autoencoder is known; give --vae CHECKPOINT to score "
            "images against --reference."
        )
    return sample_shape(checkpoint, latents_shape)


def decodes(checkpoint: Checkpoint) -> bool:
    """Returns whether samples of the checkpoint are images."""
    return checkpoint.vae is not None or checkpoint.model.sample_shape()[-1] in (1, 3)


def sample_files(run: Run, contenders: Sequence[Contender]) -> list[AnyPath]:
    """Returns the files of each contender's samples; `samples.npz` is the checkpoint under evaluation."""
    names = [*SAMPLES, *(f"samples_{i}.npz" for i in range(len(SAMPLES), len(contenders)))]
    return [run.folder / names[i + (len(contenders) == 1)] for i in range(len(contenders))]


def merge_samples(
    run: Run,
    contenders: Sequence[Contender],
    files: Sequence[AnyPath],
    prompts: Sequence[str] | None,
    protocol: Protocol,
) -> None:
    """Writes the samples of each contender to its file."""
    named = named_conditions(contenders[0].checkpoint, protocol, prompts)
    for i, (contender, file) in enumerate(zip(contenders, files, strict=True)):
        is_image = decodes(contender.checkpoint)
        array, member = ("images", "arr_0") if is_image else ("latents", "latents")
        merge(run.folder, run.ranges, f"{i}/{array}", file, member, **named)


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
    title: str,
    run: Run,
    contenders: list[Contender],
    summary: dict[str, Any],
    stats: Stats | None,
    prompts: Sequence[str] | None = None,
) -> None:
    """Writes metrics.json, pictures.png and report.html, and of videos clips.gif."""
    with replaced_file(out / "metrics.json", "figures") as temporary:
        temporary.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    pictures = compared_pictures(run, contenders, prompts)
    if pictures is not None:
        save_picture(out / "pictures.png", pictures)
    clip = save_compared_clip(out, run, contenders)
    write_evaluation(out / "report.html", title, summary, contenders, pictures, stats, clip)
