"""Makes the table and the figure of the comparison of search methods.

    python experiments/tables/plot_search.py runs/search/methods-w4a8.json runs/search/methods-w3a8.json \\
        --out search_methods

Reads what `bench_search.py --part methods` wrote (files of one name hold rows of one setting);
prints a Markdown table and writes OUT.md and OUT.png. A second's work.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

NAMES = {
    "qdit-paper": "evolution, as published",
    "qdit-release": "evolution, as released",
    "random": "random search",
    "nsga2": "NSGA-II from the predicted front",
    "default": "sensitivities + knapsack (default)",
}
COLUMNS = (
    "method",
    "keys",
    "error",
    "against uniform (95%)",
    "bit operations",
    "network evaluations",
    "of the published evolution's",
)
PAPER_EVALUATIONS = 550 * 800 * 50 * 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("search_methods"))
    args = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    for file in args.files:
        add(results, file.stem.removeprefix("methods-"), json.loads(file.read_text()))
    text = "\n".join(table(name, result) for name, result in results.items())
    print(text)
    args.out.with_suffix(".md").write_text(text)
    draw(args.out.with_suffix(".png"), results)


def add(results: dict[str, dict[str, Any]], name: str, found: dict[str, Any]) -> None:
    """Adds the rows of one file; the uniform recipe ties the files of one setting together."""
    known = results.setdefault(name, {**found, "runs": []})
    if not np.allclose(known["uniform"]["errors"], found["uniform"]["errors"], rtol=1e-4):
        raise SystemExit(f"files of {name} measured different uniform errors; plot them apart.")
    known["runs"] += found["runs"]


def table(name: str, result: dict[str, Any]) -> str:
    """Returns a Markdown table of one setting, a row a method."""
    lines = [
        f"**{name.upper()}** (uniform 128: error {result['uniform']['error']:.3g})",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|" + "---|" * len(COLUMNS),
    ]
    uniform = np.array(result["uniform"]["errors"])
    for method, rows in by_method(result).items():
        errors = np.array([row["errors"] for row in rows])
        low, high = interval(errors - uniform) / uniform.mean()
        share = np.mean([row["network_evaluations"] for row in rows])
        bitops = np.mean([row["bitops_of_uniform"] for row in rows])
        lines.append(
            f"| {NAMES[method]} | {len(rows)} | {errors.mean():.3g} "
            f"| {errors.mean() / uniform.mean() - 1:+.1%} ({low:+.1%} to {high:+.1%}) "
            f"| {bitops:.3f} x | {share:,.0f} | 1/{PAPER_EVALUATIONS / share:.0f} |"
        )
    return "\n".join([*lines, ""])


def by_method(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Returns the rows of every method, in the order of `NAMES`."""
    rows = {method: [row for row in result["runs"] if row["method"] == method] for method in NAMES}
    return {method: found for method, found in rows.items() if found}


def interval(gaps: np.ndarray, num_resamples: int = 5000) -> np.ndarray:
    """Returns the 95% interval of the mean of `[keys, samples]`; both are drawn again."""
    rng = np.random.default_rng(0)
    keys = rng.integers(0, gaps.shape[0], (num_resamples, gaps.shape[0]))
    samples = rng.integers(0, gaps.shape[1], (num_resamples, gaps.shape[1]))
    means = [gaps[np.ix_(one, several)].mean() for one, several in zip(keys, samples, strict=True)]
    return np.quantile(means, [0.025, 0.975])


def draw(path: Path, results: dict[str, Any]) -> None:
    """Draws error against network evaluations, one panel a setting."""
    figure = Figure(figsize=(5 * len(results), 4.2), layout="constrained")
    for axes, (name, result) in zip(
        np.atleast_1d(figure.subplots(1, len(results))), results.items(), strict=True
    ):
        axes.axhline(result["uniform"]["error"], color="#9aa5b1", ls="--", label="uniform 128")
        for method, rows in by_method(result).items():
            bitops = np.mean([row["bitops_of_uniform"] for row in rows])
            is_equal = bitops < 1.01
            axes.plot(
                [row["network_evaluations"] / 1000 for row in rows],
                [row["error"] for row in rows],
                "o" if is_equal else "x",
                label=NAMES[method] + ("" if is_equal else " (more bit operations)"),
            )
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("thousand network evaluations of the search")
        axes.set_ylabel("error on unseen seeds")
        axes.set_title(name.upper())
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})


if __name__ == "__main__":
    main()
