"""The figures of how the code is built: counts of small texts and walks that are known."""

from __future__ import annotations

import ast
import importlib
import os
import sys
from pathlib import Path

import pytest
from house_figures import ROOT, Trace, figures, walk_figures
from source_figures import body_lines, functions, imported_modules, layer_names, num_cycles


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        ({"a": {"b"}, "b": set()}, 0),
        ({"a": {"b"}, "b": {"c"}, "c": {"a"}}, 1),
        ({"a": {"b"}, "b": {"a"}, "c": {"d"}, "d": {"c"}, "e": {"a", "c"}}, 2),
    ],
)
def test_cycles(graph, expected):
    assert num_cycles(graph) == expected


def test_a_module_taken_from_a_room_counts_as_the_module():
    modules = dict.fromkeys(("qdit_jax", "qdit_jax.quant", "qdit_jax.quant.groups"), Path())
    text = "from qdit_jax.quant import groups, gptq\nimport numpy\nfrom qdit_jax import quant\n"
    found = imported_modules(ast.walk(ast.parse(text)), modules)
    assert found == {"qdit_jax.quant", "qdit_jax.quant.groups"}


def test_a_docstring_has_no_lines_and_no_layer_name():
    text = (
        'def f():\n    """Of blocks_0."""\n    a = "x/blocks_1"\n    return a\nHELP = "blocks_2"\n'
    )
    assert [body_lines(f) for f in functions(text)] == [2]
    assert layer_names(text) == [(3, "x/blocks_1")]


def test_a_walk_counts_stretches_in_a_file_and_ways_back_up():
    # a.run calls a.g, b.h and c.k; b.h calls b.i, which calls d.m.
    steps = [("a", "run", ""), ("a", "g", "a"), ("b", "h", "a"), ("b", "i", "b"), ("d", "m", "b")]
    assert walk_figures(steps) == {"functions": 5, "files": 3, "stays": 3, "climbs": 0}
    steps.append(("c", "k", "a"))
    assert walk_figures(steps) == {"functions": 6, "files": 4, "stays": 4, "climbs": 1}


def test_a_trace_reads_each_function_once_from_run_on(tmp_path, monkeypatch):
    folder = tmp_path / "qdit_jax"
    folder.mkdir()
    (folder / "verb.py").write_text(
        "def before():\n    pass\ndef run():\n    from other import f\n    f(); f(); before()\n"
    )
    (folder / "other.py").write_text(
        "def made():\n    pass\nmade()\nclass C:\n    pass\ndef f():\n    [(lambda: 1)() for _ in 'ab']\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    verb = importlib.import_module("verb")
    trace = Trace(tmp_path, folder / "verb.py")
    sys.setprofile(trace)
    try:
        verb.before()  # comes before the verb's run
        verb.run()
    finally:
        sys.setprofile(None)
    short = [(os.path.basename(file), name) for file, name, _ in trace.steps]
    assert short == [("verb.py", "run"), ("other.py", "f"), ("verb.py", "before")]
    assert walk_figures(trace.steps) == {"functions": 3, "files": 2, "stays": 3, "climbs": 1}


def test_the_house_has_the_figures_that_it_is_to_have():
    found = figures(ROOT)
    assert found["loose files"] <= 6
    nothing = [
        "cycles of imports between files",
        "cycles of imports between rooms",
        "layer names outside models and convert",
        "functions over 60 lines outside kernels",
    ]
    assert {name: found[name] for name in nothing} == dict.fromkeys(nothing, 0)
    assert found["median lines of a function"] <= 8
