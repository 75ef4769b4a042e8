"""What the README shows runs as written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from qdit_jax.checkpoint import Checkpoint, load, save
from qdit_jax.cli import VERBS
from qdit_jax.recipes import Recipe
from qdit_jax.testing import realistic_dit

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    config = {"hidden_size": 48, "depth": 2, "num_heads": 4, "num_classes": 1000}
    model, params = realistic_dit(0, input_size=32, in_channels=4, **config)
    save(tmp_path / "xl2", Checkpoint(model, params))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_example_runs(folder):
    (code,) = blocks("python")
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["latents"].shape == (2, 32, 32, 4)
    assert load(folder / "xl2-w4a8").recipe == names["recipe"]


def test_the_recipe_example_is_a_recipe(folder):
    (text,) = blocks("json")
    recipe = Recipe.from_json(json.loads(text))
    assert len(recipe.resolve(load(folder / "xl2").params)) == 8 + 6


def test_every_command_is_a_verb_and_ci_runs_the_test_command():
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    verbs = {line.split()[1] for line in commands if line.startswith("qdit ")}
    assert verbs <= set(VERBS)
    assert len(verbs) >= 8
    (tests,) = (line for line in commands if "pytest" in line)
    assert tests in (ROOT / ".ci" / "run").read_text().splitlines()


def test_every_picture_exists():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).is_file(), path
