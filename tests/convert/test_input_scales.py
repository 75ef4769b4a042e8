"""Scales of inputs that a file holds (`input_scale`): kept, and products as published, in float64."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import quantized_samples as made
from convert_samples import (
    diffusers_arrays,
    diffusers_config,
    dit_shapes,
    random_arrays,
    write_folder,
)
from test_quantized_writing import stored_in

from qdit_convert import convert, export, read_model
from qdit_jax.checkpoint import load, save
from qdit_jax.errors import UserError
from qdit_jax.models import Linear
from qdit_jax.quant import ActSpec, formats

WIDTH = 64
NAMES = {
    "blocks.0.attn.qkv": "blocks_0/attn/qkv",
    "blocks.0.mlp.fc2": "blocks_0/mlp/fc2",
}
FORMATS = {
    "float8_e4m3fn": (lambda w: made.float8(w), formats.fp8_e4m3, 0.004),
    "float8_e5m2": (lambda w: made.float8(w, ml_dtypes.float8_e5m2), formats.fp8_e5m2, 0.004),
    "nvfp4": (made.nvfp4, formats.nvfp4, 0.0011),
}


@pytest.fixture(scope="module")
def arrays():
    return random_arrays(dit_shapes(WIDTH))


def stored(arrays, format_fn, scale):
    """Returns a file's arrays with two layers of which each has a scale of its input, and weights."""
    both = {name: format_fn(arrays[f"{name}.weight"]) for name in NAMES}
    layers = {
        name: parts | {"input_scale": np.array(scale * (1 + i), np.float32)}
        for i, (name, (parts, _)) in enumerate(both.items())
    }
    return made.with_layers(arrays, layers), {name: w for name, (_, w) in both.items()}


def layer_of(params, path):
    for part in path.split("/"):
        params = params[part]
    return params


def published(x, fmt, scale):
    """Returns an input as ComfyUI rounds it: `clamp(x / scale)` in the format, float64."""
    values = fmt.values().astype(np.float64)
    values = values[np.isfinite(values)]
    if fmt is not formats.nvfp4:
        steps = np.clip((x / np.float32(scale)).astype(np.float32), values.min(), values.max())
        dtype = made.E4M3 if fmt is formats.fp8_e4m3 else ml_dtypes.float8_e5m2
        return steps.astype(dtype).astype(np.float64) * np.float64(np.float32(scale))
    blocks = x.astype(np.float64).reshape(len(x), -1, 16)
    of_block = np.abs(blocks).max(axis=2, keepdims=True) / 6 / np.float64(np.float32(scale))
    step = np.clip(of_block, 0, 448).astype(np.float32).astype(made.E4M3).astype(np.float64)
    step = step * np.float64(np.float32(scale))
    nearest = np.abs(blocks[..., None] / step[..., None] - values).argmin(axis=-1)
    return (values[nearest] * step).reshape(x.shape)


@pytest.mark.parametrize("name", FORMATS)
def test_a_static_scale_is_kept_and_its_products_are_the_published_ones(name, arrays, tmp_path):
    format_fn, fmt, scale = FORMATS[name]
    file, weights = stored(arrays, format_fn, scale)
    found = convert(made.write(tmp_path / "in.safetensors", file), num_heads=4)
    assert not any(
        "input_scale" in note or "each token" in note for note in found.metadata["notes"]
    )
    save(tmp_path / "ours", found)
    params = load(tmp_path / "ours").params
    for i, (key, path) in enumerate(NAMES.items()):
        layer, own = layer_of(params, path), np.float32(scale * (1 + i))
        quantizer = layer["act_quant"]
        size = 16 if name == "nvfp4" else 0
        assert quantizer.spec == ActSpec(group_size=size, fmt=fmt, mode="static")
        np.testing.assert_array_equal(quantizer.scale, [own])
        x = np.random.default_rng(i).standard_normal((9, weights[key].shape[1])).astype(np.float32)
        x[0] *= 40  # beyond what the scale was calibrated for: it saturates
        expected = published(x, fmt, own) @ weights[key].T + arrays[f"{key}.bias"]
        for numerics in ("simulated", "integer"):
            module = Linear(len(weights[key]), numerics=numerics)
            y = module.apply({"params": layer}, jnp.asarray(x))
            np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


def test_nvfp4_with_scales_of_inputs_is_written_as_it_was_read(arrays, tmp_path):
    file, _ = stored(arrays, made.nvfp4, 0.001)
    found = convert(made.write(tmp_path / "in.safetensors", file), num_heads=4)
    export(found, tmp_path / "out.safetensors", format="nvfp4")
    again = stored_in(tmp_path / "out.safetensors")
    assert set(again) == set(file)
    for key in NAMES:
        np.testing.assert_array_equal(again[f"{key}.input_scale"], file[f"{key}.input_scale"])


