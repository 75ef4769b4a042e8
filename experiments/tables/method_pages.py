"""Writes docs/methods/NAME.md, a page for every method of the table, and docs/methods/all.md.

    python experiments/tables/method_pages.py

Takes seconds. Run it after a method is added or its row is changed; a test holds the pages against
the table and against the figures of `experiments/results` that they show.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from qdit_jax.methods import METHODS, method_named

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "methods"
RESULTS = ROOT / "experiments" / "results"
# The later file has more samples: where both have a row, its row counts.
FILES = ("methods.json", "methods_seeds.json")
STATE = "finetuned"  # the packaged model
MADE_BY = "<!-- Written by experiments/tables/method_pages.py from the table of methods. -->"
DATA = {
    "items": "inputs of the network, recorded while sampling (`--items`, else sampled first)",
    "stats": "ranges of the layers' inputs at every timestep (`--stats`)",
}
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{5})")


def main() -> None:
    """Writes every page."""
    PAGES.mkdir(exist_ok=True)
    for name, text in pages().items():
        (PAGES / name).write_text(text)


def pages() -> dict[str, str]:
    """Returns the text of every page by its file name."""
    measured = measured_rows()
    rows = [method_named(name).to_json() for name in METHODS]
    found = {f"{row['name']}.md": page(row, measured) for row in rows}
    return found | {"all.md": index(rows)}


def measured_rows() -> list[dict[str, Any]]:
    """Returns the rows of the packaged model, each with the day and the number of its samples."""
    found = {}
    for name in FILES:
        run = json.loads((RESULTS / name).read_text())
        settings = run["settings"]
        samples = settings["num_samples"] * len(settings["seeds"])
        for row in run["rows"]:
            if row["state"] == STATE:
                day = row.get("made", run["made"])["date"][:10]  # later rows say their own
                found[row["bits"], row["method"]] = {**row, "day": day, "samples": samples}
    return list(found.values())


def page(row: dict[str, Any], measured: list[dict[str, Any]]) -> str:
    """Returns the page of one method: idea, paper, data, cost, hardware, command, figures."""
    name = row["name"]
    facts = [
        ("Paper", linked(row["paper"]) or "none; it is this library's own, or common practice"),
        ("Calibrates on", ", ".join(DATA[need] for need in row["needs"]) or "nothing"),
        ("At run time", row["runtime_cost"]),
        ("Hardware format", row["hardware"]),
        ("Preset settings", ", ".join(map(setting, row["settings"].items())) or "the defaults"),
    ]
    lines = [
        MADE_BY,
        "",
        f"# {name}",
        "",
        row["idea"],
        "",
        "| | |",
        "|---|---|",
        *(f"| {title} | {text} |" for title, text in facts),
        "",
        "```bash",
        f"qdit quantize xl2 xl2-{name} --recipe w4a8 --method {name}",
        "```",
        "",
        *figures(name, measured),
        f"The row is `qdit_jax/methods/{name}.py`; [methods](../methods.md) has the parts that it is "
        "made of, and says which one to take.",
    ]
    return "\n".join(lines) + "\n"


def setting(item: tuple[str, Any]) -> str:
    """Returns a setting of `Recipe.preset` as it is given in Python."""
    name, value = item
    return f"`{name}={value['name'] if isinstance(value, dict) else value!r}`"


def linked(paper: str) -> str:
    """Returns a paper's title with its arXiv numbers as links."""
    return ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)


def figures(name: str, measured: list[dict[str, Any]]) -> list[str]:
    """Returns lines with what was measured of a method on the packaged model."""
    rows = [row for row in measured if row["method"].partition(",")[0] == name]
    if not rows:
        return ["It has no row in the table of methods on the packaged model.", ""]
    return [
        "On the packaged model, by `experiments/tables/paper_tables.py` (2-core CPU, 25 steps); all "
        "methods side by side: [results](../results.md#methods).",
        "",
        "| bits | groups | closeness, dB (95%) | bytes | s to quantize | samples | day |",
        "|---|---|---|---|---|---|---|",
        *map(figure_row, rows),
        "",
    ]


def figure_row(row: dict[str, Any]) -> str:
    """Returns the line of one measured row."""
    db = row["closeness_db"]
    groups = re.sub(r"^g(?=\d)", "groups of ", row["method"].partition(", ")[2])
    return (
        f"| {row['bits'].upper()} | {groups} | {db['estimate']:.1f} ({db['low']:.1f} to "
        f"{db['high']:.1f}) | {row['bytes']:,} | {row['seconds_to_quantize']:.0f} | "
        f"{row['samples']:,} | {row['day']} |"
    )


def index(rows: list[dict[str, Any]]) -> str:
    """Returns the page that lists all methods."""
    lines = [
        MADE_BY,
        "",
        "# All methods",
        "",
        "What `qdit methods` prints, a page each. [Methods](../methods.md) says which one to take.",
        "",
        "| method | idea | calibrates on |",
        "|---|---|---|",
    ]
    for row in rows:
        needs = ", ".join(row["needs"]) or "nothing"
        lines.append(f"| [{row['name']}]({row['name']}.md) | {row['idea']} | {needs} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
