"""Quantized files of others: codes and scales as stored, products as by hand, and what is refused."""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import quantized_samples as made
from convert_samples import dit_shapes, flat, random_arrays

from qdit_convert import describe, read_model
from qdit_convert.bits import from_tiles, in_tiles, nibbles, packed_nibbles
from qdit_jax.checkpoint import load
from qdit_jax.cli import convert as verb
from qdit_jax.errors import UserError
from qdit_jax.models import Linear
from qdit_jax.quant import ActSpec, QTensor, dequantize, integer_codes, scale_values

WIDTH = 64  # so that fc2, and fc2 alone, has 256 input channels
PATHS = {
    "blocks.0.attn.qkv": "blocks_0/attn/qkv",
    "blocks.0.mlp.fc2": "blocks_0/mlp/fc2",
    "blocks.1.adaLN_modulation.1": "blocks_1/adaLN_modulation",
}
NVFP4 = ("weight", "weight_scale", "weight_scale_2")
FORMATS = {
    "int8_tensorwise": lambda w: made.int8(w),
    "int8 rotated": lambda w: made.int8(w, 256),
    "int8 rotated in 64": lambda w: made.int8(w, 64),
    "int8 of one scale": lambda w: made.int8(w, per_row=False),
    "float8_e4m3fn": lambda w: made.float8(w),
    "float8_e5m2": lambda w: made.float8(w, ml_dtypes.float8_e5m2),
    "nvfp4": made.nvfp4,
    "mxfp8": made.mxfp8,
    "convrot_w4a4": lambda w: made.int4(w, 64),
    "asym_w4a8_int8": lambda w: made.lut(w, 64),
}


@pytest.fixture(scope="module")
def arrays():
    return random_arrays(dit_shapes(WIDTH))


def quantized(arrays, format_fn, names=tuple(PATHS)):
    """Returns the arrays of a file with some quantized layers, and the weights that they stand for."""
    both = {name: format_fn(arrays[f"{name}.weight"]) for name in names}
    layers = {name: parts for name, (parts, _) in both.items()}
    return made.with_layers(arrays, layers), {name: w for name, (_, w) in both.items()}


def command(*args):
    """Runs the verb alone, as `qdit convert` does."""
    parser = argparse.ArgumentParser()
    verb.add_parser(parser.add_subparsers(dest="verb"))
    parsed = parser.parse_args(["convert", *map(str, args)])
    parsed.run(parsed)


def read(tmp_path, arrays, metadata=None):
    path = made.write(tmp_path / "model.safetensors", arrays, metadata)
    return read_model(path, num_heads=4)


def layer_of(params, path):
    for part in path.split("/"):
        params = params[part]
    return params


def rounded(x, act: ActSpec):
    """Returns inputs on the grid of a quantizer, by hand in float64."""
    if act.fmt is None:
        step = np.abs(x).max(axis=1, keepdims=True) / (2 ** (act.bits - 1) - 1)
        return np.rint(x / step) * step
    values = act.fmt.values().astype(np.float64)
    values = np.where(np.isfinite(values), values, 0)
    size = act.fmt.block_size or act.group_size or x.shape[1]
    groups = x.reshape(len(x), -1, size)
    step = np.abs(groups).max(axis=2, keepdims=True) / values.max()
    if act.fmt.block_scale == "e8m0":
        step = 2.0 ** (np.floor(np.log2(np.abs(groups).max(axis=2, keepdims=True))) - 8)
    if act.fmt.has_tensor_scale:
        factor = np.abs(x).max(axis=1)[:, None, None] / values.max() / 448
        step = (step / factor).astype(np.float32).astype(made.E4M3).astype(np.float64) * factor
    nearest = np.abs(groups[..., None] / step[..., None] - values).argmin(axis=-1)
    return (values[nearest] * step).reshape(x.shape)


@pytest.mark.parametrize("name", FORMATS)
def test_a_kernel_is_what_the_file_says_and_its_products_are_those_by_hand(name, arrays, tmp_path):
    stored, weights = quantized(arrays, FORMATS[name])
    params = read(tmp_path, stored).params
    for key, path in PATHS.items():
        layer = layer_of(params, path)
        kernel, rotation = layer["kernel"], layer.get("rotation")
        size = 0 if rotation is None else rotation.size
        np.testing.assert_array_equal(layer["bias"], arrays[f"{key}.bias"])
        theirs = made.turned(weights[key], size)  # in the coordinates that are stored
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(dequantize(kernel), theirs.T, atol=3e-7 * scale, rtol=0)

        if path == "blocks_1/adaLN_modulation":
            continue
        x = np.random.default_rng(1).standard_normal((5, theirs.shape[1])).astype(np.float32)
        inputs = rounded(made.turned(x.astype(np.float64), size), layer["act_quant"].spec)
        expected = inputs @ theirs.T + arrays[f"{key}.bias"]
        for numerics in ("simulated", "integer"):
            y = Linear(theirs.shape[0], numerics=numerics).apply({"params": layer}, jnp.asarray(x))
            np.testing.assert_allclose(y, expected, atol=2e-5 * np.abs(expected).max(), rtol=0)