def test_earlier_files_say_whether_inputs_are_quantized(arrays, tmp_path):
    file, _ = stored(arrays, lambda w: made.float8(w), 0.01)
    old = {}
    for key, array in file.items():
        name = key.replace(".weight_scale", ".scale_weight").replace(".input_scale", ".scale_input")
        if not key.endswith("comfy_quant"):
            old[f"model.diffusion_model.{name}"] = array
    for count in (2, 0):
        marker = {"model.diffusion_model.scaled_fp8": np.zeros(count, made.E4M3)}
        path = made.write(tmp_path / f"{count}.safetensors", old | marker)
        found = read_model(path, num_heads=4)
        layer = layer_of(found.params, "blocks_0/mlp/fc2")
        notes = [note for note in found.metadata["notes"] if "full precision" in note]
        if count == 2:  # products in full precision, whatever scales the file has
            assert "act_quant" not in layer
            assert notes == [
                "float8_e4m3fn: input_scale left out: the input stays in full precision (2 weights)"
            ]
        else:
            np.testing.assert_array_equal(layer["act_quant"].scale, [np.float32(0.02)])
            assert not notes


def test_without_a_scale_every_token_has_its_own_and_it_is_said(arrays, tmp_path):
    for name, said in (("float8_e4m3fn", "1 for all"), ("nvfp4", "the greatest value of all")):
        file, _ = stored(arrays, FORMATS[name][0], 1)
        bare = {key: array for key, array in file.items() if not key.endswith("input_scale")}
        found = read_model(made.write(tmp_path / f"{name}.safetensors", bare), num_heads=4)
        layer = layer_of(found.params, "blocks_0/mlp/fc2")
        assert layer["act_quant"].spec.mode == "dynamic"
        (note,) = (note for note in found.metadata["notes"] if "each token" in note)
        assert f"where ComfyUI has {said}" in note
    file = made.with_layers(
        arrays, {name: made.mxfp8(arrays[f"{name}.weight"])[0] for name in NAMES}
    )
    file["blocks.0.mlp.fc2.input_scale"] = np.array(0.5, np.float32)
    found = read_model(made.write(tmp_path / "mxfp8.safetensors", file), num_heads=4)
    (note,) = (note for note in found.metadata["notes"] if "input_scale" in note)
    assert note.endswith("blocks of an input have scales of their own (1 weights)")


BAD = {
    "zero": (np.array(0, np.float32), r"fc2\.input_scale is 0, which inputs are divided by"),
    "NaN": (np.array(np.nan, np.float32), r"fc2\.input_scale are not scales: nan"),
    "per channel": (np.ones(5, np.float32), r"input_scale \(found \[5\], expected \[\] or \[1\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_scale_is_refused(case, arrays, tmp_path):
    value, message = BAD[case]
    file, _ = stored(arrays, lambda w: made.float8(w), 1)
    file["blocks.0.mlp.fc2.input_scale"] = value
    with pytest.raises(UserError, match=message):
        read_model(made.write(tmp_path / "in.safetensors", file), num_heads=4)


def test_layers_that_are_one_here_need_one_scale_of_their_input(arrays, tmp_path):
    theirs = diffusers_arrays(random_arrays(dit_shapes(WIDTH, depth=1)))
    config = diffusers_config(attention_head_dim=16, num_attention_heads=4, num_layers=1)
    names = [f"transformer_blocks.0.attn1.to_{part}" for part in "qkv"]
    # One factor for all three weights: scales per output channel are joined, scales of inputs not.
    layers = {name: made.float8(theirs[f"{name}.weight"])[0] for name in names}

    def read(scales, folder):
        held = {
            name: layers[name] | {"input_scale": np.array(scale, np.float32)}
            for name, scale in zip(names, scales, strict=True)
        }
        write_folder(tmp_path / folder, {}, config)
        path = tmp_path / folder / "diffusion_pytorch_model.safetensors"
        made.write(path, made.with_layers(theirs, held))
        return convert(tmp_path / folder)

    layer = read([0.5] * 3, "same").params["blocks_0"]["attn"]["qkv"]
    np.testing.assert_array_equal(layer["act_quant"].scale, [0.5])
    with pytest.raises(UserError, match=r"several of: scales of the input \(input_scale\);"):
        read([0.5, 0.5, 0.25], "other")
