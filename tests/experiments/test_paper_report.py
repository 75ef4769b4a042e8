"""The table of methods says what every state took, and the documentation repeats its figures."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def paper_report(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "experiments/tables"), *sys.path])
    return importlib.import_module("paper_report")


def ends(text: str, titles: list[str]) -> set[tuple[str, str, str]]:
    """Returns method, bytes and seconds of a table's rows; `titles` are its first columns."""
    found, inside = set(), False
    for line in text.splitlines():
        columns = [column.strip() for column in line.strip("|").split("|")]
        if not line.startswith("|"):
            inside = False
        elif columns == [*titles, "bytes", "s to quantize"]:
            inside = True
        elif inside and "," in columns[0] + columns[-2] and columns[0] != "full precision":
            found.add((columns[0], columns[-2], columns[-1]))
    return found


@pytest.mark.parametrize(
    ("name", "prefix", "bits"),
    [
        ("methods", "", ["w8a8", "w6a8", "w4a8", "w4a4", "w3a8"]),
        ("methods_wide", "wide_", ["w4a8", "w4a4", "w8a8", "w6a8", "w3a8"]),
    ],
)
def test_the_documentation_has_the_bytes_and_seconds_of_all_states(
    paper_report, name, prefix, bits
):
    content = json.loads((ROOT / f"experiments/results/{name}.json").read_text())
    content["rows"] = [row for row in content["rows"] if row["bits"] in bits]
    states = paper_report.ordered(content["rows"], "state")
    table = ends(paper_report.markdown(content), ["method", *states])
    shown = [state.removeprefix(prefix) for state in states]
    documented = ends((ROOT / "docs/results.md").read_text(), ["method", *shown])
    assert len(table) >= 5 * len(bits)
    assert table == documented


def test_a_method_of_several_sizes_shows_the_least_and_the_greatest(paper_report):
    assert paper_report.span([2000, 1000, 1500], ",") == "1,000 to 2,000"
    assert paper_report.span([1.2, 0.9], ".0f") == "1"
