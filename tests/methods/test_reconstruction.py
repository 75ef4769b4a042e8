"""Block reconstruction: what it learns, that it helps, and that a stopped run resumes."""

from __future__ import annotations

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_models import random_params
from told import Told
from toy_family import ROW, ToyVideo, prompts

import qdit_jax as qdit
from qdit_jax.calibration import Items
from qdit_jax.methods import CalibrationData, method_named
from qdit_jax.methods.reconstruction import reconstruct_blocks
from qdit_jax.models import FAMILIES, DiT
from qdit_jax.models.calls import module_calls
from qdit_jax.ptq import ReconstructionSettings, reconstruct_params, units_of
from qdit_jax.ptq.block_learning import NUM_CHUNKS
from qdit_jax.quant import ActQuant, QTensor, integer_codes, ranges
from qdit_jax.recipes import Recipe
from qdit_jax.testing import realistic_dit

SHORT = ReconstructionSettings(num_steps=20)


@cache
def network():
    """Returns a network of two blocks, and inputs with channels that lie out in its layers."""
    model, params = realistic_dit(hidden_size=32, num_heads=2, input_size=8, depth=2)
    return model, jax.tree.map(jnp.asarray, params)


@cache
def items(seed=0, count=64):
    model, rng = network()[0], np.random.default_rng(seed)
    x = rng.standard_normal((count, *model.sample_shape())).astype(np.float32)
    timestep = np.linspace(0, 999, count).astype(np.float32)
    label = rng.integers(0, model.num_classes + 1, count).astype(np.int32)
    return Items(x, timestep, label, np.arange(count) % 8)


def recipe_for(**options):
    return Recipe.preset("w3a8", **{"group_size": 0, **options})


@cache
def result(settings=None, layers=None, seed=0):
    """Returns the quantized parameters and the layers' reports."""
    model, params = network()
    found = []
    options = {} if layers is None else {"layers": layers}
    made = reconstruct_params(
        model,
        params,
        items(seed),
        recipe=recipe_for(**options),
        settings=settings,
        batch_size=32,
        on_layer=found.append,
    )
    return made, {layer.path: layer for layer in found}


def error(params, seed=5):
    """Returns the squared error of the network's output on inputs that nothing was fitted to."""
    model, full = network()
    given = jax.tree.map(jnp.asarray, items(seed)[:3])
    call = jax.jit(lambda params: model.apply({"params": params}, *given))
    return float(jnp.sum(jnp.square(call(params) - call(full))))


def test_a_code_is_next_to_the_weight():
    params, layers = result()
    assert set(layers) == set(recipe_for().resolve(network()[1]))
    nearest = qdit.quantize_params(network()[1], recipe=recipe_for())
    ours, plain = (flatten_dict(tree, sep="/") for tree in (params, nearest))
    moved = 0
    for name in (f"{path}/kernel" for path in layers):
        codes = (integer_codes(tree[name]).astype(int) for tree in (ours, plain))
        away = np.abs(np.subtract(*codes))
        assert away.max() <= 1
        np.testing.assert_array_equal(ours[name].scale, plain[name].scale)
        moved += away.sum()
    assert moved > 0


def test_a_block_s_output_is_nearer_than_by_nearest_and_by_layers():
    model, params = network()
    ours, layers = result()
    assert all(layer.rounded < 0.7 * layer.nearest for layer in layers.values())
    nearest = qdit.quantize_params(params, recipe=recipe_for())
    by_layer = qdit.quantize(
        qdit.Checkpoint(model, params),
        "adaround",
        recipe_for(),
        data=CalibrationData(items=items(), batch_size=32),
    ).params
    assert error(ours) < error(by_layer) < error(nearest)


def test_the_same_run_gives_the_same_codes():
    first, again = result(SHORT)[0], result.__wrapped__(SHORT)[0]
    jax.tree.map(np.testing.assert_array_equal, first, again)
    other = result(dataclasses.replace(SHORT, seed=1))[0]
    leaves = zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True)
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in leaves)


def test_blocks_that_are_alike_are_equal_and_compiled_once():
    from qdit_jax.ptq.block_learning import learn

    model, params = network()
    units = units_of(model, params, recipe_for())
    assert [unit.path for unit in units] == ["blocks_0", "blocks_1"]
    assert units[0].form == units[1].form
    assert hash(units[0].form) == hash(units[1].form)
    before = learn._cache_size()
    result(ReconstructionSettings(num_steps=30))
    assert learn._cache_size() == before + 1


class StoppedError(Exception):
    pass


