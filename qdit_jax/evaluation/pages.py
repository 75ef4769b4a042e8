"""The report of an evaluation: one self-contained page, and its pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from flax.traverse_util import flatten_dict
from matplotlib.figure import Figure
from PIL import Image

from qdit_jax import report
from qdit_jax.calibration import Stats
from qdit_jax.evaluation.frame_pages import frame_parts
from qdit_jax.evaluation.runs import Run
from qdit_jax.evaluation.store import first_samples
from qdit_jax.evaluation.summary import MEASURES, TRAJECTORY, num_bytes
from qdit_jax.evaluation.trajectories import Contender
from qdit_jax.files import PathLike
from qdit_jax.metrics import signal_to_noise_db
from qdit_jax.models import family_of
from qdit_jax.report import (
    block_layers,
    frame_numbers,
    frame_rows,
    input_ranges,
    is_video,
    kernel_of,
    part_of,
    range_histograms,
    side_by_side,
    weight_ranges,
)
from qdit_jax.sampling import guidance_text

NUM_SHOWN = 16
NUM_VIDEOS = 4
MAX_GAIN = 16


def write_evaluation(
    path: PathLike,
    summary: Mapping[str, Any],
    contenders: Sequence[Contender],
    pictures: Image.Image | None,
    stats: Stats | None,
) -> None:
    """Writes the page of a finished evaluation; what was not measured is left out."""
    parts = [report.paragraph(protocol_text(summary))]
    if pictures is not None:
        parts += [
            report.heading("The same noise and conditions"),
            report.picture(pictures, caption(contenders)),
        ]
    if summary["paired"]:
        parts += [report.heading("Closeness, sample by sample"), paired_table(summary)]
    parts += frame_parts(summary)
    if "comparison" in summary:
        parts.append(comparison_table(summary["comparison"]))
    if summary["trajectory"]:
        text = (
            "Signal to error over the timesteps, mean and 95% interval; sampling runs to the right"
        )
        parts += [
            report.heading("Error over timesteps"),
            report.picture(trajectory_figure(summary), text),
        ]
    if summary["scores"]:
        parts += [report.heading("Distribution scores"), scores_table(summary)]
    parts += [report.heading("Size and time"), models_table(summary), bytes_table(contenders)]
    parts += ranges_parts(contenders, stats)
    report.write_report(
        path, "Evaluation of " + contenders[-1 if len(contenders) < 3 else 1].title, parts
    )


def protocol_text(summary: Mapping[str, Any]) -> str:
    s = summary["settings"]
    models = "; ".join(f"{m['title']}: {m['numerics']} in {m['dtype']}" for m in summary["models"])
    return (
        f"{s['num_samples']:,} samples per model, {s['sampler']} with {s['steps']} steps, guidance "
        f"{guidance_text(s['guidance'])} on {s['guidance_channels']} channels, seed {s['seed']}, "
        f"conditions cycled; the same noise, conditions and steps for all. {models}. Run on "
        f"{', '.join(s['device'])}; {report.provenance_text(summary['made'])}."
    )


def caption(contenders: Sequence[Contender]) -> str:
    if len(contenders) == 1:
        return "The first samples"
    return f"{contenders[0].title}, then each other model with its difference from it, enlarged"


def compared_pictures(run: Run, contenders: Sequence[Contender]) -> Image.Image | None:
    """Returns the first samples of each contender with differences; None for latents.

    A video is a row of frames.
    """
    images = []
    for i in range(len(contenders)):
        found = first_samples(run.folder, run.ranges, f"{i}/images", NUM_SHOWN)
        if found is None:
            return None
        images.append(found)
    columns: int | None = None
    if is_video(images[0]):
        columns = len(frame_numbers(images[0].shape[1]))
        images = [frame_rows(videos[:NUM_VIDEOS])[0] for videos in images]
    groups = {contenders[0].title: images[0]}
    for contender, shown in zip(contenders[1:], images[1:], strict=True):
        difference, gain = difference_images(images[0], shown)
        groups[contender.title] = shown
        of = f" ({contender.title})" if len(images) > 2 else ""
        groups[f"difference x{gain}{of}"] = difference
    scale = max(1, 48 // images[0].shape[-3])
    return side_by_side(groups, columns=columns, scale=scale)


def difference_images(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, int]:
    """Returns absolute differences times a power of two that just uses the range, and that gain."""
    difference = np.abs(a.astype(int) - b)
    gain = 1
    while gain < MAX_GAIN and 2 * gain * np.quantile(difference, 0.999) <= 255:
        gain *= 2
    return np.minimum(difference * gain, 255).astype(np.uint8), gain


def with_interval(entry: Mapping[str, float], digits: int) -> str:
    return (
        f"{entry['estimate']:.{digits}f} ({entry['low']:.{digits}f} to {entry['high']:.{digits}f})"
    )


def digits_of(name: str) -> int:
    return 2 if name.endswith("_db") else 4


def paired_table(summary: Mapping[str, Any]) -> str:
    titles = list(summary["paired"])
    names = [name for name in MEASURES if name in summary["paired"][titles[0]]]

    def cells(entry: Mapping[str, float], digits: int) -> list[str]:
        worst = f"{entry['worst']:.{digits}f} (sample {entry['worst_sample']})"
        return [with_interval(entry, digits), worst]

    rows = []
    for name in names:
        found = (cells(summary["paired"][t][name], digits_of(name)) for t in titles)
        rows.append([MEASURES[name], *(cell for pair in found for cell in pair)])
    note = (
        f"Against {summary['models'][0]['title']}: mean over samples, its bootstrap 95% interval, and the "
        "worst sample: a mean hides failures."
    )
    head = [text for title in titles for text in (title, f"{title}, worst")]
    return report.table(["measure (more is closer)", *head], rows, note)


def comparison_table(comparison: Mapping[str, Any]) -> str:
    rows = [
        [MEASURES[n], with_interval(t["difference"], digits_of(n)), f"{t['p_value']:.2g}"]
        for n, t in comparison["a_minus_b"].items()
    ]
    title = (
        f"{comparison['a']} minus {comparison['b']}: paired by sample, sign-flip permutation test."
    )
    return report.table(["measure", "difference, 95% interval", "p"], rows, title)


def trajectory_figure(summary: Mapping[str, Any]) -> Figure:
    """Returns both errors over the timesteps, one color per model."""
    kinds = [k for k in TRAJECTORY if any(k in t for t in summary["trajectory"].values())]
    with matplotlib.rc_context({"font.size": 9}):
        chart = Figure(figsize=(5.2 * len(kinds), 3.6), layout="constrained")
        axes = chart.subplots(1, len(kinds), squeeze=False)[0]
        for axis, kind in zip(axes, kinds, strict=True):
            for title, entry in summary["trajectory"].items():
                if kind not in entry:
                    continue
                at, band = entry["timestep"], entry[kind]
                (line,) = axis.plot(
                    at, band["mean"], label=f"{title}, {band['num_samples']:,} samples"
                )
                axis.fill_between(at, band["low"], band["high"], alpha=0.2, color=line.get_color())
                if at[0] > at[-1] and not axis.xaxis_inverted():
                    axis.invert_xaxis()
            axis.set(xlabel="timestep", ylabel="signal to error, dB", title=TRAJECTORY[kind])
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
    return chart


def scores_table(summary: Mapping[str, Any]) -> str:
    titles = list(summary["scores"])
    names = list(dict.fromkeys(n for t in titles for n in summary["scores"][t]))

    def cell(entry: Mapping[str, Any] | None) -> str:
        if entry is None:
            return "-"
        return f"{entry['value']:.4g}" + (f" ± {entry['error']:.2g}" if "error" in entry else "")

    rows = []
    for name in names:
        entries = [summary["scores"][t].get(name) for t in titles]
        label = next(entry["label"] for entry in entries if entry)
        rows.append([label, *map(cell, entries)])
    reference = summary["settings"].get("reference", "")
    return report.table(["score", *titles], rows, f"Reference: {reference}" if reference else "")


def models_table(summary: Mapping[str, Any]) -> str:
    first = summary["models"][0]
    rows = [
        [
            m["title"],
            m["numerics"],
            m["dtype"],
            m["recipe"] or "-",
            f"{m['bytes']:,}",
            f"{first['bytes'] / m['bytes']:.2f}x",
            f"{m['seconds_per_sample']:.3g}",
            f"{m['compile_seconds']:.3g}",
        ]
        for m in summary["models"]
    ]
    head = [
        "model",
        "numerics",
        "products in",
        "recipe",
        "bytes",
        "smaller by",
        "seconds a sample",
        "compilation, s",
    ]
    note = (
        "Bytes are those of all parameters in memory, without the autoencoder. Seconds, without "
        "compilation and decoding: " + timing_text(summary["models"][0]["num_timings"])
    )
    return report.table(head, rows, note)


def timing_text(num_timings: int) -> str:
    """Returns how much a time is to be trusted, in words."""
    if num_timings == 1:
        return "one timing of one batch on a machine that may have been busy: noisy."
    return f"the median of {num_timings} batches, one run."


def bytes_table(contenders: Sequence[Contender]) -> str:
    """Returns the bytes of each kind of layer in each model."""
    found: list[dict[str, int]] = []
    for contender in contenders:
        parts: dict[str, int] = {}
        family = family_of(contender.checkpoint.model)
        for path, leaf in flatten_dict(contender.checkpoint.params, sep="/").items():
            part = part_of(path, family)
            parts[part] = parts.get(part, 0) + num_bytes(leaf)
        found.append(parts)
    rows = [[part, *(f"{f.get(part, 0):,}" for f in found)] for part in sorted(found[0])]
    return report.table(["layers", *(c.title for c in contenders)], rows, "Bytes by kind of layer")


def ranges_parts(contenders: Sequence[Contender], stats: Stats | None) -> list[str]:
    """Returns the histograms of ranges by layer, of every model's weights and of the inputs."""
    paths = block_layers(contenders[0].checkpoint.params)
    if not paths:
        return []
    sizes = report.shown_group_sizes([c.checkpoint.params for c in contenders], paths)
    titled = {
        f"weights, {c.title}": weight_ranges(c.checkpoint.params, paths, sizes) for c in contenders
    }
    rows = [weight_errors(contenders, paths)] if same_layers(contenders) else []
    if stats is not None:
        titled["inputs"] = input_ranges(stats, paths)
    text = f"Histograms of ranges by layer: of weights in {report.group_text(sizes)}" + (
        ", and of every input channel at every timestep" if stats is not None else ""
    )
    return [
        report.heading("Ranges by layer"),
        report.picture(range_histograms(titled, paths), text),
        *rows,
    ]


def same_layers(contenders: Sequence[Contender]) -> bool:
    """Returns whether there are several contenders of one architecture."""
    models = {c.checkpoint.model for c in contenders}
    return len(contenders) > 1 and len(models) == 1


def weight_errors(contenders: Sequence[Contender], paths: Iterable[str]) -> str:
    """Returns a table of how near each layer's weights are to the first model's, in dB."""
    rows = []
    for path in paths:
        reference, *others = (kernel_of(c.checkpoint.params, path)[None] for c in contenders)
        rows.append([path, *(f"{signal_to_noise_db(reference, w)[0]:.1f}" for w in others)])
    note = f"Weights against {contenders[0].title}: signal to error, dB"
    return report.table(["layer", *(c.title for c in contenders[1:])], rows, note)
