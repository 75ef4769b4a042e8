"""A family of one file and one row goes the whole road: nothing else knows its layers."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import output, quantized_layers, random_params
from toy_family import ROW, ToyVideo, prompts

import qdit_jax as qdit
from qdit_jax.allocation import BitOps, Rollouts, cost_table, search_space
from qdit_jax.evaluation import Contender, Protocol, run_evaluation, summarize
from qdit_jax.methods import fold_inputs
from qdit_jax.models import FAMILIES, OPERANDS, rows_per_sample
from qdit_jax.ptq import by_block
from qdit_jax.report import block_layers, write_model_report

LINEARS = ("attn/proj", "attn/qkv", "cross/kv", "cross/proj", "cross/q", "mlp/fc1", "mlp/fc2")
ALL_LINEARS = {f"layers_{i}/{name}" for i in (0, 1) for name in LINEARS}
PROMPTS = prompts()


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(FAMILIES, ROW.name, ROW)


@pytest.fixture(scope="module")
def checkpoint():
    model = ToyVideo()
    return qdit.Checkpoint(model, random_params(model))


def inputs(batch=3):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, *ToyVideo().sample_shape())).astype(np.float32)
    return x, np.linspace(10, 900, batch).astype(np.float32), prompts(batch)


def relative(a, b):
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)))


def apply(checkpoint, params=None):
    params = checkpoint.params if params is None else params
    return output(checkpoint.model, params, *jax.tree.map(jnp.asarray, inputs()))


def test_a_preset_takes_every_linear_of_the_blocks_cross_attention_included(checkpoint):
    recipe = qdit.Recipe.preset("w4a8", checkpoint, group_size=16)
    assert {plan.path for plan in qdit.plan(checkpoint.params, recipe)} == ALL_LINEARS
    unbound = qdit.Recipe.preset("w4a8", group_size=16)
    assert unbound.resolve(checkpoint.params) == recipe.resolve(checkpoint.params)
    quantized = qdit.quantize_params(checkpoint.params, recipe=recipe)
    assert quantized_layers(quantized) == ALL_LINEARS
    assert 0 < relative(apply(checkpoint, quantized), apply(checkpoint)) < 0.3


def test_every_part_can_be_quantized(checkpoint):
    recipe = qdit.Recipe.preset("w8a8", checkpoint, group_size=16)
    for part in ("adaln", "embedders", "final"):
        recipe = recipe.with_part(part, "w8a8", group_size=16)
    recipe = recipe.with_part("cross_attention", "w16a8").with_part("self_attention", "w16a8")
    found = set(recipe.resolve(checkpoint.params))
    operands = {
        f"layers_{i}/{m}/operands/{o}" for i in (0, 1) for m in ("attn", "cross") for o in OPERANDS
    }
    assert found == set(rows_per_sample(checkpoint.model)) | operands
    quantized = qdit.quantize_params(checkpoint.params, recipe=recipe)
    assert 0 < relative(apply(checkpoint, quantized), apply(checkpoint)) < 0.1


def test_rows_are_counted_by_the_network(checkpoint):
    rows = rows_per_sample(checkpoint.model)
    assert rows["layers_0/attn/qkv"] == rows["layers_1/cross/q"] == rows["patch"] == 8
    assert rows["layers_0/cross/kv"] == rows["caption"] == 6
    assert rows["modulation"] == rows["time/mlp_0"] == 1
    space = search_space(checkpoint.params, rows=rows, group_sizes=(8, 16))
    costs = {
        layer.path: row
        for layer, row in zip(space.layers, cost_table(space, BitOps()), strict=True)
    }
    assert set(costs) == ALL_LINEARS
    # 6 rows of text, 32 channels into 64: products at 4 by 8 bits, 4 groups of 8, three corrections.
    inputs_cost = 6 * (32 * (96 + 1024) + 4 * 2048)
    expected = 6 * 32 * 64 * 32 + 6 * 64 * 4 * 3 * 1024 + inputs_cost
    assert costs["layers_0/cross/kv"][0] == expected


def test_folds_leave_the_function_as_it_is(checkpoint):
    rng = np.random.default_rng(1)
    sites = [f"layers_{i}/{name}/proj" for i in (0, 1) for name in ("attn", "cross")]
    scale = {path: np.exp(rng.standard_normal(32)) for path in sites}
    shift = {path: rng.standard_normal(32) for path in sites}
    folded = fold_inputs(checkpoint.params, scale=scale, shift=shift)
    assert relative(apply(checkpoint, folded), apply(checkpoint)) < 1e-5
    assert (
        relative(
            folded["layers_0"]["cross"]["proj"]["kernel"],
            checkpoint.params["layers_0"]["cross"]["proj"]["kernel"],
        )
        > 0.1
    )
    with pytest.raises(ValueError, match="no fold reaches the input of 'layers_0/cross/q'"):
        fold_inputs(checkpoint.params, scale={"layers_0/cross/q": np.ones(32)})


@pytest.fixture(scope="module")
def stats(checkpoint):
    FAMILIES[ROW.name] = ROW
    try:
        return qdit.calibrate(
            checkpoint, jax.random.key(0), 4, conditions=PROMPTS, sampler=qdit.ddim(3), batch_size=2
        )
    finally:
        del FAMILIES[ROW.name]


def test_calibration_sees_both_halves_and_static_scales_follow_the_timestep(checkpoint, stats):
    assert set(stats.halves) == {"conditional", "null"}
    cond, null = (stats.halves[h].low["layers_0/cross/kv"] for h in ("conditional", "null"))
    assert not np.array_equal(cond, null)
    assert "layers_1/cross/operands/softmax" in stats.low
    recipe = qdit.Recipe.preset(
        "w8a8", checkpoint, group_size=16, act_mode="static", per_timestep=True
    )
    params = qdit.quantize_params(checkpoint.params, recipe=recipe, stats=stats)
    exact, coarse = (
        qdit.generate(dataclasses.replace(checkpoint, params=p), qdit.ddim(3), PROMPTS)
        for p in (checkpoint.params, params)
    )
    assert exact.shape == (3, 2, 4, 4, 4)
    assert 0 < relative(coarse, exact) < 0.2


def test_guidance_pulls_away_from_the_null_caption(checkpoint):
    x, timestep, condition = (jax.tree.map(jnp.asarray, a) for a in inputs())
    model, params = checkpoint.model, checkpoint.params
    cond = output(model, params, x, timestep, condition)
    null = output(model, params, x, timestep, model.null_condition(condition, params))
    guided = qdit.denoiser(model, params, guidance=3.0)(x, timestep, condition)
    np.testing.assert_allclose(guided, null + 3.0 * (cond - null), rtol=1e-4, atol=1e-4)
    assert relative(cond, null) > 1e-3


def test_sequential_rounding_takes_the_shared_modulation_first(checkpoint):
    items = qdit.collect_items(
        checkpoint, jax.random.key(1), 4, conditions=PROMPTS, sampler=qdit.ddim(4), batch_size=4
    )
    assert set(items.condition) == {"text", "text_mask"}
    recipe = qdit.Recipe.preset("w4a8", checkpoint, group_size=16).with_part("adaln", "w4a16")
    seen = []
    params = qdit.round_params(
        checkpoint.model, checkpoint.params, items, recipe=recipe, on_layer=seen.append
    )
    assert seen[0].path == "modulation"
    assert quantized_layers(params) == ALL_LINEARS | {"modulation"}
    layers = list(rows_per_sample(checkpoint.model))
    assert [len(stage) for stage in by_block(layers, ROW)][-3:] == [7, 7, 1]
    assert sum(layer.rounded <= layer.nearest for layer in seen) > len(seen) / 2


def test_prompts_must_be_given_where_they_cannot_be_listed(checkpoint):
    with pytest.raises(ValueError, match="takes prompts, which cannot be listed"):
        qdit.calibrate(checkpoint, jax.random.key(0), 2, sampler=qdit.ddim(2))
    with pytest.raises(ValueError, match="give text and text_mask"):
        qdit.generate(checkpoint, qdit.ddim(2), {"text": PROMPTS["text"]})


def test_search_finds_a_recipe_within_the_budget(checkpoint):
    found = qdit.search(
        checkpoint,
        jax.random.key(2),
        budget="bitops=1.0x-g16",
        space={"group_sizes": (8, 16, 32)},
        rollouts=Rollouts(
            conditions=PROMPTS,
            num_steps=2,
            num_batches=2,
            batch_size=2,
            num_calibration=1,
            num_probes=2,
        ),
    )
    assert {layer.path for layer in found.space.layers} == ALL_LINEARS
    assert found.budget.allows(found.assignment)
    assert (
        quantized_layers(qdit.quantize_params(checkpoint.params, recipe=found.recipe))
        == ALL_LINEARS
    )


def test_save_load_and_export_give_the_same_outputs(checkpoint, tmp_path):
    recipe = qdit.Recipe.preset("w4a8", checkpoint, group_size=16)
    params = qdit.quantize_params(checkpoint.params, recipe=recipe)
    quantized = dataclasses.replace(checkpoint, params=params, recipe=recipe)
    for name in ("folder", "file.safetensors"):
        qdit.save(tmp_path / name, quantized)
        loaded = qdit.load(tmp_path / name)
        assert loaded.model == checkpoint.model
        assert loaded.recipe == recipe
        np.testing.assert_array_equal(apply(loaded), apply(quantized))


def test_evaluation_pairs_videos(checkpoint, tmp_path):
    recipe = qdit.Recipe.preset("w8a8", checkpoint, group_size=16)
    params = qdit.quantize_params(checkpoint.params, recipe=recipe)
    contenders = [
        Contender("full", checkpoint),
        Contender("w8a8", dataclasses.replace(checkpoint, params=params, recipe=recipe)),
    ]
    protocol = Protocol(
        qdit.ddim(3), {"steps": 3}, 4, guidance_channels=None, batch_size=2, conditions=PROMPTS
    )
    run = run_evaluation(contenders, protocol, tmp_path / "run")
    summary = summarize(run, contenders, {})
    assert summary["paired"]["w8a8"]["latent_snr_db"]["estimate"] > 15


def test_the_report_of_weights_and_inputs_lists_every_layer(checkpoint, stats, tmp_path):
    assert set(block_layers(checkpoint.params)) == ALL_LINEARS
    summary = write_model_report(tmp_path, "toy", checkpoint.params, stats, {"samples": 4})
    assert set(summary["inputs"]) == ALL_LINEARS
    assert (tmp_path / "report.html").stat().st_size > 10_000
