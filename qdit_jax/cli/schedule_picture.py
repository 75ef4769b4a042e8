"""The picture of `qdit schedule`: the error of every step, and the schedules that were measured."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qdit_jax.allocation import EXCHANGED, ChosenSteps, MeasuredSchedule, as_level, level_text
from qdit_jax.files import PathLike

INK, SOFT, ACCENT, MARK = "#222222", "#9aa5b1", "#0b6e99", "#c2410c"


def draw_schedule(path: PathLike, chosen: ChosenSteps) -> None:
    """Draws the error of each step alone at each level, the chosen bits, and all candidates."""
    figure = Figure(figsize=(7, 8), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1)
    steps = np.arange(len(chosen.errors))
    for number, level in enumerate(chosen.levels):
        column = chosen.errors[:, number]
        if column.any():
            name = level_text(level) + ("" if isinstance(level, tuple) else " bits")
            top.plot(steps, column, "o-", ms=3, lw=1, label=f"this step alone at {name}")
    if (chosen.errors[chosen.errors != 0] > 0).any():
        top.set_yscale("log")
    for axes in (top, middle):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    top.set_ylabel("error of final latents")
    top.legend(frameon=False, fontsize=9)
    by_step = chosen.by_step
    shown = sorted(set(by_step), key=lambda one: [-1 if b is None else b for b in as_level(one)])
    middle.step(steps, [shown.index(one) for one in by_step], where="mid", color=INK)
    middle.set_yticks(range(len(shown)), list(map(level_text, shown)))
    middle.set_ylim(-0.5, len(shown) - 0.5)
    middle.set_ylabel(f"bits chosen\n({mean_text(chosen, chosen)})")
    middle.set_xlabel("sampling step")
    draw_candidates(bottom, chosen)
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})


def mean_text(chosen: ChosenSteps, row: ChosenSteps | MeasuredSchedule) -> str:
    """Returns what a schedule costs per step, in what the budget counts."""
    if chosen.has_pairs:
        return f"mean {row.mean_bitops:.4g} bit operations"
    return f"mean {row.mean_bits:.4g} bits"


def draw_candidates(axes: Axes, chosen: ChosenSteps) -> None:
    """Draws predicted against measured errors; the chosen schedule is a star."""
    for number, row in enumerate(chosen.candidates):
        color = MARK if row.name == "least predicted" else SOFT
        marker, size = ("*", 13) if number == 0 else ("o", 5)
        color = INK if number == 0 else color
        axes.plot(row.predicted, row.measured, marker, ms=size, color=color)
        if row.name != EXCHANGED:
            place = (row.predicted, row.measured)
            axes.annotate(row.name, place, xytext=(5, 4), textcoords="offset points", fontsize=8)
    values = [value for row in chosen.candidates for value in (row.predicted, row.measured)]
    if min(values) > 0:
        ends = [min(values), max(values)]
        axes.plot(ends, ends, "-", color=ACCENT, lw=1, label="measured as predicted")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.legend(frameon=False, fontsize=9)
    axes.set_xlabel("predicted error (sum of its steps')")
    axes.set_ylabel("measured error (star: chosen)")
