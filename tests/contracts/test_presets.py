"""The contract of every preset by name: on every family it is a recipe that a kernel can compute."""

from __future__ import annotations

import re

import pytest
import toy_family
import toy_painter
from flax.traverse_util import unflatten_dict

import qdit_jax as qdit
from qdit_jax.cli import main
from qdit_jax.kernels import unsupported_reason
from qdit_jax.methods import METHODS
from qdit_jax.models import FAMILIES, abstract_params, build_model
from qdit_jax.recipes import NAMED, layer_paths, measured_presets, part_pattern
from qdit_jax.testing import realistic_dit

ROWS = (*FAMILIES.values(), toy_family.ROW, toy_painter.ROW)
NETWORKS = [
    pytest.param(row, config, id=f"{row.name}-{i}")
    for row in ROWS
    if row.is_diffusion
    for i, config in enumerate(row.examples)
]


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    for row in (toy_family.ROW, toy_painter.ROW):
        monkeypatch.setitem(FAMILIES, row.name, row)


@pytest.mark.parametrize(("row", "config"), NETWORKS)
def test_every_layer_of_every_family_is_understood(row, config):
    params = unflatten_dict(abstract_params(build_model(row.name, config)), sep="/")
    blocks = part_pattern("blocks", params)
    in_blocks = {path for path in layer_paths(params) if re.fullmatch(blocks, path)}
    for name, preset in NAMED.items():
        recipe = qdit.Recipe.preset(name, params)
        planned = {layer.path: layer for layer in qdit.plan(params, recipe)}
        assert in_blocks <= set(planned) if name.endswith("-all") else in_blocks == set(planned)
        assert qdit.Recipe.from_json(recipe.to_json()) == recipe
        for layer in planned.values():
            if layer.shape[0] >= 32:  # of fewer channels the scales are most of it
                assert layer.bytes_after < layer.bytes_before, (name, layer)
            numerics = "simulated" if layer.spec.act is None else "integer"
            shape = (2, layer.shape[0])
            operands = (shape, layer.spec.weight, layer.spec.act, numerics)
            assert unsupported_reason(*operands, platform="cpu", dtype="float32") is None, (
                name,
                layer,
            )
        assert preset.method in METHODS


def test_what_was_measured_is_of_the_table():
    rows = measured_presets()["rows"]
    assert {"w8a8-fast", "w4a8-fast", "w4a8-best", "nvfp4"} <= set(rows) <= set(NAMED)
    for name, row in rows.items():
        assert row["method"] == NAMED[name].method
        low, middle, high = (row["closeness_db"][key] for key in ("low", "estimate", "high"))
        assert low <= middle <= high


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_its_method_makes_it(name):
    checkpoint = qdit.Checkpoint(*realistic_dit(0))
    data = qdit.CalibrationData(num_samples=4, num_steps=2, holdout=0.5)
    method = NAMED[name].method
    small = qdit.quantize(checkpoint, method=method, recipe=name, data=data)
    assert qdit.verify(small, against=checkpoint, num_samples=2, steps=2, timing=False).passed


def test_a_setting_that_is_given_comes_before_the_presets_own():
    (rule,) = qdit.Recipe.preset("w4a8-best", group_size=64).rules
    assert rule.spec.weight.group_size == 64
    (rule,) = qdit.Recipe.preset("w4a8-best").rules
    assert rule.spec.weight.group_size == rule.spec.act.group_size == 32


def test_formats_of_inputs_have_the_bits_of_the_preset():
    (rule,) = qdit.Recipe.preset("nvfp4").rules
    assert (rule.spec.weight.fmt.name, rule.spec.act.fmt.name) == ("nvfp4", "nvfp4")
    with pytest.raises(ValueError, match=r"act_format='nvfp4' has 4 bits.*asks for a8"):
        qdit.Recipe.preset("w4a8", act_format="nvfp4")


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'nvfp5' is not a preset.*w4a8-best, lut4, nf4, nvfp4"):
        qdit.Recipe.preset("nvfp5")


def test_the_verb_lists_them_and_counts_bits(tmp_path, capsys):
    model, params = realistic_dit(0)
    qdit.save(tmp_path / "net", qdit.Checkpoint(model, params))
    assert main(["recipes", str(tmp_path / "net")]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{name}\n" in f"\n{shown}" for name in NAMED)
    assert "4.50 bits a weight" in shown  # w4a8-fast: 4 bits, and two bytes for 32 of them
