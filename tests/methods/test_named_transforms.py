"""Transforms and ranks that a recipe asks for: the layer gets exactly these, or the recipe is refused."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_models import output, tiny_checkpoint

import qdit_jax as qdit
from qdit_jax.calibration import collect_items
from qdit_jax.diffusion import ddim
from qdit_jax.methods import METHODS, CalibrationData, method_named
from qdit_jax.methods.choosing import ChooseTransforms
from qdit_jax.methods.input_transforms import Place, matrix_of
from qdit_jax.methods.named_transforms import check_shared
from qdit_jax.methods.report import Report
from qdit_jax.quant import ActSpec, WeightSpec
from qdit_jax.recipes import TRANSFORMS, LayerSpec, Recipe, Rule, rotated_block

SIDES = (WeightSpec(4, 8), ActSpec(4, 8))
FOLDED, MAPPED = "blocks_0/attn/qkv", "blocks_0/mlp/fc2"


@functools.cache
def checkpoint():
    return tiny_checkpoint(hidden_size=16)


@functools.cache
def items():
    key = jax.random.key(0)
    return collect_items(checkpoint(), key, 8, sampler=ddim(steps=4), batch_size=8)


def recipe_of(**asked):
    return Recipe((Rule(f"{FOLDED}|{MAPPED}", LayerSpec(*SIDES, **asked)),))


def prepared(recipe, step=None, source=None):
    report, source = Report(), checkpoint() if source is None else source
    step = method_named("best").prepare[0] if step is None else step
    data = CalibrationData(items=items(), batch_size=8)
    given = {"model": source.model, "recipe": recipe, "data": data, "report": report}
    made, _ = step(source.params, **given)
    return made, report


def outputs(params, model=None):
    return np.asarray(output(model or checkpoint().model, params, *items()[:3]))


@pytest.mark.parametrize("name", [name for name in TRANSFORMS if not name[-1].isdigit()])
def test_every_layer_has_the_transform_of_that_name_and_computes_the_same(name):
    made, report = prepared(recipe_of(transform=name, rank=2))
    flat = flatten_dict(made, sep="/")
    parts = TRANSFORMS[name]
    kinds = {"smooth": "scale", "shift": "shift", "hadamard": "regular", "pca": "dense"}
    for path in (FOLDED, MAPPED):
        told = report.transforms[path]["kinds"]
        order = sorted((kinds[part] for part in parts), key=["scale", "shift"].__contains__)
        assert sorted(told) == sorted([*order, "branch"])
        assert (f"{path}/rotation" in flat) == bool({"hadamard", "pca"} & set(parts))
        assert flat[f"{path}/low_rank"].down.shape == (flat[f"{path}/kernel"].shape[0], 2)
    assert f"{FOLDED}/input_map" not in flat
    assert (f"{MAPPED}/input_map" in flat) == bool({"smooth", "shift"} & set(parts))
    expected = outputs(checkpoint().params)
    assert np.abs(outputs(made) - expected).max() < 1e-5 * np.abs(expected).max()


def test_a_rotation_has_blocks_of_the_size_that_its_name_asks_for():
    wide, path = tiny_checkpoint(hidden_size=64), "blocks_0/mlp/fc2"
    recipe = Recipe((Rule(path, LayerSpec(*SIDES, transform="smooth+hadamard64", rank=0)),))
    made, _ = prepared(Recipe.from_json(json.loads(json.dumps(recipe.to_json()))), source=wide)
    rotation = flatten_dict(made, sep="/")[f"{path}/rotation"]
    assert matrix_of(made, [path]).shape == (256, 64)
    assert (rotation.kind, rotation.size) == ("regular", 64)
    expected = outputs(wide.params, wide.model)
    assert np.abs(outputs(made, wide.model) - expected).max() < 1e-5 * np.abs(expected).max()
    sizes = {"hadamard": 256, "hadamard4": 4, "smooth+shift+hadamard16": 16, "smooth+pca": 256}
    assert {name: rotated_block(name, 256) for name in sizes} == sizes
    assert rotated_block("smooth+shift", 256) is None


def test_no_transform_and_no_branch_leave_the_parameters_as_they_are():
    made, _ = prepared(recipe_of(transform="none", rank=0))
    assert made is checkpoint().params
    # The method's own branch would stand beside every layer.
    own, _ = prepared(recipe_of(transform="none"), method_named("svdquant").prepare[0])
    assert f"{MAPPED}/low_rank" in flatten_dict(own, sep="/")


@pytest.mark.parametrize("name", METHODS)
def test_methods_make_what_a_recipe_asks_for_or_refuse_it_by_name(name):
    method = method_named(name)
    assert method.makes_transforms == any(isinstance(s, ChooseTransforms) for s in method.prepare)
    if method.makes_transforms:
        return
    for asked, words in (
        ({"transform": "hadamard"}, "transform='hadamard'"),
        ({"rank": 3}, "rank=3"),
    ):
        message = f"method='{name}' makes no input transforms and no branches, but .* {words} of"
        with pytest.raises(ValueError, match=message):
            qdit.quantize(checkpoint(), name, recipe_of(**asked))


def test_a_method_without_transforms_takes_a_recipe_that_wants_none():
    plain = qdit.quantize(checkpoint(), "rtn", recipe_of(transform="none", rank=0))
    assert (
        outputs(plain.params)
        == outputs(qdit.quantize_params(checkpoint().params, recipe=recipe_of()))
    ).all()
    assert plain.recipe == recipe_of(transform="none", rank=0)


@pytest.mark.parametrize(
    ("layer", "asked", "message"),
    [
        (
            FOLDED,
            {"transform": "hadamard64"},
            "attn/qkv, but 64 does not divide its 16 input channels",
        ),
        (MAPPED, {"rank": 17}, "rank=17 of blocks_0/mlp/fc2, but its kernel is 64x16"),
        ("x_embedder/proj", {"transform": "pca", "rank": 999}, "but its kernel is"),
    ],
)
def test_what_a_layer_cannot_have_is_refused_before_anything_is_computed(layer, asked, message):
    recipe = Recipe((Rule(layer, LayerSpec(*SIDES, **asked)),))
    with pytest.raises(ValueError, match=message):
        qdit.quantize(checkpoint(), "best", recipe)


def test_layers_that_read_one_input_ask_for_one_transform():
    specs = {
        p: LayerSpec(*SIDES, transform=t) for p, t in zip("abc", (None, None, "none"), strict=True)
    }
    check_shared([Place(("a", "b"), True), Place(("c",), False)], specs)
    message = "a and c read one input, but the recipe asks for transform=None and 'none'"
    with pytest.raises(ValueError, match=message):
        check_shared([Place(("a", "b", "c"), True)], specs)


def test_a_branch_beside_what_makes_a_folded_input_keeps_the_function():
    """The fold changes columns of the producer's kernel, and of its branch with them."""
    step = dataclasses.replace(method_named("svdquant").prepare[0], leave=False)
    asked = LayerSpec(*SIDES, transform="smooth+shift", rank=2)
    for recipe in (
        Recipe((Rule("blocks_0/.*", LayerSpec(*SIDES)),)),
        Recipe((Rule("blocks_0/.*", asked),)),
    ):
        made, report = prepared(recipe, step)
        assert "branch" in report.transforms["blocks_0/adaLN_modulation"]["kinds"]
        expected = outputs(checkpoint().params)
        assert np.abs(outputs(made) - expected).max() < 1e-5 * np.abs(expected).max()
