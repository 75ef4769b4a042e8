"""A small PixArt goes the whole road: calibrated, quantized, sampled, saved, looked at and verified."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import quantized_layers, random_params

import qdit_jax as qdit
from qdit_jax.methods import CalibrationData
from qdit_jax.models import OPERANDS, rows_per_sample
from qdit_jax.models.pixart import PixArt
from qdit_jax.sampling import checkpoint_sampler

LINEARS = {
    *("attn/proj", "attn/qkv", "cross_attn/kv_linear", "cross_attn/proj", "cross_attn/q_linear"),
    *("mlp/fc1", "mlp/fc2"),
}
BLOCK = {f"blocks_0/{name}" for name in LINEARS}
STEPS = 2


def prompts(count=3, rows=5):
    rng = np.random.default_rng(4)
    return {
        "text": rng.standard_normal((count, rows, 12)).astype(np.float32),
        "text_mask": np.arange(rows) < 2 + np.arange(count)[:, None],
        "size": np.full((count, 2), 512.0, np.float32),
        "aspect_ratio": np.ones((count, 1), np.float32),
    }


@pytest.fixture(scope="module")
def checkpoint():
    model = PixArt(
        sample_size=4,
        hidden_size=24,
        depth=1,
        num_heads=2,
        mlp_width=32,
        text_length=5,
        text_width=12,
        size_conditions=True,
    )
    return qdit.Checkpoint(model, random_params(model))


@pytest.fixture(scope="module")
def sampler(checkpoint):
    return checkpoint_sampler(checkpoint, STEPS)


@pytest.fixture(scope="module")
def items(checkpoint, sampler):
    return qdit.collect_items(
        checkpoint, jax.random.key(0), 8, conditions=prompts(), sampler=sampler, batch_size=4
    )


def relative(a, b):
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)))


def test_the_preset_takes_every_linear_of_the_blocks(checkpoint):
    recipe = qdit.Recipe.preset("w4a8", checkpoint, group_size=8)
    assert {plan.path for plan in qdit.plan(checkpoint.params, recipe)} == BLOCK
    for part in ("adaln", "embedders", "final"):
        recipe = recipe.with_part(part, "w8a8", group_size=8)
    recipe = recipe.with_part("attention", "w16a8")
    operands = {f"blocks_0/{m}/operands/{o}" for m in ("attn", "cross_attn") for o in OPERANDS}
    assert (
        set(recipe.resolve(checkpoint.params)) == set(rows_per_sample(checkpoint.model)) | operands
    )
    rows = rows_per_sample(checkpoint.model)
    assert rows["blocks_0/cross_attn/kv_linear"] == rows["y_embedder/y_proj/fc1"] == 5
    assert rows["blocks_0/cross_attn/q_linear"] == rows["x_embedder/proj"] == 4
    assert rows["csize_embedder/mlp_0"] == 2
    assert rows["t_block"] == 1


def test_calibration_sees_prompts_and_the_null_caption(checkpoint, sampler):
    stats = qdit.calibrate(
        checkpoint, jax.random.key(1), 3, conditions=prompts(), sampler=sampler, batch_size=3
    )
    assert set(stats.halves) == {"conditional", "null"}
    cond, null = (stats.halves[h].low["blocks_0/cross_attn/kv_linear"] for h in stats.halves)
    assert not np.array_equal(cond, null)
    assert set(stats.low) >= BLOCK


# LLVM's optimizations would take most of the time here.
@jax.jit(static_argnames=("model",), compiler_options={"xla_backend_optimization_level": 0})
def call(params, *args, model):
    return model.apply({"params": params}, *args)


def outputs(checkpoint, items):
    inputs = jax.tree.map(jnp.asarray, items[:3])
    return np.asarray(call(checkpoint.params, *inputs, model=checkpoint.model))


@pytest.mark.parametrize(
    "method",
    [
        "rtn",
        "smoothquant",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("gptq", "svdquant", "best")),
    ],
)
def test_methods_quantize_it(checkpoint, items, method):
    recipe = qdit.Recipe.preset("w4a8", checkpoint, group_size=8)
    data = CalibrationData(items=items, batch_size=8)
    result = qdit.quantize(checkpoint, method, recipe, data=data)
    assert quantized_layers(result.params) == BLOCK
    assert 0 < relative(outputs(result, items), outputs(checkpoint, items)) < 0.3


@pytest.fixture(scope="module")
def small(checkpoint):
    recipe = qdit.Recipe.preset("w4a8", checkpoint, group_size=8)
    params = qdit.quantize_params(checkpoint.params, recipe=recipe)
    return dataclasses.replace(checkpoint, params=params, recipe=recipe)


def test_what_is_saved_and_exported_is_the_same(small, items, tmp_path):
    for name in ("folder", "file.safetensors"):
        qdit.save(tmp_path / name, small)
        read = qdit.load(tmp_path / name)
        assert (read.model, read.recipe) == (small.model, small.recipe)
        np.testing.assert_array_equal(outputs(read, items), outputs(small, items))


def test_pictures_of_another_shape(small, sampler):
    images = qdit.generate(small, sampler, prompts(2), guidance=4.5, shape=(4, 6, 4))
    assert images.shape == (2, 4, 6, 4)
    assert np.isfinite(images).all()


@pytest.mark.slow
def test_it_is_verified(small, checkpoint):
    found = qdit.verify(
        small,
        against=checkpoint,
        conditions=prompts(2),
        num_samples=2,
        steps=STEPS,
        batch_size=2,
        timing=False,
    )
    assert found.passed
    assert len(found.layers) == len(BLOCK)