def test_codes_and_scales_are_those_of_the_file(arrays, tmp_path):
    stored, _ = quantized(arrays, FORMATS["int8 rotated"])
    params = read(tmp_path, stored).params
    for key, path in PATHS.items():
        layer = layer_of(params, path)
        codes = np.asarray(integer_codes(layer["kernel"])).astype(int) - 128
        np.testing.assert_array_equal(codes, stored[f"{key}.weight"].T)
        found = np.asarray(scale_values(layer["kernel"]))
        np.testing.assert_array_equal(found.reshape(-1), stored[f"{key}.weight_scale"].reshape(-1))
        # 64 channels are no whole block: not rotated, whatever the marker says.
        assert ("rotation" in layer) == (path == "blocks_0/mlp/fc2")
    kernels = [path for path, leaf in flat(params).items() if isinstance(leaf, QTensor)]
    assert sorted(kernels) == sorted(f"{path}/kernel" for path in PATHS.values())


def test_the_whole_network_runs_in_both_numerics_and_its_recipe_says_what_was_found(
    arrays, tmp_path, capsys
):
    stored, _ = quantized(arrays, FORMATS["int8 rotated"])
    path = made.write(tmp_path / "model.safetensors", stored)
    command(path, tmp_path / "out", "--num-heads", 4)
    printed = capsys.readouterr().out
    assert "3 weights stored as int8_tensorwise kept bit for bit (1 with inputs rotated" in printed
    assert f"{sum(a.size for a in arrays.values()):,} values" in printed
    checkpoint = load(tmp_path / "out")
    assert checkpoint.metadata["quantized"] == ["int8_tensorwise"]
    assert checkpoint.recipe.name == "int8_tensorwise"
    found = checkpoint.recipe.resolve(checkpoint.params)
    assert sorted(found) == sorted(PATHS.values())
    assert found["blocks_0/attn/qkv"].act == ActSpec(8, 0, True)
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 4))
    args = ({"params": checkpoint.params}, x, jnp.array([0, 900]), jnp.array([1, 2]))
    outputs = [
        np.asarray(checkpoint.model.clone(numerics=numerics).apply(*args))
        for numerics in ("simulated", "integer")
    ]
    np.testing.assert_allclose(*outputs, atol=1e-5 * np.abs(outputs[0]).max(), rtol=0)


def test_the_metadata_of_the_file_says_the_format_as_well(arrays, tmp_path):
    stored, weights = quantized(arrays, FORMATS["nvfp4"])
    layers = {name: {"format": "nvfp4"} for name in PATHS}
    bare = {k: v for k, v in stored.items() if not k.endswith("comfy_quant")}
    params = read(tmp_path, bare, {"format_version": "1.0", "layers": layers}).params
    kernel = layer_of(params, "blocks_0/attn/qkv")["kernel"]
    expected = weights["blocks.0.attn.qkv"].T
    np.testing.assert_allclose(dequantize(kernel), expected, atol=1e-7)
    prefixed = {f"model.diffusion_model.{key}": array for key, array in bare.items()}
    same = layer_of(read(tmp_path, prefixed, {"layers": layers}).params, "blocks_0/attn/qkv")
    np.testing.assert_array_equal(dequantize(same["kernel"]), dequantize(kernel))
    (network,) = describe(tmp_path / "model.safetensors")["networks"]
    assert network["dtypes"]["nvfp4"] == sum(bare[f"{k}.{p}"].nbytes for k in PATHS for p in NVFP4)
    layers["blocks.9.attn.qkv"] = {"format": "nvfp4"}
    with pytest.raises(UserError, match=r"names 1 layers that the file lacks: blocks\.9"):
        read(tmp_path, bare, {"layers": layers})


