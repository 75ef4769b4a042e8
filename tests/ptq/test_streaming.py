"""Arrays read when they are used, label tables in few bits, and placement on many devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdit_jax.checkpoint import (
    Checkpoint,
    DeferredArray,
    lazy,
    load,
    materialized,
    open_checkpoint,
    save,
)
from qdit_jax.cli import main
from qdit_jax.errors import UserError
from qdit_jax.models import build_model
from qdit_jax.ptq import plan, quantize_params
from qdit_jax.quant import ActSpec, QTensor, WeightSpec, dequantize, packed_nbytes
from qdit_jax.recipes import LayerSpec, Recipe, Rule

CONFIG = {
    "input_size": 8, "in_channels": 2, "hidden_size": 64, "depth": 1, "num_heads": 4, "num_classes": 9,
}  # fmt: skip
EVERYTHING = Recipe(
    (
        Rule(".*", LayerSpec(WeightSpec(4, 32, scale_dtype="float16"), ActSpec(8, 32))),
        Rule(r"blocks_\d+/attn/(q|k|v|softmax)", LayerSpec()),
    ),
    "everything",
)


def network(config=CONFIG):
    model = build_model("dit", config)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs())["params"]
    return model, jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)


def equal(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_stored_arrays_are_the_loaded_ones(tmp_path):
    model, params = network()
    recipe = Recipe.preset("w4a8", params, group_size=32)
    wanted = Checkpoint(model, quantize_params(params, recipe=recipe), recipe, {"a": 1})
    save(tmp_path / "ckpt", Checkpoint(model, wanted.params, recipe, {"a": 1}, vae=wanted))
    opened = open_checkpoint(tmp_path / "ckpt")
    assert {type(leaf) for leaf in jax.tree.leaves(opened.params)} == {DeferredArray}
    assert (opened.model, opened.recipe, opened.metadata) == (model, recipe, {"a": 1})
    found = materialized(opened)
    equal(found.params, wanted.params)
    equal(found.vae.params, wanted.params)
    leaf = opened.params["pos_embed"]
    np.testing.assert_array_equal(np.asarray(leaf), params["pos_embed"])
    np.testing.assert_array_equal(jnp.asarray(leaf), params["pos_embed"])
    assert leaf.nbytes == params["pos_embed"].nbytes


def test_arrays_are_read_one_at_a_time(tmp_path, monkeypatch):
    model, params = network()
    save(tmp_path / "ckpt", Checkpoint(model, params))
    events = []
    read = lazy.read_array
    noted = lambda folder, name: events.append(name) or read(folder, name)  # noqa: E731
    monkeypatch.setattr(lazy, "read_array", noted)
    opened = open_checkpoint(tmp_path / "ckpt")
    recipe = Recipe.preset("w4a8", opened.params, group_size=32)
    assert plan(opened.params, recipe) == plan(params, recipe)
    assert events == []
    found = quantize_params(
        opened.params, recipe=recipe, on_layer=lambda path, w, q: events.append(path)
    )
    names = ["attn/proj", "attn/qkv", "mlp/fc1", "mlp/fc2"]
    paths = [f"blocks_0/{name}" for name in names]
    assert events == [event for path in paths for event in (f"{path}/kernel", path)]
    equal(materialized(found), quantize_params(params, recipe=recipe))


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(b"short"), Path.unlink])
def test_damaged_arrays_are_named_when_they_are_read(tmp_path, damage):
    model, params = network()
    save(tmp_path / "ckpt", Checkpoint(model, params))
    files = [file for file in (tmp_path / "ckpt" / "params").rglob("*") if file.is_file()]
    damage(max(files, key=lambda file: file.stat().st_size))
    opened = open_checkpoint(tmp_path / "ckpt")
    with pytest.raises(UserError, match="damaged or incomplete"):
        materialized(opened)


@pytest.mark.parametrize("channel_group", [1, 2])
def test_a_label_table_in_few_bits_is_its_dequantized_self(tmp_path, channel_group):
    model, params = network()
    spec = WeightSpec(4, 32, channel_group=channel_group)
    recipe = Recipe((Rule("y_embedder", LayerSpec(spec)),), "table")
    (layer,) = plan(params, recipe)
    assert layer.shape == (64, 10)
    quantized = quantize_params(params, recipe=recipe)
    table = quantized["y_embedder"]["embedding_table"]
    assert isinstance(table, QTensor)
    assert table.nbytes == layer.bytes_after == packed_nbytes(64, 10, spec)
    plain = {**params, "y_embedder": {"embedding_table": dequantize(table).T}}
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 8, 8, 2)), jnp.float32)
    inputs = x, jnp.array([3.0, 900.0, 1.0]), jnp.array([0, 9, 3])
    wanted = model.apply({"params": plain}, *inputs)
    found = jax.jit(model.apply)({"params": quantized}, *inputs)
    np.testing.assert_allclose(found, wanted, atol=2e-5 * float(jnp.abs(wanted).max()))
    save(tmp_path / "ckpt", Checkpoint(model, quantized, recipe))
    equal(load(tmp_path / "ckpt").params, quantized)


def test_everything_leaves_only_biases_and_positions(tmp_path):
    model, params = network()
    quantized = quantize_params(params, recipe=EVERYTHING)
    is_q = lambda leaf: isinstance(leaf, QTensor)  # noqa: E731
    rest = [a for a in jax.tree.leaves(quantized, is_leaf=is_q) if not is_q(a)]
    assert {a.ndim for a in rest if a.shape != params["pos_embed"].shape} == {1}
    assert "act_quant" not in quantized["y_embedder"]
    save(tmp_path / "full", Checkpoint(model, params))
    (tmp_path / "recipe.json").write_text(json.dumps(EVERYTHING.to_json()))
    arguments = [str(tmp_path / "full"), str(tmp_path / "q"), "--method", "rtn"]
    assert main(["quantize", *arguments, "--recipe", str(tmp_path / "recipe.json")]) == 0
    equal(load(tmp_path / "q").params, quantized)


def test_an_xl_with_everything_in_4_bits_is_351_megabytes():
    model = build_model("dit", {})
    params = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs())["params"]
    spec = WeightSpec(4, 128, scale_dtype="float16")
    recipe = Recipe(
        (*(Rule(r.layers, LayerSpec(r.spec.weight and spec)) for r in EVERYTHING.rules),)
    )
    plans = plan(params, recipe)
    before = sum(leaf.size * 4 for leaf in jax.tree.leaves(params))
    after = before - sum(p.bytes_before - p.bytes_after for p in plans)
    assert before == 675_129_632 * 4
    assert abs(after - 351e6) < 0.01 * 351e6


ON_DEVICES = """
import sys, json, jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from qdit_jax.checkpoint import load, save, split_over
folder, count = sys.argv[1], int(sys.argv[2])
assert jax.device_count() == count
mesh = jax.make_mesh((count,), ("d",), (AxisType.Auto,))
inputs = [np.load(folder + "/inputs.npz")[k] for k in ("x", "t", "y")]
report = {}
for name in ("ckpt", "ckpt.safetensors"):
    for kind, sharding in (("whole", NamedSharding(mesh, PartitionSpec())), ("split", split_over(mesh))):
        found = load(folder + "/" + name, sharding=sharding)
        leaves = jax.tree.leaves(found.params)
        assert all(len(leaf.sharding.device_set) == count for leaf in leaves)
        held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
        total = sum(leaf.nbytes for leaf in leaves)
        y = jax.jit(found.model.apply)({"params": found.params}, *inputs)
        np.save(f"{folder}/{name}-{kind}-{count}.npy", y)
        report[f"{name} {kind}"] = held / total
