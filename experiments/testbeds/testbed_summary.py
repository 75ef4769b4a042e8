"""Puts several reports of `check_testbed.py` side by side, each figure against its threshold.

    python experiments/testbeds/testbed_summary.py testbed/wide --states as_trained injected finetuned

Reads `<folder>/<state>.json` of every state, prints the table and writes `<folder>/summary.md`.
Takes no time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STATES = ("as_trained", "injected", "finetuned")


def summary(reports: dict[str, dict[str, Any]]) -> str:
    """Returns Markdown: a line for every property, for every recipe and for every line of the gate.

    A bold figure misses its threshold.
    """
    names = list(reports)
    head = [f"| | threshold | {' | '.join(names)} |", "|---|---:|" + "---:|" * len(names)]
    lines = ["**Gate.**", "", *head]
    lines += compared([report["gate"] for report in reports.values()])
    verdicts = [all(line["passes"] for line in r["gate"]) for r in reports.values()]
    lines.append(f"| the gate | | {' | '.join('passes' if v else '**fails**' for v in verdicts)} |")
    lines += ["", "**Final latents against full precision, dB** (95% interval).", ""]
    lines += [f"| | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    decibels = [report["decibels"] for report in reports.values()]
    for name in dict.fromkeys(name for found in decibels for name in found):
        cells = [interval(found.get(name)) for found in decibels]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "**Properties.**", "", *head]
    lines += compared([report["properties"] for report in reports.values()])
    return "\n".join(lines) + "\n"


def compared(columns: Sequence[Sequence[dict[str, Any]]]) -> list[str]:
    """Returns a row for every property; the columns list the same ones in the same order."""
    rows = []
    for cells in zip(*columns, strict=True):
        first = cells[0]
        threshold = "" if first["least"] is None else f"≥ {first['least']:g}"
        figures = [f"{c['value']:.2f}" if c["passes"] else f"**{c['value']:.2f}**" for c in cells]
        rows.append(f"| {first['name']} | {threshold} | {' | '.join(figures)} |")
    return rows


def interval(found: dict[str, float] | None) -> str:
    if found is None:
        return ""
    return f"{found['estimate']:.1f} [{found['low']:.1f}, {found['high']:.1f}]"


def write_summary(folder: Path, states: Sequence[str]) -> str:
    """Returns the summary of the reports `<folder>/<state>.json` and writes it as `summary.md`."""
    reports = {state: json.loads((folder / f"{state}.json").read_text()) for state in states}
    text = summary(reports)
    (folder / "summary.md").write_text(text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--states", nargs="+", default=STATES)
    args = parser.parse_args()
    print(write_summary(args.folder, args.states))


if __name__ == "__main__":
    main()
