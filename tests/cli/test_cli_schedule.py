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
                 "--recipe", str(folder / "out" / "recipe.json"), "--method", "rtn"]) == 0  # fmt: skip
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


def test_weights_are_chosen_too_and_the_recipe_is_one_by_hand(folder, capsys):
    both, found = str(folder / "both"), folder / "levels"
    given = [
        "quantize",
        str(folder / "full"),
        both,
        "--recipe",
        "w4a8",
        "--group-size",
        "16",
        "--method",
        "rtn",
    ]
    assert main([*given, "--steps", "3", "--steps-at", "0=w8"]) == 0
    given = ["schedule", both, str(found), "--levels", "w4a8", "w8a16", *FAST]
    given += ["--mean-bitops", "64", "--write", str(folder / "chosen")]
    capsys.readouterr()
    assert main(given) == 0
    printed = capsys.readouterr().out
    recipe = qdit.Recipe.from_json(found / "recipe.json")
    steps = list(zip(recipe.over_time.weight_bits, recipe.over_time.act_bits, strict=True))
    assert sorted(steps) == [(4, 8), (4, 8), (8, 16)]
    names = [f"w{weights}a{acts}" for weights, acts in steps]
    assert f"bits by step: {' '.join(names)} (mean 64 bit operations)" in printed
    held = sum(
        leaf.nbytes
        for layer in ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2")
        for leaf in [kernel(qdit.load(folder / "chosen").params, f"blocks_0/{layer}/kernel_w8")]
    )
    assert f"those of w8 beside them {held:,}" in printed
    history = json.loads((found / "history.json").read_text())["schedule"]
    assert np.shape(history["errors"]) == (3, 2)
    assert history["levels"] == [[4, 8], [8, 16]]
    # By the recipe, and by hand.
    quantize = ["quantize", str(folder / "full"), "--method", "rtn"]
    assert main([*quantize, str(folder / "by-recipe"), "--recipe", str(found / "recipe.json")]) == 0
    assert "blocks_0/mlp/fc1/kernel_w8" in capsys.readouterr().out
    by_hand = [option for i, name in enumerate(names) for option in ("--steps-at", f"{i}={name}")]
    given = [*quantize, str(folder / "by-hand"), "--recipe", "w4a8", "--group-size", "16"]
    assert main([*given, "--steps", "3", *by_hand]) == 0
    loaded = [qdit.load(folder / name) for name in ("chosen", "by-recipe", "by-hand")]
    assert all(one.recipe.over_time == recipe.over_time for one in loaded)
    assert OVER_TIME in loaded[0].params
    sampler = qdit.diffusion.ddim(3)
    samples = [qdit.generate(one, sampler, np.arange(2), guidance=None) for one in loaded]
    for other, sample in zip(loaded[1:], samples[1:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, loaded[0].params, other.params)
        np.testing.assert_array_equal(samples[0], sample)


def kernel(params, path):
    for name in path.split("/"):
        params = params[name]
    return params


def test_refusals_are_one_sentence(folder, capsys):
    for path, options, message in (
        ("full", ["--act-bits", "4", "8", "--mean-bits", "6"], "is in full precision; first `qdit"),
        ("small", ["--act-bits", "8", "--mean-bits", "6"], "leave no choice"),
        ("small", ["--act-bits", "4", "8", "--mean-bits", "3"], "is below the fewest bits, 4"),
        ("small", ["--act-bits", "4", "9", "--mean-bits", "5"], "=9 is not supported"),
        ("small", ["--levels", "w4a4", "w8a9", "--mean-bitops", "5"], "'w8a9': act_bits"),
        ("small", ["--levels", "w4a4", "w8a8", "--mean-bitops", "50"], "level w8a8: over_time"),
        ("small", ["--levels", "w4a4", "w4a8", "--mean-bits", "5"], "--mean-bitops that of --lev"),
        ("small", ["--act-bits", "4", "8", "--levels", "a4", "--mean-bits", "5"], "not allowed"),
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
