"""Checkpoints: what goes in comes out, and nothing damaged is taken for whole."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import output

from qdit_jax.checkpoint import Checkpoint, load, save
from qdit_jax.errors import UserError
from qdit_jax.models import build_model
from qdit_jax.ptq import quantize_params
from qdit_jax.quant import ActSpec, QTensor, WeightSpec, ranges
from qdit_jax.recipes import LayerSpec, Recipe, Rule

CONFIG = {
    "input_size": 8, "in_channels": 2, "hidden_size": 48, "depth": 1, "num_heads": 4, "num_classes": 3,
}  # fmt: skip


def network(config=None):
    model = build_model("dit", config or CONFIG)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs())["params"]
    return model, jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)


def mixed_recipe():
    """One layer of every kind that a checkpoint must keep."""
    weight = WeightSpec(3, 32, scale_dtype="float16", range_fn=ranges.percentile(0.999))
    return Recipe(
        (
            Rule(r"blocks_0/.*(qkv|fc1)", LayerSpec(weight, ActSpec(8, 32))),
            Rule(r"blocks_0/mlp/fc2", LayerSpec(WeightSpec(6, 0, symmetric=True), None)),
            Rule(r"blocks_0/attn/proj", LayerSpec(None, ActSpec(4, 16, symmetric=True))),
            Rule(r"blocks_0/attn/[qk]", LayerSpec(None, ActSpec(8, 0))),
        ),
        "mixed",
    )


def test_a_quantized_checkpoint_comes_back_bit_for_bit(tmp_path):
    model, params = network()
    recipe = mixed_recipe()
    params = quantize_params(params, recipe=recipe)
    save(tmp_path / "ckpt", Checkpoint(model, params, recipe, {"source": "test"}))
    found = load(tmp_path / "ckpt")
    assert found.model == model
    assert found.recipe == recipe
    assert found.metadata == {"source": "test"}
    assert jax.tree.structure(found.params) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    assert isinstance(found.params["blocks_0"]["attn"]["qkv"]["kernel"], QTensor)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8, 8, 2)), jnp.float32)
    inputs = x, jnp.array([3.0, 900.0]), jnp.array([0, 3])
    np.testing.assert_array_equal(
        output(model, params, *inputs),
        output(found.model, found.params, *inputs),
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_keeps_its_dtype(tmp_path, dtype):
    model, params = network()
    params = jax.tree.map(lambda a: jnp.asarray(a, dtype), params)
    save(tmp_path / "ckpt", Checkpoint(model, params))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(load(tmp_path / "ckpt").params)} == {dtype}


def test_an_existing_folder_is_kept_unless_told_otherwise(tmp_path):
    model, params = network()
    save(tmp_path / "ckpt", Checkpoint(model, params, metadata={"number": 1}))
    with pytest.raises(UserError, match="exists already"):
        save(tmp_path / "ckpt", Checkpoint(model, params, metadata={"number": 2}))
    assert load(tmp_path / "ckpt").metadata == {"number": 1}
    save(tmp_path / "ckpt", Checkpoint(model, params, metadata={"number": 2}), overwrite=True)
    assert load(tmp_path / "ckpt").metadata == {"number": 2}
    assert os.listdir(tmp_path) == ["ckpt"]


def test_a_failure_while_writing_leaves_nothing(tmp_path):
    model, params = network()
    with pytest.raises(TypeError):
        save(tmp_path / "ckpt", Checkpoint(model, params, metadata={"bad": object()}))
    assert os.listdir(tmp_path) == []


KILLED = """
import sys, numpy as np
from tests_checkpoint_helper import network
from qdit_jax.checkpoint import Checkpoint, save
model, params = network()
print("ready", flush=True)
for number in range(1000):
    save(sys.argv[1], Checkpoint(model, params, metadata={"number": number}), overwrite=True)
"""


@pytest.mark.slow
def test_a_kill_leaves_the_old_state_or_the_new_one(tmp_path):
    helper = tmp_path / "tests_checkpoint_helper.py"
    helper.write_text(Path(__file__).read_text())
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for wait in (0.2, 0.5, 0.9):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path / "ckpt")],
            stdout=subprocess.PIPE, env=environment,
        )  # fmt: skip
        process.stdout.readline()
        while not (tmp_path / "ckpt").exists():
            time.sleep(0.01)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert load(tmp_path / "ckpt").metadata["number"] >= 0


def edited(folder, **changes):
    file = folder / "model.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def without_a_parameter(folder):
    params = json.loads((folder / "model.json").read_text())["params"]
    del params["blocks_0/mlp/fc1/bias"]
    edited(folder, params=params)


def with_another_dtype(folder):
    params = json.loads((folder / "model.json").read_text())["params"]
    params["pos_embed"]["dtype"] = "int32"
    edited(folder, params=params)


def with_wrong_packing(folder):
    params = json.loads((folder / "model.json").read_text())["params"]
    params["blocks_0/attn/qkv/kernel"]["group_size"] = 16
    edited(folder, params=params)


def with_truncated_arrays(folder):
    files = [file for file in (folder / "params").rglob("*") if file.is_file()]
    max(files, key=lambda file: file.stat().st_size).write_bytes(b"short")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.json").unlink(), "is not a checkpoint"),
        (lambda f: (f / "model.json").write_text("{"), "is damaged"),
        (lambda f: edited(f, format_version=99), "format version 99"),
        (lambda f: edited(f, family="unet"), "family='unet' is unknown"),
        (lambda f: edited(f, config={**CONFIG, "hidden_size": 96}), "has shape"),
        (lambda f: edited(f, config={**CONFIG, "depth": 2}), "lacks 10 parameters"),
        (without_a_parameter, "lacks 1 parameters, the first is blocks_0/mlp/fc1/bias"),
        (with_truncated_arrays, "damaged or incomplete"),
        (with_another_dtype, "pos_embed is float32 (1, 16, 48), but model.json says int32"),
        (lambda f: edited(f, params=[]), "config and params must be objects"),
        (lambda f: edited(f, params={"a": 1}), "every entry of params must be an object"),
        (lambda f: shutil.rmtree(f / "params"), "damaged or incomplete"),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    model, params = network()
    save(tmp_path / "ckpt", Checkpoint(model, params))
    damage(tmp_path / "ckpt")
    with pytest.raises(UserError, match=re.escape(message)):
        load(tmp_path / "ckpt")


def test_settings_that_do_not_fit_the_packed_arrays_are_named(tmp_path):
    model, params = network()
    recipe = mixed_recipe()
    save(tmp_path / "ckpt", Checkpoint(model, quantize_params(params, recipe=recipe), recipe))
    with_wrong_packing(tmp_path / "ckpt")
    with pytest.raises(
        UserError, match=r"qkv/kernel/scale is \[2, 144\], its settings need \[3, 144\]"
    ):
        load(tmp_path / "ckpt")
    recipe_file = tmp_path / "ckpt" / "recipe.json"
    with_wrong = json.loads((tmp_path / "ckpt" / "model.json").read_text())["params"]
    with_wrong["blocks_0/attn/qkv/kernel"]["group_size"] = 32
    edited(tmp_path / "ckpt", params=with_wrong)
    recipe_file.write_text("{")
    with pytest.raises(UserError, match=r"recipe.json is damaged"):
        load(tmp_path / "ckpt")
    recipe_file.write_text(json.dumps({**recipe.to_json(), "format_version": 7}))
    with pytest.raises(UserError, match="format_version=7"):
        load(tmp_path / "ckpt")


def test_an_absent_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "nowhere")
