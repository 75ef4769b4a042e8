"""Blocks that are alike, stacked and scanned: the same numbers from one compiled block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import tiny_checkpoint

import qdit_jax as qdit
from qdit_jax.checkpoint import with_dtype
from qdit_jax.models import RUNS
from qdit_jax.models.runs import with_runs
from qdit_jax.recipes import LayerSpec, Recipe, Rule
from qdit_jax.sampling import running_params

BLOCK = r"blocks_\d+"


def outputs(model, params):
    x = jax.random.normal(jax.random.key(1), (3, *model.sample_shape()))
    f = jax.jit(
        lambda p: model.apply({"params": p}, x, jnp.array([3.0, 40.0, 999.0]), jnp.arange(3))
    )
    return f(params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("numerics", ["simulated", "integer"])
def test_a_scanned_run_computes_the_same(dtype, numerics):
    full = with_dtype(tiny_checkpoint(depth=9), dtype)
    small = qdit.quantize(full, "rtn", Recipe.preset("w4a8", full, group_size=16))
    for checkpoint in (full, small) if numerics == "simulated" else (small,):
        model = checkpoint.model.clone(numerics=numerics, dtype=dtype)
        ran = running_params(model, checkpoint.params)
        assert list(ran[RUNS]) == ["blocks_0"]
        assert not any(name.startswith("blocks_") for name in ran)
        assert jax.tree.leaves(ran[RUNS])[0].shape[0] == 9
        found, plain = outputs(model, ran), outputs(model, checkpoint.params)
        np.testing.assert_allclose(found, plain, atol=1e-6 * np.abs(plain).max())


def test_runs_end_where_settings_differ():
    full = tiny_checkpoint(depth=18)
    recipe = Recipe.preset("w4a8", full, group_size=16)
    coarse = Rule("blocks_8/mlp/fc1", LayerSpec(qdit.WeightSpec(4, 8), qdit.ActSpec(8, 8)))
    small = qdit.quantize(full, "rtn", Recipe((*recipe.rules, coarse), "mixed"))
    ran = with_runs(small.params, BLOCK)
    lengths = {name: jax.tree.leaves(tree)[0].shape[0] for name, tree in ran[RUNS].items()}
    assert lengths == {"blocks_0": 8, "blocks_9": 9}
    assert "blocks_8" in ran
    np.testing.assert_allclose(
        outputs(full.model, ran), outputs(full.model, small.params), atol=1e-6
    )


def test_what_cannot_be_stacked_is_left():
    few = tiny_checkpoint(depth=3)
    assert with_runs(few.params, BLOCK) is few.params
    full = tiny_checkpoint(depth=8)
    stats = qdit.calibrate(full, jax.random.key(0), 2, sampler=qdit.ddim(2))
    recipe = Recipe.preset("w4a8", full, group_size=16, act_mode="static")
    params = qdit.quantize_params(full.params, recipe=recipe, stats=stats)
    assert with_runs(params, BLOCK) is params


def test_generated_samples_are_those_of_the_plain_tree():
    full = tiny_checkpoint(depth=8)
    assert RUNS in running_params(full.model, full.params)
    label = jnp.arange(3)
    found = qdit.generate(full, qdit.ddim(3), label, guidance=1.5, batch_size=3, decode_fn=None)
    noise = qdit.sampling.initial_noise(jax.random.key(0), label, full.model.sample_shape())[0]
    denoise_fn = qdit.denoiser(full.model, full.params, guidance=1.5)
    plain = jax.jit(qdit.sample)(denoise_fn, qdit.ddim(3), noise, label)
    np.testing.assert_allclose(found, plain, atol=1e-5 * np.abs(plain).max())