def test_a_killed_run_resumes_to_the_same_result(tmp_path):
    model, params = network()
    data = CalibrationData(items=items(), batch_size=32, unfinished=tmp_path / "unfinished")
    method = dataclasses.replace(
        method_named("brecq"), apply=partial(reconstruct_blocks, settings=SHORT)
    )
    run = partial(qdit.quantize, qdit.Checkpoint(model, params), method, recipe_for(), data=data)
    seen = Told()

    def stop(event):
        seen.tell(event)
        if event.done and sum(seen.counts) == 2 * NUM_CHUNKS - 3:  # within the second block
            raise StoppedError

    with pytest.raises(StoppedError):
        run(progress_fn=stop)
    assert [path.name for path in (tmp_path / "unfinished").iterdir()] == ["0000.npz"]
    told = Told()
    resumed = run(progress_fn=told.tell)
    assert told.counts[0] > NUM_CHUNKS
    assert sum(told.counts) == told.total
    jax.tree.map(np.testing.assert_array_equal, resumed.params, result(SHORT)[0])
    other = dataclasses.replace(data, items=items(1))
    with pytest.raises(qdit.UserError, match="its items is not the same"):
        run(data=other)


@pytest.mark.parametrize("per_timestep", [pytest.param(False, marks=pytest.mark.slow), True])
def test_static_step_sizes_are_learned_and_help(per_timestep):
    model, params = network()
    checkpoint = qdit.Checkpoint(model, params)
    name = "tfmq_dm" if per_timestep else "ptq4dit"
    recipe = Recipe.preset(
        "w4a4",
        group_size=0,
        act_mode="static",
        per_timestep=per_timestep,
        act_range_fn=ranges.minmax,
        layers=r"blocks_\d+/(attn/qkv|mlp/fc2)",
    )
    few = items()._replace(timestep=np.repeat([100.0, 800.0], 32).astype(np.float32))
    data = CalibrationData(items=few, batch_size=32)
    ours = {}
    for rate in (0.0, 5e-3):
        settings = ReconstructionSettings(num_steps=100, step_size_rate=rate)
        method = dataclasses.replace(
            method_named(name),
            prepare=method_named("tfmq_dm").prepare,
            check=None,
            apply=partial(reconstruct_blocks, settings=settings),
        )
        told = Told()
        made = qdit.quantize(checkpoint, method, recipe, data=data, progress_fn=told.tell)
        layers = told.layers
        scale = flatten_dict(made.params, sep="/")["blocks_1/mlp/fc2/act_quant"].scale
        ours[rate] = np.asarray(scale), layers[-1].error_db
        assert not layers[-1].fell_back
    assert ours[0.0][0].shape == ((2, 1) if per_timestep else (1,))
    assert (ours[0.0][0] != ours[5e-3][0]).all()
    assert ours[5e-3][1] > ours[0.0][1]


@pytest.mark.slow
def test_a_family_unlike_dit_is_reconstructed(monkeypatch):
    monkeypatch.setitem(FAMILIES, ROW.name, ROW)
    model = ToyVideo()
    params, rng = random_params(model), np.random.default_rng(0)
    x = rng.standard_normal((16, *model.sample_shape())).astype(np.float32)
    seen = Items(x, np.linspace(10, 900, 16).astype(np.float32), prompts(16), np.arange(16) % 4)
    layers = r"caption|layers_\d+/(attn/qkv|cross/kv)"
    recipe = Recipe.preset("w4a8", params, group_size=0, layers=layers)
    paths = [unit.path for unit in units_of(model, params, recipe)]
    assert paths == ["caption", "layers_0", "layers_1"]
    layers = []
    made = reconstruct_params(
        model, params, seen, recipe=recipe, settings=SHORT, on_layer=layers.append
    )
    assert all(layer.fell_back or layer.rounded <= layer.nearest for layer in layers)
    kinds = [type(leaf) for leaf in flatten_dict(made, sep="/").values()]
    assert kinds.count(QTensor) == len(layers) == len(recipe.resolve(params))
    assert ActQuant in kinds
    calls = module_calls(model, params)["layers_0"]
    assert [call.rows for call in calls] == [(1, 1, 1, 1)]


def test_what_cannot_be_is_refused():
    model, params = network()
    with pytest.raises(ValueError, match="stages='layer': block reconstruction has stages"):
        qdit.quantize(
            qdit.Checkpoint(model, params), "brecq", "w4a8", data=CalibrationData(stages="layer")
        )
    with pytest.raises(ValueError, match=r"integer codes, not the format 'nf4' of blocks_0"):
        units_of(model, params, method_named("nf4").preset("w4a16"))
    assert isinstance(model, DiT)
