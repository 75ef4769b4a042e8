"""The work of `qdit evaluate` on checkpoints."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from qdit_jax.checkpoint import Checkpoint
from qdit_jax.cli.checkpoints import diffusion_checkpoint
from qdit_jax.cli.evaluate_files import watched
from qdit_jax.cli.numerics_option import note_if_slow
from qdit_jax.cli.process import Process
from qdit_jax.cli.processes_option import share_text
from qdit_jax.cli.progress import Bar
from qdit_jax.cli.prompts_option import Inputs
from qdit_jax.errors import UserError
from qdit_jax.evaluation import (
    MEASURES,
    Contender,
    Protocol,
    Scoring,
    check_inputs,
    check_results,
    evaluated,
    judge_of,
    titles,
    with_autoencoder,
    with_known_autoencoder,
)
from qdit_jax.files import AnyPath, as_path, check_apart
from qdit_jax.processes import Processes, shared_folder
from qdit_jax.sampling import (
    check_numerics,
    denoiser,
    num_guided_channels,
)

DEFAULT_OUT = "qdit-evaluate"


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
        named = zip(titles(paths), found, strict=True)
        return with_known_autoencoder([Contender(title, c) for title, c in named])

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
        guidance = process.guidance_of(first.model)
        channels = num_guided_channels(first.model, process.channels)
        for contender in contenders:  # checked before the folder is created
            denoiser(contender.checkpoint.model, {}, guidance, channels)
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
            guidance=guidance,
            guidance_channels=channels,
            numerics=self.numerics,
            batch_size=self.batch_size,
            **chosen.settings,
        )


def evaluate_models(
    comparison: Comparison,
    scoring: Scoring | None,
    *,
    out: AnyPath | None,
    force: bool,
    processes: Processes,
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
    check_results(out)
    contenders = comparison.contenders()
    chosen = comparison.inputs(contenders)
    protocol = comparison.protocol(contenders, chosen)
    check_inputs(contenders, protocol)
    judge = None if scoring is None else judge_of(scoring, contenders, protocol)
    if processes.is_first:
        note_if_slow((contender.checkpoint for contender in contenders), comparison.numerics)
    with shared_folder(out, force, "evaluation", inputs, processes=processes) as folder:
        if processes.is_first and (folder / "shards").exists():
            logging.getLogger("qdit_jax").info("resuming from %s", folder)
        with Bar(protocol.num_samples, "sample", "sampling", resumes=True) as bar:
            summary, files = evaluated(
                contenders,
                protocol,
                folder,
                judge,
                comparison.range_samples,
                prompts=chosen.prompts,
                progress_fn=bar.tell,
                watch=watched,
                processes=processes,
            )
    if (text := share_text(processes, out)) is not None:
        print(text)
        return summary
    print_summary(summary)
    print(
        f"wrote {out / 'report.html'}, {out / 'metrics.json'} and "
        f"{out / files[-1 if len(files) < 3 else 1].name}"
    )
    return summary


def check_all_numerics(found: list[Checkpoint], numerics: str) -> None:
    """Raises `ValueError` if integer numerics has no effect on any of the checkpoints."""
    for i, checkpoint in enumerate(found):
        try:
            check_numerics(checkpoint.params, numerics)
            return
        except ValueError:
            if i == len(found) - 1:
                raise


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
            low, high, worst = (f"{entry[end]:.{digits}f}" for end in ("low", "high", "worst"))
            print(
                f"  {MEASURES[name]:36} {entry['estimate']:.{digits}f} ({low} to {high}), "
                f"worst {worst} (sample {entry['worst_sample']})"
            )
        for name, entry in summary.get("frames", {}).get(title, {}).items():
            at, kind = entry["worst_frame"], name.partition("_")[0]
            print(
                f"  worst frame of all {kind}s: {at['db']:.2f} dB, frame {at['frame']} of sample "
                f"{at['sample']}"
            )
    for title, entry in summary.get("flickering", {}).items():
        print(
            f"{title}: temporal flickering {entry['estimate']:.4f} ({entry['low']:.4f} to "
            f"{entry['high']:.4f}), worst {entry['worst']:.4f} (sample {entry['worst_sample']})"
        )
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
