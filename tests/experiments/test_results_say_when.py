"""What experiments write as JSON says itself when, where and with which versions it was made."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import qdit_jax as qdit
from qdit_jax import report
from qdit_jax.testing import realistic_dit

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
# They write no measurement of a machine: a file of weights, counts of the code's text, rows of trained
# models that lie in one file by step. Others write what they are given with its provenance.
OTHERS = {
    "make_random_checkpoint.py",
    "house_figures.py",
    "grow_outliers.py",
    "paper_report.py",
    "block_sweep.py",
}
WRITERS = [
    path
    for path in sorted(EXPERIMENTS.rglob("*.py"))
    if "json.dump" in path.read_text() and path.name not in OTHERS
]


def test_the_machine_is_read_from_the_system(monkeypatch):
    machine = report.provenance()["machine"]
    assert re.match(rf"(\d+ of )?{os.cpu_count()} cores, \w+ \w+", machine)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert report.provenance()["machine"].startswith("1 of 8 cores, ")


@pytest.mark.parametrize("path", WRITERS, ids=lambda path: path.stem)
def test_a_script_that_writes_json_asks_for_the_provenance(path):
    tree = ast.parse(path.read_text())
    called = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert called & {"provenance", "versions", "versions_and_date"}
    texts = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    docs = {
        ast.get_docstring(node, clean=False)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
    }
    for text in texts - docs:
        assert not re.search(r"\b20\d\d-\d\d-\d\d\b|\d+-core", text), text


def realistic_checkpoint():
    return qdit.Checkpoint(*realistic_dit(0, hidden_size=32, depth=1, num_heads=2))


def test_every_cell_of_the_methods_table_says_it(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(EXPERIMENTS / "tables"))
    before = set(sys.modules)
    tables = importlib.import_module("paper_tables")
    options = ["--out", str(tmp_path), "--states", "video", "--methods", "rtn", "--bits", "w8a8"]
    monkeypatch.setattr(sys, "argv", ["paper_tables.py", *options, "--seeds", "0"])
    state = tables.State(tmp_path, scored=False)
    monkeypatch.setattr(tables, "states_of", lambda args: {"video": state})
    bed = tables.Bed("video", realistic_checkpoint(), None, None, {0: np.zeros((2, 3, 4, 4, 1))})
    monkeypatch.setattr(tables, "bed_of", lambda *args: bed)
    near = {"estimate": 20.0, "low": 19.0, "high": 21.0}
    measured = {"closeness_db": near, "bytes": 1, "seconds_to_quantize": 0.0}
    monkeypatch.setattr(tables, "cell", lambda *args: measured)
    try:
        tables.main()
    finally:
        for name in set(sys.modules) - before:
            if str(EXPERIMENTS) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]
    content = json.loads((tmp_path / "tables.json").read_text())
    now = report.provenance()
    for made in (content["made"], content["full"]["video"]["made"], content["rows"][0]["made"]):
        assert made.keys() == now.keys()
        assert {k: v for k, v in made.items() if k != "date"} == {
            k: v for k, v in now.items() if k != "date"
        }
