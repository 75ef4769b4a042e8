"""Exported checkpoints: one file, packed, bit for bit, and refused when not whole."""

from __future__ import annotations

import json
import struct

import jax
import numpy as np
import pytest

from qdit_jax.checkpoint import Checkpoint, load, load_safetensors, save, save_safetensors
from qdit_jax.cli import main
from qdit_jax.errors import UserError
from qdit_jax.models import build_model
from qdit_jax.ptq import plan, quantize_params
from qdit_jax.quant import ActSpec, WeightSpec, formats
from qdit_jax.recipes import LayerSpec, Recipe, Rule

SMALL = {
    "input_size": 8, "in_channels": 2, "hidden_size": 48, "depth": 1, "num_heads": 4, "num_classes": 3,
}  # fmt: skip
RECIPE = Recipe(
    (
        Rule(r"blocks_0/.*(qkv|fc1)", LayerSpec(WeightSpec(3, 32), ActSpec(8, 32))),
        Rule(r"blocks_0/mlp/fc2", LayerSpec(WeightSpec(fmt=formats.by_name("nvfp4")), None)),
        Rule(r"blocks_0/attn/proj", LayerSpec(WeightSpec(4, 0, symmetric=True), None)),
    ),
    "mixed",
)
LEVELS = Recipe(
    (
        Rule(r"blocks_0/.*(qkv|fc1)", LayerSpec(WeightSpec(4, 32, scale_levels=2), ActSpec(8, 0))),
        Rule(r"blocks_0/.*(proj|fc2)", LayerSpec(WeightSpec(fmt=formats.lut4, group_size=16))),
    ),
    "levels",
)


def network(config=SMALL, dtype=np.float32):
    model = build_model("dit", config)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs())["params"]
    return model, jax.tree.map(lambda s: rng.normal(size=s.shape).astype(dtype), shapes)


def quantized(recipe=RECIPE, config=SMALL, dtype=np.float32):
    model, params = network(config, dtype)
    return Checkpoint(model, quantize_params(params, recipe=recipe), recipe, {"source": "test"})


def same(found, wanted):
    assert found.model == wanted.model
    assert found.recipe == wanted.recipe
    assert found.metadata == wanted.metadata
    assert jax.tree.structure(found.params) == jax.tree.structure(wanted.params)

    def equal(a, b):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)

    jax.tree.map(equal, found.params, wanted.params)


def test_levels_and_codebooks_come_back_from_file_and_folder(tmp_path):
    wanted = quantized(LEVELS)
    for path in (tmp_path / "x.safetensors", tmp_path / "folder"):
        save(path, wanted)
        same(load(path), wanted)
    description = json.loads((tmp_path / "folder/model.json").read_text())
    assert description["format_version"] == 3  # earlier releases refuse it by its version
    save(tmp_path / "plain", Checkpoint(*network()))
    assert json.loads((tmp_path / "plain/model.json").read_text())["format_version"] == 1
    kernel = description["params"]["blocks_0/attn/qkv/kernel"]
    kernel["arrays"]["offset"]["shape"][0] += 1
    (tmp_path / "folder/model.json").write_text(json.dumps(description))
    with pytest.raises(
        UserError, match=r"kernel/offset is \[3, 144\], its settings need \[2, 144\]"
    ):
        load(tmp_path / "folder")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_file_comes_back_bit_for_bit(tmp_path, dtype):
    inner = quantized(dtype=dtype)
    wanted = Checkpoint(inner.model, inner.params, RECIPE, {"a": 1}, vae=inner)
    save_safetensors(tmp_path / "x.safetensors", wanted)
    for read in (load_safetensors, load):
        found = read(tmp_path / "x.safetensors")
        same(found, wanted)
        same(found.vae, inner)
    with pytest.raises(UserError, match="exists already"):
        save_safetensors(tmp_path / "x.safetensors", wanted)