def test_earlier_fp8_files_and_prefixes_are_read_too(arrays, tmp_path):
    stored, weights = quantized(arrays, FORMATS["float8_e4m3fn"])
    old = {"scaled_fp8": np.zeros(2, np.float32).astype(made.E4M3)}
    for key, array in stored.items():
        if not key.endswith("comfy_quant"):
            old[key.replace(".weight_scale", ".scale_weight")] = array
    prefixed = {f"model.diffusion_model.{key}": array for key, array in old.items()}
    for file in (old, prefixed):
        found = read(tmp_path, file)
        kernel = layer_of(found.params, "blocks_0/mlp/fc2")["kernel"]
        np.testing.assert_allclose(dequantize(kernel), weights["blocks.0.mlp.fc2"].T, atol=1e-7)


def test_settings_beside_a_format_are_followed_or_said(arrays, tmp_path):
    stored, _ = quantized(arrays, lambda w: made.float8(w, full_precision_matrix_mult=True))
    stored["blocks.0.mlp.fc2.input_scale"] = np.array(0.5, np.float32)
    smooth = np.linspace(0.5, 2, WIDTH, dtype=np.float32)
    stored["blocks.0.attn.qkv.pre_quant_scale"] = smooth
    found = read(tmp_path, stored)
    qkv, fc2 = (layer_of(found.params, f"blocks_0/{name}") for name in ("attn/qkv", "mlp/fc2"))
    assert "act_quant" not in qkv
    np.testing.assert_array_equal(qkv["input_map"].inverse_scale, smooth)
    assert "input_map" not in fc2
    (note,) = (text for text in found.metadata["notes"] if "input_scale" in text)
    assert "(1 weights)" in note


def test_tables_of_block_scales_go_into_tiles_and_back():
    table = np.arange(130 * 5, dtype=np.int32).reshape(130, 5)
    tiled = in_tiles(table)
    assert tiled.shape == (256, 8)
    np.testing.assert_array_equal(from_tiles(tiled, 130, 5), table)
    # Row 33, column 2 of the first tile; row 129, column 4 of the last.
    assert tiled.reshape(-1)[16 * 1 + 4 * 1 + 2] == table[33, 2]
    assert tiled.reshape(-1)[3 * 512 + 16 * 1] == table[129, 4]
    codes = np.arange(32, dtype=np.uint8).reshape(2, 16) % 16
    for high_first in (True, False):
        packed = packed_nibbles(codes, high_first=high_first)
        assert packed[0, 0] == (0x01 if high_first else 0x10)
        np.testing.assert_array_equal(nibbles(packed, high_first=high_first), codes)


QKV = "blocks.0.attn.qkv"
NAN = np.float32(np.nan)


def spoiled(arrays, format_name, changes):
    """Returns a file in which qkv is quantized and some of its tensors are others, or absent."""
    stored, _ = quantized(arrays, FORMATS[format_name], [QKV])
    stored |= {f"{QKV}.{part}": value for part, value in changes.items() if value is not None}
    return {
        k: v for k, v in stored.items() if changes.get(k.removeprefix(f"{QKV}."), 0) is not None
    }


