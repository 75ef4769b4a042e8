"""The pictures of a search: cost against error, and the choice of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qdit_jax.allocation import SearchResult, uniform_assignment, uniform_sizes
from qdit_jax.files import PathLike

MOST_COLUMNS = 16  # of the map, if all choices are shown
INK, SOFT, ACCENT, MARK = "#222222", "#9aa5b1", "#0b6e99", "#c2410c"


def draw_front(path: PathLike, result: SearchResult) -> None:
    """Draws cost against error: the front, what was measured, uniform sizes, the choice."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    rows = result.history["measured"]
    is_predicted = result.history["method"] == "default" or not rows
    label = "front (predicted, additive)" if is_predicted else "front (measured)"
    shown = result.budget.shown
    axes.plot(
        [shown(cost) for cost in result.front.cost],
        result.front.error,
        "-",
        color=ACCENT,
        lw=1.5,
        label=label,
    )
    if rows:
        cost, error = [shown(row["cost"]) for row in rows], [row["fitness"] for row in rows]
        axes.plot(cost, error, ".", color=SOFT, ms=4, label="measured", zorder=1)
    by_assignment = {tuple(row["assignment"]): row for row in rows}
    points = {
        size: by_assignment[key]
        for size in uniform_sizes(result.space)
        if (key := tuple(uniform_assignment(result.space, size).tolist())) in by_assignment
    }
    for number, (size, row) in enumerate(points.items()):
        name = "uniform sizes" if number == 0 else None
        axes.plot(shown(row["cost"]), row["fitness"], "s", color=MARK, ms=6, label=name)
        text = "channel" if size == 0 else str(size)
        axes.annotate(
            text,
            (shown(row["cost"]), row["fitness"]),
            xytext=(5, 4),
            textcoords="offset points",
            color=MARK,
        )
    chosen = by_assignment.get(tuple(result.history["assignment"]))
    if chosen is not None:
        axes.plot(shown(chosen["cost"]), chosen["fitness"], "*", color=INK, ms=13, label="chosen")
    limit = result.history["report"].get("error_limit")
    if limit is None:
        axes.axvline(shown(result.budget.limit), color=SOFT, lw=1, ls="--")
        dashed = "the budget"
    else:
        axes.axhline(limit, color=SOFT, lw=1, ls="--")
        dashed = f"the error allowed, {result.history['report']['within']}"
    unit = "latency, ms" if result.budget.name == "latency" else result.budget.name
    axes.set_xlabel(f"cost ({unit}); dashed: {dashed}")
    axes.set_ylabel(f"error ({result.history['objective']})")
    if all(value > 0 for value in [*result.front.error, *(row["fitness"] for row in rows)]):
        axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=9)
    save(figure, path)


def draw_map(path: PathLike, result: SearchResult) -> None:
    """Draws layers by choices: the choice in black, the ten best assignments' choices in blue.

    Of many choices those that no such assignment has are left out.
    """
    history = result.history
    names = history["choices"]
    best = ten_best(result) or [history]
    labels = shown_labels(names, [row["assignment"] for row in [history, *best]])
    shares = np.zeros((len(history["layers"]), len(labels)))
    for row in best:
        for layer, choice in enumerate(row["assignment"]):
            shares[layer, labels.index(names[layer][choice])] += 1 / len(best)
    # Names of choices stand upright below it.
    height = 1.0 + 0.075 * max(map(len, labels)) + 0.19 * len(shares)
    figure = Figure(figsize=(3.2 + 0.45 * len(labels), height), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.4, aspect="auto")
    chosen = [
        labels.index(choices[i]) for choices, i in zip(names, history["assignment"], strict=True)
    ]
    axes.plot(chosen, range(len(chosen)), "s", color=INK, ms=5)
    axes.set_yticks(range(len(shares)), history["layers"], fontsize=7)
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8)
    axes.set_title("chosen (black); share among the ten best (blue)", fontsize=9)
    save(figure, path)


def ten_best(result: SearchResult) -> list[dict[str, Any]]:
    """Returns what was measured of least error within the budget, or of least cost within the error."""
    rows = [r for r in result.history["measured"] if result.budget.allows(r["assignment"])]
    by, limit = "fitness", result.history["report"].get("error_limit")
    if limit is not None:
        by, rows = "cost", [row for row in rows if row["fitness"] <= limit]
    return sorted(rows, key=lambda row: row[by])[:10]


def shown_labels(names: Sequence[Sequence[str]], assignments: Sequence[Sequence[int]]) -> list[str]:
    """Returns the columns of the map: all choices, or of many those that an assignment has.

    Args:
        names: of every layer's choices.
    """
    every = list(dict.fromkeys(name for choices in names for name in choices))
    if len(every) <= MOST_COLUMNS:
        return every
    used = {names[layer][choice] for one in assignments for layer, choice in enumerate(one)}
    return [name for name in every if name in used]


def save(figure: Figure, path: PathLike) -> None:
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})
