"""A small PixArt goes the whole road: calibrated, quantized, sampled, saved, looked at and verified."""

from __future__ import annotations

import numpy as np
import pytest
from roads import STEPS, calibrated, check_files, check_method, check_verified, collected, rounded
from tiny_models import random_params

import qdit_jax as qdit
from qdit_jax.models import OPERANDS, rows_per_sample
from qdit_jax.models.pixart import PixArt
from qdit_jax.sampling import checkpoint_sampler

LINEARS = {
    *("attn/proj", "attn/qkv", "cross_attn/kv_linear", "cross_attn/proj", "cross_attn/q_linear"),
    *("mlp/fc1", "mlp/fc2"),
}
BLOCK = {f"blocks_0/{name}" for name in LINEARS}


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
def items(checkpoint):
    return collected(checkpoint, prompts())


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


def test_calibration_sees_prompts_and_the_null_caption(checkpoint):
    stats = calibrated(checkpoint, prompts())
    cond, null = (stats.halves[h].low["blocks_0/cross_attn/kv_linear"] for h in stats.halves)
    assert not np.array_equal(cond, null)
    assert set(stats.low) >= BLOCK


@pytest.mark.parametrize(
    "method",
    [
        "rtn",
        "smoothquant",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("gptq", "svdquant", "best")),
    ],
)
def test_methods_quantize_it(checkpoint, items, method):
    check_method(checkpoint, items, method, BLOCK, most=0.3)


@pytest.fixture(scope="module")
def small(checkpoint):
    return rounded(checkpoint)


def test_what_is_saved_and_exported_is_the_same(small, items, tmp_path):
    check_files(small, items, tmp_path)


def test_pictures_of_another_shape(small):
    sampler = checkpoint_sampler(small, STEPS)
    images = qdit.generate(small, sampler, prompts(2), guidance=4.5, shape=(4, 6, 4))
    assert images.shape == (2, 4, 6, 4)
    assert np.isfinite(images).all()


@pytest.mark.slow
def test_it_is_verified(small, checkpoint):
    check_verified(small, checkpoint, prompts(2), len(BLOCK))
