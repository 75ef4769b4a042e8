"""Names and shapes to parameter trees: every layout, every choice, every complaint."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest
from convert_samples import (
    CLASSES,
    check_tree,
    diffusers_arrays,
    diffusers_config,
    dit_shapes,
    flat,
    random_arrays,
    write_folder,
    write_safetensors,
)
from torch_file import Object

from qdit_convert import read_model
from qdit_jax.errors import UserError


def test_a_facebook_dit_becomes_the_tree_of_our_dit(pt, dit):
    read = read_model(pt(dit), num_heads=2)
    check_tree(read)
    tree = flat(read.params)
    weight = dit["blocks.1.attn.qkv.weight"]
    np.testing.assert_array_equal(tree["blocks_1/attn/qkv/kernel"], weight.T)
    patch = dit["x_embedder.proj.weight"]
    np.testing.assert_array_equal(tree["x_embedder/proj/kernel"], patch.transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(tree["pos_embed"], dit["pos_embed"])
    assert read.family == "dit"
    assert read.config["num_classes"] == CLASSES
    assert read.config["null_class"]
    assert read.config["input_size"] == 4
    assert read.config["learn_sigma"]
    assert not read.config["velocity"]


def test_a_safetensors_file_gives_the_same_tree(pt, dit, tmp_path):
    one = flat(read_model(pt(dit), num_heads=2).params)
    two = flat(read_model(write_safetensors(tmp_path / "m.safetensors", dit), num_heads=2).params)
    assert all((one[path] == two[path]).all() for path in one)


@pytest.mark.parametrize("stored", ["float16", ml_dtypes.bfloat16, "float64"])
def test_stored_values_are_kept_exactly_in_float32(pt, dit, stored):
    arrays = {name: array.astype(stored) for name, array in dit.items()}
    tree = flat(read_model(pt(arrays), num_heads=2).params)
    assert tree["pos_embed"].dtype == np.float32
    expected = arrays["pos_embed"].astype(np.float32)
    np.testing.assert_array_equal(tree["pos_embed"], expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_is_that_of_every_leaf(pt, dit, dtype):
    tree = flat(read_model(pt(dit), num_heads=2, dtype=dtype).params)
    assert {leaf.dtype.name for leaf in tree.values()} == {dtype}


def test_sit_is_a_dit_that_returns_velocities(pt, dit):
    read = read_model(pt(dit), family="sit", num_heads=2)
    assert read.family == "dit"
    assert read.config["velocity"]
    assert read.metadata["source_family"] == "sit"


def test_published_sizes_know_their_heads(pt):
    arrays = random_arrays(dit_shapes(384, 12))
    path = pt(arrays)
    assert read_model(path).config["num_heads"] == 6
    assert read_model(path, model="DiT-S/2").config["num_heads"] == 6
    with pytest.raises(
        UserError, match=r"DiT-B/2 has 12 blocks of width 768 .* file has 12 blocks of width 384"
    ):
        read_model(path, model="DiT-B/2")
    with pytest.raises(UserError, match="DiT-S/2 has 6 heads, but num_heads=4"):
        read_model(path, model="DiT-S/2", num_heads=4)


@pytest.mark.parametrize(
    ("rows", "settings", "expected"),
    [
        (11, {}, (10, True)),
        (10, {"num_classes": 10}, (10, False)),
        (1000, {}, (1000, False)),
        (1001, {}, (1000, True)),
    ],
)
def test_the_null_class_is_the_last_row(pt, dit, rows, settings, expected):
    dit["y_embedder.embedding_table.weight"] = np.zeros((rows, 16), np.float32)
    config = read_model(pt(dit), num_heads=2, **settings).config
    assert (config["num_classes"], config["null_class"]) == expected


def test_a_training_script_says_how_many_classes(pt, dit):
    args = Object("argparse.Namespace", (), {"num_classes": 11})
    assert not read_model(pt({"ema": dit, "args": args}), num_heads=2).config["null_class"]


def test_sizes_that_are_no_square_must_be_said(pt, dit):
    dit["pos_embed"] = np.zeros((1, 6, 16), np.float32)
    path = pt(dit)
    with pytest.raises(UserError, match=r"6 positions make no square; pass --input-size"):
        read_model(path, num_heads=2)
    assert read_model(path, num_heads=2, input_size=(4, 6)).config["input_size"] == (4, 6)
    with pytest.raises(UserError, match=r"input_size=\[4, 4\] in patches of 2 does not make the 6"):
        read_model(path, num_heads=2, input_size=4)


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({}, {"num_heads": None}, "2 blocks of width 16 is not a published size.*--num-heads"),
        ({}, {"num_heads": 3}, "width 16 must be divisible by num_heads=3"),
        ({}, {"num_heads": 0}, "num_heads=0 is not a number of heads"),
        ({}, {"model": "DiT-Q/2"}, "'DiT-Q/2' is not a published size"),
        ({}, {"num_classes": 5}, "label table has 11 rows, which num_classes=5 does not fit"),
        ({}, {"dtype": "int8"}, "'int8' is not known; use one of float32"),
        ({}, {"family": "vae"}, "are of a DiT in the facebook layout, not of family vae"),
        ({}, {"family": "gan"}, "'gan' is not known; use one of dit, sit, "),
        ({"pos_embed": None}, {}, "1 tensor is missing: pos_embed"),
        (
            {"blocks.1.attn.qkv.bias": None, "blocks.0.mlp.fc2.weight": None},
            {},
            r"2 tensors are missing: blocks\.0\.mlp\.fc2\.weight \[16, 64\], blocks\.1\.attn\.qkv\.bias \[48\]",
        ),
        ({"blocks.0.extra": (3,)}, {}, r"1 tensor is unexpected: blocks\.0\.extra \[3\]"),
        (
            {"blocks.1.attn.proj.weight": (16, 15)},
            {},
            r"blocks\.1\.attn\.proj\.weight \(found \[16, 15\], expected \[16, 16\]\)",
        ),
        ({"pos_embed": (1, 4, 15)}, {}, r"pos_embed \(found \[1, 4, 15\], expected \[1, 4, 16\]\)"),
        ({"x_embedder.proj.weight": (16, 4)}, {}, r"x_embedder\.proj\.weight \(found \[16, 4\]"),
        ({"final_layer.linear.weight": (24, 16)}, {}, "6 output channels for 4 input channels"),
        (
            {"final_layer.linear.weight": (33, 16)},
            {},
            "33 rows, which patches of 2x2 do not divide",
        ),
    ],
)
def test_complaints_about_a_dit(pt, dit, change, settings, message):
    for name, shape in change.items():
        dit.pop(name, None)
        if shape is not None:
            dit[name] = np.zeros(shape, np.float32)
    with pytest.raises(UserError, match=message) as caught:
        read_model(pt(dit), **{"num_heads": 2, **settings})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_gap_in_the_blocks_is_named(pt):
    arrays = random_arrays(dit_shapes(depth=4))
    kept = {k: v for k, v in arrays.items() if not re.match(r"blocks\.[12]\.", k)}
    with pytest.raises(UserError, match=r"gap: blocks\.1, blocks\.2 missing, though blocks\.3"):
        read_model(pt(kept), num_heads=2)


def test_values_that_are_not_finite_are_counted(pt, dit):
    dit["pos_embed"][0, 0, :3] = np.nan
    dit["blocks.1.mlp.fc1.bias"][5] = -np.inf
    dit["blocks.1.mlp.fc1.bias"][6] = np.nan
    with pytest.raises(UserError) as caught:
        read_model(pt(dit), num_heads=2)
    message = str(caught.value)
    assert "2 tensors are not finite" in message
    assert "pos_embed (3 NaN of 64 values)" in message
    assert "blocks.1.mlp.fc1.bias (1 NaN and 1 inf of 64 values)" in message


def test_values_too_large_for_the_dtype_are_refused(pt, dit):
    dit["pos_embed"][0, 0, 0] = 1e6
    with pytest.raises(UserError, match="pos_embed: 1 of 64 values are too large for float16"):
        read_model(pt(dit), num_heads=2, dtype="float16")


def test_integer_weights_are_refused(pt, dit):
    dit["blocks.0.attn.qkv.weight"] = dit["blocks.0.attn.qkv.weight"].astype(np.int64)
    with pytest.raises(
        UserError, match=r"1 tensor is not floating point: blocks\.0\.attn\.qkv\.weight \(int64\)"
    ):
        read_model(pt(dit), num_heads=2)


def test_entries_that_are_no_tensors_are_named(pt, dit):
    with pytest.raises(UserError, match=r"unexpected: epoch \(a int, no tensor\)"):
        read_model(pt({**dit, "epoch": 3}), num_heads=2)


def test_an_unrelated_network_shows_its_names(pt):
    arrays = {f"layer{i}.conv.weight": np.ones(2, np.float32) for i in range(9)}
    with pytest.raises(
        UserError, match=r"no network that convert knows .*: layer0\.conv\.weight, .* and 5 more"
    ):
        read_model(pt(arrays))


@pytest.mark.parametrize(
    ("key", "title"),
    [
        ("temp_embed", "Latte"),
        ("blocks.0.attn_temp.qkv.weight", "STDiT"),
        ("spatial_blocks.0.attn.qkv.weight", "STDiT3"),
    ],
)
def test_networks_not_supported_yet_are_recognized(pt, dit, key, title):
    with pytest.raises(UserError, match=f"{title}.* does not support yet"):
        read_model(pt({**dit, key: np.ones(2, np.float32)}))


def test_the_diffusers_layout_gives_the_facebook_tree(dit, tmp_path, pt):
    theirs = read_model(write_folder(tmp_path / "d", diffusers_arrays(dit), diffusers_config()))
    check_tree(theirs)
    ours = flat(read_model(pt(dit), num_heads=2).params)
    for path, leaf in flat(theirs.params).items():
        if path != "pos_embed":
            np.testing.assert_array_equal(leaf, ours[path], err_msg=path)
    assert theirs.config["frequency_shift"] == 1
    assert theirs.config["mlp_norm_eps"] == 1e-5
    assert theirs.config["num_heads"] == 2


def test_a_stored_position_table_is_used_as_stored(dit, tmp_path):
    arrays = {**diffusers_arrays(dit), "pos_embed.pos_embed": dit["pos_embed"]}
    read = read_model(write_folder(tmp_path / "d", arrays, diffusers_config()))
    np.testing.assert_array_equal(read.params["pos_embed"], dit["pos_embed"])


def test_embedders_that_differ_between_blocks_are_refused(dit, tmp_path):
    arrays = diffusers_arrays(dit)
    key = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"
    arrays[key] = arrays[key] + 1
    with pytest.raises(UserError, match=f"{re.escape(key)} differs from transformer_blocks.0"):
        read_model(write_folder(tmp_path / "d", arrays, diffusers_config()))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"no config\.json"),
        ({"num_layers": 3}, r"config\.json says num_layers = 3, but the weights have 2"),
        ({"attention_head_dim": 9}, r"attention_head_dim = 18, but the weights have 16"),
        ({"num_embeds_ada_norm": 12}, r"num_embeds_ada_norm \+ 1 = 13, but the weights have 11"),
        ({"patch_size": 4}, "patch_size = 4"),
        ({"_class_name": "UNet2DConditionModel"}, "is of a UNet2DConditionModel"),
        ({"activation_fn": "geglu"}, "activation_fn='geglu'"),
        ({"num_attention_heads": "two"}, "is not a positive number"),
        ({"sample_size": ...}, "pass --input-size"),
        ({"norm_eps": "x"}, "is not a number"),
    ],
)
def test_complaints_about_config_json(dit, tmp_path, config, message):
    settings = None if config is None else diffusers_config(**config)
    with pytest.raises(UserError, match=message):
        read_model(write_folder(tmp_path / "d", diffusers_arrays(dit), settings))


def test_config_json_that_is_no_json(dit, tmp_path):
    folder = write_folder(tmp_path / "d", diffusers_arrays(dit), {})
    (folder / "config.json").write_text("{,")
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        read_model(folder)


def test_other_paths_that_are_no_source(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_model(tmp_path / "nothing")
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(UserError, match="checkpoint of this library already"):
        read_model(tmp_path)