save(folder + f"/again-{count}", found)
print(json.dumps(report))
"""


@pytest.mark.slow
def test_a_checkpoint_goes_onto_one_and_eight_devices(tmp_path):
    from qdit_jax.checkpoint import save_safetensors

    model, params = network()
    recipe = Recipe.preset("w4a8", params, group_size=32)
    checkpoint = Checkpoint(model, quantize_params(params, recipe=recipe), recipe)
    save(tmp_path / "ckpt", checkpoint)
    save_safetensors(tmp_path / "ckpt.safetensors", checkpoint)
    rng = np.random.default_rng(0)
    x, t, y = rng.normal(size=(2, 8, 8, 2)).astype("f"), np.array([3.0, 900.0], "f"), np.arange(2)
    np.savez(tmp_path / "inputs.npz", x=x, t=t, y=y)
    wanted = jax.jit(model.apply)({"params": checkpoint.params}, x, t, y)
    for count in (1, 8):
        flags = f"--xla_force_host_platform_device_count={count}"
        run = subprocess.run(
            [sys.executable, "-c", ON_DEVICES, str(tmp_path), str(count)],
            env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            capture_output=True, text=True, cwd=Path(__file__).parent,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr[-2000:]
        share = json.loads(run.stdout.splitlines()[-1])
        assert share["ckpt whole"] == share["ckpt.safetensors whole"] == 1
        assert (
            share["ckpt split"] == share["ckpt.safetensors split"] < (1.01 if count == 1 else 0.2)
        )
        for name in ("ckpt", "ckpt.safetensors"):
            for kind in ("whole", "split"):
                found = np.load(tmp_path / f"{name}-{kind}-{count}.npy")
                error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
                assert error < 2e-3  # a code may flip where sums are in another order
        equal(load(tmp_path / f"again-{count}").params, checkpoint.params)
