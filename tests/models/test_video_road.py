"""Small networks for videos go the whole road: calibrated, quantized, sampled, saved and verified."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import pytest
from roads import (
    STEPS,
    calibrated,
    check_files,
    check_method,
    check_verified,
    collected,
    relative,
    rounded,
)
from tiny_models import random_params

import qdit_jax as qdit
from qdit_jax.allocation import BitOps, cost_table, search_space
from qdit_jax.models import FAMILIES, OPERANDS, build_model, rows_per_sample
from qdit_jax.sampling import checkpoint_sampler

NAMES = ("latte", "latte_t2v", "stdit", "stdit3")
SLOW = pytest.mark.slow


@cache
def checkpoint_of(name):
    model = build_model(name, FAMILIES[name].examples[0])
    return qdit.Checkpoint(model, random_params(model))


def conditions(model, count=3):
    """Returns labels, or prompts of different lengths with a null one where the network has none."""
    if model.all_conditions() is not None:
        return np.arange(count, dtype=np.int32)
    rng = np.random.default_rng(4)
    found = {}
    for key, leaf in model.example_condition(count).items():
        found[key] = np.full(leaf.shape, 24, np.float32)
        if key == "text":
            found[key] = rng.standard_normal(leaf.shape).astype(np.float32)
        elif key == "text_mask":
            found[key] = np.arange(leaf.shape[1]) < 2 + np.arange(count)[:, None]
    if model.null_condition(found, checkpoint_of(name_of(model)).params) is None:
        found["null_text"] = np.zeros_like(found["text"][:1])
    return found


def name_of(model):
    return next(name for name in NAMES if checkpoint_of(name).model == model)


@cache
def items_of(name):
    checkpoint = checkpoint_of(name)
    return collected(checkpoint, conditions(checkpoint.model))


@pytest.mark.parametrize("name", NAMES)
def test_every_attention_is_in_the_recipe_and_the_cost(name):
    checkpoint, row = checkpoint_of(name), FAMILIES[name]
    recipe = qdit.Recipe.preset("w4a8", checkpoint, group_size=8)
    blocks = set(recipe.resolve(checkpoint.params))
    operands = set(recipe.with_part("attention", "w16a8").resolve(checkpoint.params)) - blocks
    kinds = ("spatial", "temporal") if name == "latte" else ("spatial", "temporal", "cross")
    assert set(row.attention) == {f"{kind}_attention" for kind in kinds}
    for part in row.attention:
        seen = set(recipe.with_part(part, "w16a8").resolve(checkpoint.params)) - blocks
        assert seen
        assert seen <= operands
        assert {path.rpartition("/")[2] for path in seen} == set(OPERANDS)
        for path in seen:
            module = path.partition("/operands/")[0]
            assert any(layer.startswith(f"{module}/") for layer in blocks)
    rows = rows_per_sample(checkpoint.model)
    frames, height, width, _ = checkpoint.model.sample_shape()
    tokens = frames * -(-height // 2) * -(-width // 2)
    for path in blocks:
        assert rows[path] == (5 if path.endswith("kv_linear") else tokens), path
    space = search_space(checkpoint.params, rows=rows, group_sizes=(4, 8))
    cost = cost_table(space, BitOps())
    by_path = {layer.path: found for layer, found in zip(space.layers, cost, strict=True)}
    temporal = {path for path in blocks if "temp" in path and path.endswith("qkv")}
    spatial = {path for path in blocks if "temp" not in path and path.endswith("qkv")}
    for path in temporal | spatial:
        np.testing.assert_array_equal(by_path[path], by_path[min(spatial)])


def test_calibration_sees_prompts_and_the_null_caption():
    checkpoint = checkpoint_of("stdit3")
    stats = calibrated(checkpoint, conditions(checkpoint.model))
    path = "temporal_blocks_0/cross_attn/kv_linear"
    cond, null = (stats.halves[half].low[path] for half in stats.halves)
    assert not np.array_equal(cond, null)
    # Static scales for each timestep, hence for each sample of a batch, reach every layer and operand.
    recipe = qdit.Recipe.preset(
        "w8a8", checkpoint, group_size=8, act_mode="static", per_timestep=True
    ).with_part("attention", "w16a8", act_mode="static", per_timestep=True)
    params = qdit.quantize_params(checkpoint.params, recipe=recipe, stats=stats)
    sampler = checkpoint_sampler(checkpoint, STEPS)
    exact, coarse = (
        qdit.generate(
            dataclasses.replace(checkpoint, params=p), sampler, conditions(checkpoint.model)
        )
        for p in (checkpoint.params, params)
    )
    assert exact.shape == (3, *checkpoint.model.sample_shape())
    assert 0 < relative(coarse, exact) < 0.2


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("stdit", "rtn"),
        ("stdit3", "smoothquant"),
        *(
            pytest.param(name, method, marks=SLOW)
            for name, method in (
                ("latte", "best"),
                ("latte_t2v", "svdquant"),
                ("stdit", "gptq"),
                ("stdit3", "svdquant"),
                ("stdit3", "best"),
            )
        ),
    ],
)
def test_methods_quantize_it(name, method):
    checkpoint = checkpoint_of(name)
    layers = set(qdit.Recipe.preset("w4a8", checkpoint).resolve(checkpoint.params))
    check_method(checkpoint, items_of(name), method, layers, most=0.3)


@pytest.fixture(scope="module")
def small():
    return rounded(checkpoint_of("stdit3"))


def test_what_is_saved_and_exported_is_the_same(small, tmp_path):
    check_files(small, items_of("stdit3"), tmp_path)


def test_videos_of_another_shape(small):
    sampler = checkpoint_sampler(small, STEPS, shape=(10, 4, 6, 4))
    videos = qdit.generate(
        small, sampler, conditions(small.model, 2), guidance=7.0, shape=(10, 4, 6, 4)
    )
    assert videos.shape == (2, 10, 4, 6, 4)
    assert np.isfinite(videos).all()
    with pytest.raises(ValueError, match="num_frames=12 is not supported"):
        checkpoint_sampler(small, STEPS, shape=(3, 4, 6, 4))


@SLOW
def test_it_is_verified(small):
    check_verified(small, checkpoint_of("stdit3"), conditions(small.model, 2), 14)
