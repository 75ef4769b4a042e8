"""The picture of a bench: the ratio of each network's time to the baseline's, with its interval."""

from __future__ import annotations

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qdit_jax.files import PathLike
from qdit_jax.speed import Bench, Row


def draw_bench(path: PathLike, found: Bench) -> None:
    """Draws ratios by network, a color per batch size, a line at the baseline."""
    labels = list(dict.fromkeys(map(label, found.rows)))
    batches = list(dict.fromkeys(row.batch for row in found.rows))
    figure = Figure(figsize=(7.5, 1.2 + 0.36 * len(labels)), layout="constrained")
    axes = figure.add_subplot()
    for number, batch in enumerate(batches):
        rows = [row for row in found.rows if row.batch == batch]
        offset = (number - (len(batches) - 1) / 2) * 0.22
        at = [labels.index(label(row)) + offset for row in rows]
        middle = [row.ratio.median for row in rows]
        ends = [
            [row.ratio.median - row.ratio.low for row in rows],
            [row.ratio.high - row.ratio.median for row in rows],
        ]
        text = f"batch {batch}: {rows[0].milliseconds.median:.3g} ms {rows[0].title}"
        axes.errorbar(middle, at, xerr=ends, fmt="o", ms=4, lw=1, color=f"C{number}", label=text)
    axes.axvline(1, color="#9aa5b1", lw=1, ls="--")
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"time of a step / that of {found.baseline}, median and 95% interval")
    axes.legend(frameon=False, fontsize=8)
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})


def label(row: Row) -> str:
    """Returns what a row is called."""
    return " ".join([row.title, row.numerics or "", *row.implementations]).strip()