MISTAKES = {
    "an unknown format": (
        *("int8_tensorwise", {"comfy_quant": made.marker(format="w6a8_int8")}),
        r"blocks\.0\.attn\.qkv has the format 'w6a8_int8', which convert does not read; it reads "
        "int8_tensorwise",
    ),
    "no format": ("nvfp4", {"comfy_quant": made.marker(group_size=16)}, "not in which format"),
    "a broken marker": (
        *("nvfp4", {"comfy_quant": np.zeros(3, np.uint8)}),
        r"qkv\.comfy_quant is not JSON",
    ),
    "no scale": ("int8_tensorwise", {"weight_scale": None}, r"missing: .*qkv\.weight_scale"),
    "no second scale": ("nvfp4", {"weight_scale_2": None}, r"missing: .*qkv\.weight_scale_2"),
    "no codebook": ("asym_w4a8_int8", {"weight_codebook": None}, r"missing: .*weight_codebook"),
    "scales of other channels": (
        *("int8_tensorwise", {"weight_scale": np.ones((5, 1), np.float32)}),
        r"wrong shape: .*weight_scale \(found \[5, 1\], expected \[192, 1\]",
    ),
    "scales without tiles": (
        *("nvfp4", {"weight_scale": np.ones((192, 4), made.E4M3)}),
        r"weight_scale \(found \[192, 4\], expected \[256, 4\]",
    ),
    "whole numbers as scales": (
        *("int8_tensorwise", {"weight_scale": np.ones((192, 1), np.int32)}),
        "weight_scale is int32; expected float32 or bfloat16 or float16",
    ),
    "NaN as scale": (
        *("int8_tensorwise", {"weight_scale": np.full((192, 1), NAN)}),
        r"192 of 192 values of .*qkv\.weight_scale are not scales: nan at \[0, 0\]",
    ),
    "a negative block scale": (
        *("asym_w4a8_int8", {"weight_s_rel": np.full((192, 4), -2, made.E4M3)}),
        r"weight_s_rel are not scales: -2\.0",
    ),
    "NaN as weight": (
        *("float8_e4m3fn", {"weight": np.full((192, 64), NAN).astype(made.E4M3)}),
        r"12288 of 12288 values of .*qkv\.weight are not finite",
    ),
    "a weight of another dtype": (
        *("int8_tensorwise", {"weight": np.zeros((192, 64), np.int32)}),
        r"qkv\.weight is int32; expected int8",
    ),
    "another width": (
        *("int8_tensorwise", {"weight": np.zeros((192, 32), np.int8)}),
        r"qkv\.weight \(found \[192, 32\], expected \[192, 64\]",
    ),
    "blocks that do not divide": (
        *("nvfp4", {"weight": np.zeros((192, 20), np.uint8)}),
        "40 input channels, which blocks of 16 do not divide",
    ),
    "a rotation that does not divide": (
        "asym_w4a8_int8",
        {"comfy_quant": made.marker(format="asym_w4a8_int8")},
        "64 input channels, which blocks of 256 do not divide; the format rotates always",
    ),
    "products of other bits": (
        "convrot_w4a4",
        {"comfy_quant": made.marker(format="convrot_w4a4", linear_dtype="int8")},
        "says linear_dtype='int8', quant_group_size=64 of convrot_w4a4, of which convert reads",
    ),
    "blocks of 256 in 64 channels": (
        "convrot_w4a4",
        {"comfy_quant": made.marker(format="convrot_w4a4")},
        "64 input channels, which blocks of 256 do not divide; the format rotates always",
    ),
    "an exponent that is no number": (
        *("mxfp8", {"weight_scale": np.full((256, 4), 255, np.uint8)}),
        r"384 of 384 values of .*qkv\.weight_scale are not finite",
    ),
    "rows that were padded": (
        *("mxfp8", {"weight": np.zeros((190, 64), made.E4M3)}),
        "190 x 64 channels, which 32 does not divide: mxfp8 would have padded them",
    ),
    "a size without rotation": (
        "int8_tensorwise",
        {"comfy_quant": made.marker(format="int8_tensorwise", convrot=True, convrot_groupsize=32)},
        "convrot_groupsize=32 is no power of 4",
    ),
    "a rotation that the format has not": (
        *("nvfp4", {"comfy_quant": made.marker(format="nvfp4", convrot=True)}),
        "says convrot, which the format nvfp4 does not have",
    ),
    "an unknown tensor beside it": (
        *("asym_w4a8_int8", {"weight_correction": np.zeros((4, 192), np.float32)}),
        r"1 tensor is unexpected: .*weight_correction",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_is_not_understood_is_refused_by_name(name, arrays, tmp_path):
    format_name, changes, message = MISTAKES[name]
    with pytest.raises(UserError, match=message):
        read(tmp_path, spoiled(arrays, format_name, changes))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("x_embedder.proj", r"x_embedder\.proj\.weight is stored as int8_tensorwise with 4 axes"),
        (
            "y_embedder.embedding_table",
            r"embedding_table\.weight is stored quantized \(int8_tensorwise\), but is no kernel of a",
        ),
    ],
)
def test_a_quantized_tensor_that_is_no_linear_kernel_is_refused(key, message, arrays, tmp_path):
    weight = arrays[f"{key}.weight"]
    parts, _ = made.int8(weight.reshape(len(weight), -1))
    parts["weight"] = parts["weight"].reshape(weight.shape)
    with pytest.raises(UserError, match=message):
        read(tmp_path, made.with_layers(arrays, {key: parts}))


def test_integers_of_which_nothing_says_the_format_are_refused(arrays, tmp_path):
    stored, _ = quantized(arrays, FORMATS["int8_tensorwise"], [QKV])
    del stored[f"{QKV}.comfy_quant"], stored[f"{QKV}.weight_scale"]
    with pytest.raises(UserError, match=r"qkv\.weight \(int8\); .*only where the file says their"):
        read(tmp_path, stored)
