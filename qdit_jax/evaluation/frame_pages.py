"""What the report of an evaluation says of videos: errors frame by frame, and flickering."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from qdit_jax import report
from qdit_jax.evaluation.summary import FRAMES


def frame_parts(summary: Mapping[str, Any]) -> list[str]:
    """Returns the parts of the page on videos; none of images."""
    parts = []
    if "frames" in summary:
        text = "Signal to error of every frame: mean over samples, and the worst sample (dashed)"
        parts += [
            report.heading("Frame by frame"),
            report.picture(frame_figure(summary["frames"]), text),
            worst_table(summary["frames"]),
        ]
    if "flickering" in summary:
        parts.append(flickering_table(summary["flickering"]))
    return parts


def frame_figure(frames: Mapping[str, Any]) -> Figure:
    """Returns the errors over the frames, one color per model."""
    kinds = [kind for kind in FRAMES if any(kind in found for found in frames.values())]
    with matplotlib.rc_context({"font.size": 9}):
        chart = Figure(figsize=(5.2 * len(kinds), 3.2), layout="constrained")
        axes = chart.subplots(1, len(kinds), squeeze=False)[0]
        for axis, kind in zip(axes, kinds, strict=True):
            for title, found in frames.items():
                entry = found[kind]
                (line,) = axis.plot(entry["mean"], marker=".", label=title)
                axis.plot(entry["worst"], "--", color=line.get_color(), linewidth=1)
            axis.set(xlabel="frame", ylabel="signal to error, dB", title=kind.split("_")[0] + "s")
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
    return chart


def worst_table(frames: Mapping[str, Any]) -> str:
    """Returns the worst single frame of each model."""
    rows = []
    for title, found in frames.items():
        for kind, text in FRAMES.items():
            if kind in found:
                at = found[kind]["worst_frame"]
                where = f"frame {at['frame']} of sample {at['sample']}"
                rows.append([title, text, f"{at['db']:.2f}", where])
    return report.table(["model", "measure", "worst, dB", "where"], rows, "The worst frame of all")


def flickering_table(flickering: Mapping[str, Any]) -> str:
    """Returns the temporal flickering of each model's own clips, as VBench counts it."""
    rows = [
        [
            title,
            f"{entry['estimate']:.4f} ({entry['low']:.4f} to {entry['high']:.4f})",
            f"{entry['worst']:.4f} (sample {entry['worst_sample']})",
        ]
        for title, entry in flickering.items()
    ]
    note = (
        "Temporal flickering by VBench's formula, 1 less the mean absolute difference of consecutive "
        "frames: 1 where nothing moves. Motion lowers it too: compare models, not prompts."
    )
    return report.table(["model", "mean", "worst"], rows, note)
