"""The table of `qdit quantize`: real group sizes, honest ratios, the whole checkpoint's bytes."""

from __future__ import annotations

import json

import jax
import pytest

from qdit_jax.checkpoint import Checkpoint, load, save
from qdit_jax.cli import main
from qdit_jax.cli import quantize_table as table
from qdit_jax.quant import ActSpec, WeightSpec, formats
from qdit_jax.recipes import Recipe
from qdit_jax.testing import realistic_dit


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("table")
    model, params = realistic_dit(0, hidden_size=36, depth=1, num_heads=2)
    save(base / "model", Checkpoint(model, params))
    return base


def test_group_sizes_are_those_that_the_layer_has():
    assert table.short(WeightSpec(4, 128), 36) == "4b g36"
    assert table.short(WeightSpec(4, 0, True), 36) == "4b g36s"
    assert table.short(ActSpec(8, 16), 36) == "8b g16"
    assert table.short(None, 36) == "-"
    assert table.short(ActSpec(fmt=formats.fp8_e4m3, group_size=0), 36) == "fp8_e4m3 g36"
    assert table.short(WeightSpec(fmt=formats.nf4, group_size=12), 36) == "nf4 g12"


def test_the_whole_checkpoint_is_told_before_and_after(folder, capsys):
    out = folder / "small"
    options = ["--recipe", "w4a8", "--method", "rtn", "--json"]
    arguments = ["quantize", str(folder / "model"), str(out), *options]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    held = {
        side: sum(leaf.nbytes for leaf in jax.tree.leaves(load(path).params))
        for side, path in {"before": folder / "model", "after": out}.items()
    }
    assert found["parameters"] == held
    on_disk = {
        side: sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        for side, path in {"before": folder / "model", "after": out}.items()
    }
    assert found["disk"] == on_disk
    assert found["attention_operands_left"] == []
    ratio = held["before"] / held["after"]
    line = f"{held['before']:,} -> {held['after']:,} ({ratio:.2f}x smaller)"
    assert f"bytes of all parameters: {line}" in printed.err
    assert f"bytes on disk: {on_disk['before']:,} -> {on_disk['after']:,}" in printed.err
    assert "weights' signal to error, dB" in printed.err
    assert "36 x 108  4b g36 " in printed.err
    assert "144 x 36  4b g128 " in printed.err
    assert "attention operands" not in printed.err


def test_every_layer_in_one_word_says_what_it_leaves(folder, capsys):
    options = ["--recipe", "w4a8-all", "--method", "rtn"]
    arguments = ["quantize", str(folder / "model"), str(folder / "all"), *options]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "y_embedder" in printed
    assert "attention operands left: 4 (q, k, v, softmax)" in printed
    small = load(folder / "all")
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(small.params))
    assert f"-> {held:,} (" in printed


def test_totals_of_abstract_parameters(folder):
    params = load(folder / "model").params
    abstract = jax.eval_shape(lambda p: p, params)
    recipe = Recipe.preset("w4a8", params)
    assert table.Table(abstract, recipe).totals() == table.Table(params, recipe).totals()
