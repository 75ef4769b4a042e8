"""The report of an evaluation: one self-contained page, and its pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
from flax.traverse_util import flatten_dict
from matplotlib.figure import Figure
from PIL import Image

from qdit_jax import report
from qdit_jax.calibration import Stats
from qdit_jax.evaluation.frame_pages import frame_parts
from qdit_jax.evaluation.pictures import MOST_DETAILED
from qdit_jax.evaluation.summary import MEASURES, TRAJECTORY, num_bytes
from qdit_jax.evaluation.trajectories import Contender
from qdit_jax.files import PathLike
from qdit_jax.metrics import signal_to_noise_db
from qdit_jax.models import family_of
from qdit_jax.report import (
    block_layers,
    input_ranges,
    kernel_of,
    part_of,
    range_histograms,
    weight_ranges,
)
from qdit_jax.sampling import guidance_text


def write_evaluation(
    path: PathLike,
    title: str,
    summary: Mapping[str, Any],
    contenders: Sequence[Contender],
    pictures: Image.Image | None,
    stats: Stats | None,
    clip: bytes | None = None,
) -> None:
    """Writes the page of a finished evaluation; what was not measured is left out.

    Args:
        clip: a GIF of videos side by side.
    """
    parts = [report.paragraph(protocol_text(summary))]
    if pictures is not None:
        parts += [
            report.heading("The same noise and conditions"),
            report.picture(pictures, caption(contenders)),
        ]
    if clip is not None:
        parts.append(report.animation(clip, "The first videos of each model, moving"))
    if summary["paired"]:
        parts += [report.heading("Closeness, sample by sample"), paired_table(summary)]
    if len(summary["paired"]) > 1:
        text = "Bytes against closeness, with 95% intervals"
        parts.append(report.picture(closeness_figure(summary), text))
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
    if len(contenders) <= MOST_DETAILED:
        parts += ranges_parts(contenders, stats)
    report.write_report(path, title, parts)


def protocol_text(summary: Mapping[str, Any]) -> str:
    s = summary["settings"]
    return (
        f"{s['num_samples']:,} samples per model, {s['sampler']} with {s['steps']} steps, guidance "
        f"{guidance_text(s['guidance'])} on {s['guidance_channels']} channels, seed {s['seed']}, "
        f"conditions cycled; the same noise, conditions and steps for all. {numerics_text(summary)}. Run on "
        f"{', '.join(s['device'])}; {report.provenance_text(summary['made'])}."
    )


def numerics_text(summary: Mapping[str, Any]) -> str:
    """Returns how each model computes, those that do alike after the first in one phrase."""
    first, *others = ((m["title"], f"{m['numerics']} in {m['dtype']}") for m in summary["models"])
    alike = {text for _, text in others}
    if len(others) > 1 and len(alike) == 1:
        others = [("the others", alike.pop())]
    return "; ".join(f"{title}: {text}" for title, text in (first, *others))


def caption(contenders: Sequence[Contender]) -> str:
    if not 1 < len(contenders) <= MOST_DETAILED:
        return "The first samples"
    return f"{contenders[0].title}, then each other model with its difference from it, enlarged"


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
    num_models = len(summary["models"])
    return readable_table(["measure (more is closer)", *head], rows, note, num_models)


def readable_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], note: str, num_models: int
) -> str:
    """Returns a table with columns of models, or with rows of them where they are many."""
    if num_models > MOST_DETAILED:
        (_, *names), *rows = zip(head, *rows, strict=True)
        head = ["model", *names]
    return report.table(head, rows, note)


def closeness_figure(summary: Mapping[str, Any]) -> Figure:
    """Returns a chart of bytes against the closeness of final latents, one point per model."""
    first = summary["models"][0]["title"]
    with matplotlib.rc_context({"font.size": 9}):
        chart = Figure(figsize=(8.5, 4), layout="constrained")
        axes = chart.subplots()
        for model in summary["models"][1:]:
            near = summary["paired"][model["title"]]["latent_snr_db"]
            middle = near["estimate"]
            spread = [[middle - near["low"]], [near["high"] - middle]]
            at = model["bytes"] / 1e6
            axes.errorbar(at, middle, spread, fmt="o", capsize=3, label=model["title"])
        axes.set(xlabel="megabytes of parameters", ylabel=f"closeness to {first}, dB")
        axes.margins(0.1)
        axes.grid(alpha=0.3)
        chart.legend(loc="outside right center", frameon=False)  # names beside points overlap
    return chart


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
    note = f"Reference: {reference}" if reference else ""
    return readable_table(["score", *titles], rows, note, len(titles))


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
    head = ["layers", *(c.title for c in contenders)]
    return readable_table(head, rows, "Bytes by kind of layer", len(contenders))


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
