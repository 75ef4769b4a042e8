"""What the site shows is what there is: public names, methods, notebooks; it builds without a warning."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import method_pages
import preset_page
import pytest

import qdit_jax as qdit

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.py"))
MODULES = {"quant", "ranges"}  # described in a sentence


def test_the_reference_has_every_public_name():
    text = (DOCS / "reference.md").read_text()
    named = re.findall(r"^::: (?:qdit_jax|qdit_convert)\.(\w+)$", text, re.MULTILINE)
    assert sorted(named) == sorted(set(qdit.__all__) - MODULES)


def test_the_pages_of_methods_are_those_of_the_table():
    written = {page.name: page.read_text() for page in (DOCS / "methods").iterdir()}
    assert written == method_pages.pages(), "run experiments/tables/method_pages.py"


def test_the_page_of_presets_is_that_of_the_table():
    assert preset_page.PAGE.read_text() == preset_page.page(), (
        "run experiments/tables/preset_page.py"
    )


def test_every_page_and_notebook_is_in_the_navigation():
    nav = (ROOT / ".ci" / "mkdocs.yml").read_text()
    assert len(NOTEBOOKS) >= 3
    pages = [*DOCS.glob("*.md"), *NOTEBOOKS]
    assert [p.name for p in pages if f" {p.relative_to(DOCS)}\n" not in nav] == []


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    runpy.run_path(str(path), run_name="__main__")


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    if find_spec("mkdocs") is None or find_spec("mkdocs_jupyter") is None:
        pytest.skip('the site needs mkdocs; pip install ".[docs]"')
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", ".ci/mkdocs.yml"]
    done = subprocess.run(
        [*command, "-d", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "EXECUTE_NOTEBOOKS": "false"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "site" / "reference" / "index.html").exists()
