"""Makes the table and the figure of the comparison of search methods.

    python experiments/plot_search.py runs/search/methods-w4a8.json runs/search/methods-w3a8.json \\
        --out search_methods

Reads what `bench_search.py --part methods` wrote; prints a Markdown table and writes OUT.md and
OUT.png. A second's work.
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
    "default": "sensitivities + knapsack (default)",
}
PAPER_EVALUATIONS = 550 * 800 * 50 * 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("search_methods"))
    args = parser.parse_args()
    results = {
        file.stem.removeprefix("methods-"): json.loads(file.read_text()) for file in args.files
    }
    text = "\n".join(table(name, result) for name, result in results.items())
    print(text)
    args.out.with_suffix(".md").write_text(text)
    draw(args.out.with_suffix(".png"), results)


def table(name: str, result: dict[str, Any]) -> str:
    """Returns a Markdown table of one setting, a row a method."""
    lines = [
        f"**{name}**, error of final latents on unseen seeds; uniform: {result['uniform']['error']:.3g}",
        "",
        "| method | error | against uniform | 95% interval of the difference | bit operations "
        "against uniform | network evaluations | share of the published evolution's |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, rows in by_method(result).items():
        gaps = np.concatenate(
            [np.array(row["errors"]) - result["uniform"]["errors"] for row in rows]
        )
        low, high = interval(gaps)
        error = np.mean([row["error"] for row in rows])
        share = np.mean([row["network_evaluations"] for row in rows])
        bitops = np.mean([row["bitops_of_uniform"] for row in rows])
        lines.append(
            f"| {NAMES[method]} ({len(rows)} keys) | {error:.3g} "
            f"| {error / result['uniform']['error'] - 1:+.1%} | [{low:.2g}, {high:.2g}] "
            f"| {bitops:.3f} | {share:,.0f} | 1/{PAPER_EVALUATIONS / share:.0f} |"
        )
    return "\n".join([*lines, ""])


def by_method(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in result["runs"]:
        rows.setdefault(row["method"], []).append(row)
    return rows


def interval(values: np.ndarray, num_resamples: int = 2000) -> tuple[float, float]:
    """Returns the 95% bootstrap interval of the mean."""
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(values), (num_resamples, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def draw(path: Path, results: dict[str, Any]) -> None:
    """Draws error against network evaluations, one panel a setting."""
    figure = Figure(figsize=(5 * len(results), 3.8), layout="constrained")
    for axes, (name, result) in zip(
        np.atleast_1d(figure.subplots(1, len(results))), results.items(), strict=True
    ):
        axes.axhline(result["uniform"]["error"], color="#9aa5b1", ls="--", label="uniform")
        for method, rows in by_method(result).items():
            axes.plot(
                [row["network_evaluations"] for row in rows],
                [row["error"] for row in rows],
                "o",
                label=NAMES[method],
            )
        axes.set_xscale("log")
        axes.set_xlabel("network evaluations of the search")
        axes.set_ylabel("error on unseen seeds")
        axes.set_title(name)
        axes.legend(frameon=False, fontsize=8)
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})


if __name__ == "__main__":
    main()