def test_the_command_goes_both_ways(tmp_path, capsys):
    wanted = quantized()
    folder, file, back = tmp_path / "ckpt", tmp_path / "x.safetensors", tmp_path / "back"
    save(folder, wanted)
    assert main(["export", str(folder), str(file)]) == 0
    assert main(["export", str(file), str(back)]) == 0
    same(load(back), wanted)
    assert json.loads((back / "model.json").read_text()) == json.loads(
        (folder / "model.json").read_text()
    )
    assert main(["export", str(folder), str(back)]) == 2
    assert "one of them must be a .safetensors file" in capsys.readouterr().err
    assert main(["export", str(folder), str(file)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_an_exported_file_is_a_checkpoint_to_other_commands(tmp_path):
    model, params = network()
    save_safetensors(tmp_path / "full.safetensors", Checkpoint(model, params))
    arguments = [str(tmp_path / "full.safetensors"), str(tmp_path / "q")]
    assert (
        main(["quantize", *arguments, "--recipe", "w4a8", "--group-size", "16", "--method", "rtn"])
        == 0
    )
    assert load(tmp_path / "q").recipe is not None


def formula_bytes(params, recipe):
    """The bytes that a checkpoint should take: packed kernels, the rest as it is."""
    plans = plan(params, recipe)
    return sum(a.nbytes for a in jax.tree.leaves(params)) - sum(
        p.bytes_before - p.bytes_after for p in plans
    )


def check_size(tmp_path, config, recipe):
    model, params = network(config)
    wanted = formula_bytes(params, recipe)
    checkpoint = Checkpoint(model, quantize_params(params, recipe=recipe), recipe)
    assert sum(a.nbytes for a in jax.tree.leaves(checkpoint.params)) == wanted
    save_safetensors(tmp_path / "x.safetensors", checkpoint)
    assert abs((tmp_path / "x.safetensors").stat().st_size - wanted) < 0.01 * wanted


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_bytes_on_disk_are_the_formulas(tmp_path, bits):
    config = {**SMALL, "hidden_size": 384, "num_heads": 6}
    recipe = Recipe((Rule(r"blocks_.*/(qkv|fc1|fc2)", LayerSpec(WeightSpec(bits, 96), None)),))
    check_size(tmp_path, config, recipe)


@pytest.mark.slow
def test_bytes_on_disk_are_the_formulas_at_depth(tmp_path):
    config = {"hidden_size": 768, "depth": 12, "num_heads": 12}
    check_size(tmp_path, config, Recipe.preset("w4a8", layers=r"blocks_\d+/(attn|mlp)/\w+"))


def with_metadata(file, change):
    """Rewrites the header of a safetensors file."""
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    change(header)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + size :])


def edit(change):
    def damage(file):
        def inner(header):
            description = json.loads(header["__metadata__"]["qdit_jax"])
            change(description)
            header["__metadata__"]["qdit_jax"] = json.dumps(description)

        with_metadata(file, inner)

    return damage


def rename_first(header):
    header["other"] = header.pop("pos_embed")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.unlink(), "is not a file"),
        (lambda f: f.write_bytes(b""), "is not a whole safetensors file"),
        (lambda f: f.write_bytes(f.read_bytes()[:-5]), "is not a whole safetensors file"),
        (lambda f: f.write_bytes(b"PK" + f.read_bytes()), "is not a whole safetensors file"),
        (
            lambda f: with_metadata(f, lambda h: h.pop("__metadata__")),
            "is not an exported checkpoint",
        ),
        (edit(lambda d: d.update(format_version=2)), "export format version 2"),
        (edit(lambda d: d["model"].update(format_version=9)), "format version 9"),
        (edit(lambda d: d["model"].update(family="unet")), "family='unet' is unknown"),
        (edit(lambda d: d["model"]["params"].pop("pos_embed")), "lacks 1 parameters"),
        (
            edit(lambda d: d["model"]["params"]["blocks_0/mlp/fc1/kernel"].update(bits=4)),
            "fc1/kernel/codes is",
        ),
        (edit(lambda d: d["recipe"].update(rules=3)), "is not a recipe"),
        (edit(lambda d: d.pop("model")), "damaged"),
        (lambda f: with_metadata(f, rename_first), "lacks the array pos_embed"),
        (
            lambda f: with_metadata(f, lambda h: h["pos_embed"].update(dtype="I32")),
            "pos_embed is int32",
        ),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    file = tmp_path / "x.safetensors"
    save_safetensors(file, quantized())
    damage(file)
    with pytest.raises(UserError, match=message):
        load_safetensors(file)
