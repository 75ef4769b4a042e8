"""`qdit schedule` end to end on a small checkpoint: files, resuming, refusals."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from tiny_models import tiny_checkpoint

import qdit_jax as qdit
from qdit_jax.cli import main
from qdit_jax.quant import OVER_TIME

FAST = ["--steps", "3", "--batch-size", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("schedule")
    full = tiny_checkpoint()
    qdit.save(base / "full", full)
    qdit.save(base / "small", qdit.quantize(full, "rtn", qdit.Recipe.preset("w4a4", group_size=16)))
    return base


def test_it_writes_a_recipe_a_picture_and_the_checkpoint(folder, capsys):
    given = ["schedule", str(folder / "small"), str(folder / "out"), "--act-bits", "4", "8"]
    given += ["--mean-bits", "5.4", "--write", str(folder / "scheduled"), *FAST]
    assert main(given) == 0
    printed = capsys.readouterr().out
    assert "bits by step: " in printed
    history = json.loads((folder / "out" / "history.json").read_text())["schedule"]
    assert np.shape(history["errors"]) == (3, 2)
    assert history["mean_bits"] <= 5.4
    assert history["measured"] == min(row["measured"] for row in history["candidates"])
    assert (folder / "out" / "schedule.png").read_bytes().startswith(b"\x89PNG")
    recipe = qdit.Recipe.from_json(folder / "out" / "recipe.json")
    assert sorted(recipe.over_time.act_bits) == [4, 4, 8]
    loaded = qdit.load(folder / "scheduled")
    assert loaded.recipe == recipe
    assert OVER_TIME in loaded.params
    assert main(["quantize", str(folder / "full"), str(folder / "again"),
                 "--recipe", str(folder / "out" / "recipe.json")]) == 0  # fmt: skip
    again = qdit.load(folder / "again")
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
    capsys.readouterr()
    assert main(given) == 2
    assert "holds a finished schedule; pass --force" in capsys.readouterr().err
    # As if it had been stopped before the last file: it reads what it measured, and says the same.
    (folder / "out" / "recipe.json").unlink()
    assert main([*given[:-6], *FAST]) == 0
    printed = capsys.readouterr()
    assert json.loads((folder / "out" / "history.json").read_text())["schedule"] == history


def test_refusals_are_one_sentence(folder, capsys):
    for path, options, message in (
        ("full", ["--act-bits", "4", "8", "--mean-bits", "6"], "is in full precision; first `qdit"),
        ("small", ["--act-bits", "8", "--mean-bits", "6"], "leave no choice"),
        ("small", ["--act-bits", "4", "8", "--mean-bits", "3"], "is below the fewest bits, 4"),
        ("small", ["--act-bits", "4", "9", "--mean-bits", "5"], "=9 is not supported"),
    ):
        assert main(["schedule", str(folder / path), str(folder / "new"), *options, *FAST]) == 2
        printed = capsys.readouterr().err
        assert message in printed or message.replace("=", " ") in printed
        assert printed.count("\n") == 1
        assert not (folder / "new").exists()


def test_it_computes_in_the_dtype_that_is_asked_for(folder, monkeypatch):
    seen = []

    def stopped(checkpoint, key, **settings):
        seen.append(checkpoint.model.dtype)
        raise qdit.UserError("stopped")

    monkeypatch.setattr("qdit_jax.cli.schedule_run.choose_steps", stopped)
    given = ["schedule", str(folder / "small"), str(folder / "narrow"), "--mean-bits", "6"]
    for words in ([], ["--dtype", "bfloat16"]):
        assert main([*given, "--act-bits", "4", "8", *words]) == 2
    assert seen == ["float32", "bfloat16"]
