"""Quantizing from disk to disk: bit for bit what is quantized in memory, one layer at a time."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdit_jax.calibration import Stats
from qdit_jax.checkpoint import Checkpoint, lazy, load, save, save_safetensors
from qdit_jax.errors import UserError
from qdit_jax.models import build_model
from qdit_jax.ptq import by_columns, precision_of, quantize_checkpoint, quantize_params, streaming
from qdit_jax.quant import ActSpec, WeightSpec, dequantize, formats, quantize, ranges
from qdit_jax.recipes import LayerSpec, Recipe, Rule

CONFIG = {
    "input_size": 8, "in_channels": 2, "hidden_size": 48, "depth": 1, "num_heads": 4, "num_classes": 9,
}  # fmt: skip
SPECS = {
    "asymmetric": WeightSpec(4, 32),
    "symmetric, 3 bits": WeightSpec(3, 0, symmetric=True, scale_dtype="bfloat16"),
    "channel groups": WeightSpec(5, 20, channel_group=2, scale_dtype="float16"),
    "mse": WeightSpec(4, 32, range_fn=ranges.mse(num_points=9)),
    "qdit_release mse": WeightSpec(4, 32, range_fn=ranges.qdit_release_mse(num_points=9)),
    "percentile": WeightSpec(6, 16, range_fn=ranges.percentile(0.9)),
    "two levels": WeightSpec(4, 32, scale_levels=2),
    "two levels, channel groups": WeightSpec(5, 20, scale_levels=2, channel_group=2),
} | {name: WeightSpec(fmt=fmt) for name, fmt in formats.FORMATS.items()}


def network(dtype="float32"):
    model = build_model("dit", CONFIG)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs())["params"]
    return model, jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), dtype), shapes)


def files_of(folder):
    """Returns the content of every file but those that hold times; lists without their order."""
    found = {}
    for file in folder.rglob("*"):
        name = str(file.relative_to(folder))
        if not file.is_file() or file.name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
            continue
        found[name] = file.read_bytes()
        if "array_metadatas" in name:
            found[name] = sorted(map(json.dumps, json.loads(found[name])["array_metadatas"]))
    return found


def check_same_on_disk(tmp_path, recipe, stats=None):
    """Quantizes `tmp_path/full` both ways and compares the folders byte for byte."""
    whole = load(tmp_path / "full")
    params = quantize_params(whole.params, recipe=recipe, stats=stats)
    source = str(tmp_path / "full")
    metadata = {**whole.metadata, "quantized_from": source, "rounding": "nearest"}
    in_memory = dataclasses.replace(whole, params=params, recipe=recipe, metadata=metadata)
    save(tmp_path / "memory", in_memory)
    written = quantize_checkpoint(source, tmp_path / "disk", recipe=recipe, stats=stats)
    found, wanted = files_of(tmp_path / "disk"), files_of(tmp_path / "memory")
    assert found.keys() == wanted.keys()
    assert [name for name in found if found[name] != wanted[name]] == []
    assert written.recipe == recipe
    assert jax.tree.structure(written.params) == jax.tree.structure(params)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(by_columns, "BLOCK", 600)  # several blocks a kernel, the last one shorter


@pytest.mark.parametrize("name", SPECS)
def test_blocks_of_columns_are_the_whole_kernel_bit_for_bit(name, small_blocks):
    w = np.random.default_rng(0).normal(size=(40, 60)).astype(np.float32)
    spec = SPECS[name]
    blocks = by_columns.column_blocks(w.shape, spec.channel_group)
    assert len(blocks) > 3
    found, wanted = by_columns.quantize_by_columns(w, spec), quantize(w, spec)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    error = np.asarray(dequantize(wanted), np.float64) - w
    expected = 10 * np.log10(np.square(w, dtype=np.float64).sum() / np.square(error).sum())
    np.testing.assert_allclose(precision_of(w, wanted).measured, expected, rtol=1e-5)


@pytest.mark.parametrize("channel_group", [1, 3])
@pytest.mark.parametrize("shape", [(1, 3), (7, 1200), (2000, 6), (33, 999)])
def test_blocks_cover_all_columns_once(shape, channel_group, small_blocks):
    blocks = by_columns.column_blocks(shape, channel_group)
    columns = [column for block in blocks for column in range(block.start, block.stop)]
    assert columns == list(range(shape[1]))
    assert all(block.start % channel_group == 0 for block in blocks)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("asymmetric", "float32"), ("channel groups", "bfloat16"), ("nvfp4", "float32")],
)
def test_everything_is_quantized_as_in_memory(tmp_path, name, dtype, small_blocks):
    model, params = network(dtype)
    save(tmp_path / "full", Checkpoint(model, params, metadata={"a": 1}))
    layers = "y_embedder|blocks_0/.*(qkv|fc2)"
    rules = (
        Rule(layers, LayerSpec(SPECS[name], ActSpec(8, 32))),
        Rule("blocks_0/attn/(k|proj)", LayerSpec(None, ActSpec(8, 0))),
    )
    check_same_on_disk(tmp_path, Recipe(rules, name))


def test_static_activations_and_an_autoencoder_are_written_as_in_memory(tmp_path):
    model, params = network()
    save(tmp_path / "full", Checkpoint(model, params, vae=Checkpoint(model, params)))
    high = np.random.default_rng(1).uniform(1, 2, size=(2, 48)).astype(np.float32)
    path = "blocks_0/attn/qkv"
    stats = Stats(np.array([900, 100]), {path: -high}, {path: high})
    options = {"group_size": 16, "act_mode": "static", "per_timestep": True}
    check_same_on_disk(tmp_path, Recipe.preset("w4a8", layers=path, **options), stats)


def test_other_sources_are_quantized_too(tmp_path):
    model, params = network()
    first = Recipe.preset("w4a8", params, group_size=16)
    save(tmp_path / "full", Checkpoint(model, params))
    quantize_checkpoint(tmp_path / "full", tmp_path / "some", recipe=first)
    # A checkpoint that is partly quantized, and an exported file.
    more = Recipe.preset("w6a8", layers="blocks_0/adaLN_modulation", group_size=16)
    quantize_checkpoint(tmp_path / "some", tmp_path / "more", recipe=more)
    twice = Recipe((*first.rules, *more.rules))
    save_safetensors(tmp_path / "full.safetensors", Checkpoint(model, params))
    quantize_checkpoint(tmp_path / "full.safetensors", tmp_path / "all", recipe=twice)
    wanted = quantize_params(params, recipe=twice)
    for name in ("more", "all"):
        found = load(tmp_path / name).params
        assert jax.tree.structure(found) == jax.tree.structure(wanted)
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
    with pytest.raises(ValueError, match="is quantized already"):
        quantize_checkpoint(tmp_path / "more", tmp_path / "third", recipe=first)
    assert not (tmp_path / "third").exists()


def test_a_layer_is_on_disk_before_the_next_is_read(tmp_path, monkeypatch):
    model, params = network()
    save(tmp_path / "full", Checkpoint(model, params))
    read, reads, shown = lazy.read_array, [], []

    def checked(folder, name):
        (partial,) = tmp_path.glob(".out.partial-*")
        written = {file.parent.name for file in partial.glob("params*/*/.zarray")}
        for before in reads:
            fields = [f"{before}/codes", f"{before}/scale"] if before in shown else [before]
            assert {field.replace("/", ".") for field in fields} <= written, (before, name)
        reads.append(name)
        return read(folder, name)

    monkeypatch.setattr(lazy, "read_array", checked)
    recipe = Recipe.preset("w4a8", params, group_size=16)
    noted = lambda path, w, q: shown.append(f"{path}/kernel")  # noqa: E731
    quantize_checkpoint(tmp_path / "full", tmp_path / "out", recipe=recipe, on_layer=noted)
    assert len(shown) == 4
    assert sorted(reads) == sorted(json.loads((tmp_path / "full/model.json").read_text())["params"])


def test_a_failure_midway_leaves_nothing_and_keeps_what_was_there(tmp_path):
    model, params = network()
    save(tmp_path / "full", Checkpoint(model, params))
    recipe = Recipe.preset("w4a8", params, group_size=16)
    quantize_checkpoint(tmp_path / "full", tmp_path / "out", recipe=recipe)
    before = files_of(tmp_path / "out")
    (tmp_path / "full/params/blocks_0.mlp.fc2.kernel/0.0").write_bytes(b"short")
    shown = []
    for name in ("out", "new"):
        with pytest.raises(UserError, match="full/params is damaged or incomplete"):
            quantize_checkpoint(
                tmp_path / "full", tmp_path / name, recipe=recipe, overwrite=True,
                on_layer=lambda path, w, q: shown.append(path),
            )  # fmt: skip
    assert "blocks_0/attn/qkv" in shown
    assert sorted(os.listdir(tmp_path)) == ["full", "out"]
    assert files_of(tmp_path / "out") == before


def test_an_existing_folder_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "open_checkpoint", None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        quantize_checkpoint(tmp_path / "in", tmp_path / "out", recipe=Recipe(()))
    for overwrite in (False, True):
        with pytest.raises(UserError, match="is the input"):
            quantize_checkpoint(tmp_path, tmp_path, recipe=Recipe(()), overwrite=overwrite)


KILLED = """
import sys, time
from qdit_jax import Recipe, quantize_checkpoint
def wait(path, w, q):
    print(path, flush=True)
    time.sleep(60)
recipe = Recipe.preset("w4a8", group_size=16)
quantize_checkpoint(sys.argv[1], sys.argv[2], recipe=recipe, on_layer=wait, overwrite=True)
"""


def test_what_a_killed_process_left_goes_with_the_next_save(tmp_path):
    model, params = network()
    full, out = tmp_path / "full", tmp_path / "out"
    save(full, Checkpoint(model, params, metadata={"number": 1}))
    save(out, Checkpoint(model, params, metadata={"number": 1}))
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(full), str(out)], stdout=subprocess.PIPE
    )
    assert process.stdout.readline()
    # The folder of a process that lives is left alone.
    save(out, Checkpoint(model, params, metadata={"number": 2}), overwrite=True)
    assert len(list(tmp_path.glob(".out.partial-*"))) == 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert load(out).metadata == {"number": 2}
    assert len(list(tmp_path.glob(".out.partial-*"))) == 1
    save(tmp_path / "other", Checkpoint(model, params))
    assert len(list(tmp_path.glob(".out.partial-*"))) == 1
    save(out, Checkpoint(model, params, metadata={"number": 3}), overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["full", "other", "out"]
