"""Layers of diffusers' `nunchaku_lite`: the order of their tensors, their branch and smooth factor."""

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
    flat,
    random_arrays,
    write_folder,
)

from qdit_convert import convert
from qdit_jax.errors import UserError
from qdit_jax.models import Linear
from qdit_jax.quant import dequantize

WIDTH, RANK = 128, 16
BLOCK = "transformer_blocks.0"
BF16 = ml_dtypes.bfloat16


def code_places(rows, columns):
    """Returns where the code of row n, column k lies among the codes of the file, `[N, K]`.

    In tiles of 128 rows and 64 columns: the bits of n and k are in the order 16s of n, units of n, 8s of
    k, the 8 of n, the 32 of k, units of k.
    """
    n, k = np.arange(rows)[:, None], np.arange(columns)
    tile = n // 128 * (columns // 64) + k // 64
    inside = n % 128 // 16 * 8 + n % 8
    inside = (inside * 4 + k % 32 // 8) * 2 + n % 16 // 8
    inside = (inside * 2 + k % 64 // 32) * 8 + k % 8
    return tile * 128 * 64 + inside


def vector_places(count):
    """Returns where channel n lies: the bits 16s, 2s, 8, unit of n."""
    n = np.arange(count)
    return n // 128 * 128 + ((n % 128 // 16 * 4 + n % 8 // 2) * 2 + n % 16 // 8) * 2 + n % 2


def branch_places(channels, rank, down):
    """Returns where channel c, rank r lies, `[C, R]`: tiles of 16, in which down has the rank first."""
    c, r = np.arange(channels)[:, None], np.arange(rank)
    first, second = (r, c) if down else (c, r)
    first, second = first % 16, second % 16
    inside = ((first % 8 * 4 + second % 8 // 2) * 2 + first // 8) * 2 + second // 8
    return (c // 16 * (rank // 16) + r // 16) * 256 + inside * 2 + second % 2


def placed(values, places, shape):
    out = np.empty(values.size, values.dtype)
    out[places.reshape(-1)] = values.reshape(-1)
    return out.reshape(shape)


def packed_codes(codes):
    rows, columns = codes.shape
    flat_codes = placed(codes.astype(np.uint8), code_places(rows, columns), (-1,))
    return (flat_codes[::2] | flat_codes[1::2] << 4).reshape(rows, columns // 2).view(np.int8)


def packed_scales(scale, fp4):
    rows, count = scale.shape
    n, g = np.arange(rows)[:, None], np.arange(count)
    if fp4:  # bits: 4s of g, units of n (8), 8s of n (4), 32s of n (4), units of g
        tile = n // 128 * (count // 4) + g // 4
        inside = ((n % 8 * 4 + n % 32 // 8) * 4 + n % 128 // 32) * 4 + g % 4
        return placed(scale, tile * 512 + inside, (count, rows))
    vector = vector_places(rows) % 128
    return placed(scale, n // 128 * count * 128 + g * 128 + vector[:, None], (count, rows))


def layer(w, bias, smooth, fp4, seed=0):
    """Returns a layer's tensors, and the float64 function that they stand for."""
    rng = np.random.default_rng(seed)
    rows, columns = w.shape
    down = rng.standard_normal((columns, RANK)).astype(BF16)
    up = (0.02 * rng.standard_normal((rows, RANK))).astype(BF16)
    size = 16 if fp4 else 64
    groups = (w.astype(np.float64) * smooth.astype(np.float64)).reshape(rows, -1, size)
    absmax = np.abs(groups).max(axis=2)
    if fp4:
        factor = np.float32(absmax.max() / 6 / 448).astype(BF16)
        scale = (absmax / 6 / np.float64(factor)).astype(np.float32).astype(made.E4M3)
        step = scale.astype(np.float64)[..., None] * np.float64(factor)
        codes = np.abs(groups[..., None] / step[..., None] - made.FP4).argmin(axis=-1)
        values = made.FP4[codes] * step
        more = {"wcscales": np.ones(rows, BF16), "wtscale": factor.reshape(1)}
    else:
        scale = (absmax / 7).astype(BF16)
        step = scale.astype(np.float64)[..., None]
        codes = np.clip(np.rint(groups / step), -8, 7).astype(int)
        values, codes, more = codes * step, codes & 15, {}
    stored_bias = bias.astype(BF16)
    parts = {
        "qweight": packed_codes(codes.reshape(rows, columns)),
        "wscales": packed_scales(scale, fp4),
        "smooth_factor": placed(smooth, vector_places(columns), (-1,)),
        "proj_down": placed(down, branch_places(columns, RANK, True), down.shape),
        "proj_up": placed(up, branch_places(rows, RANK, False), up.shape),
        "bias": placed(stored_bias, vector_places(rows), (-1,)),
        **more,
    }
    weight = values.reshape(rows, columns)

    def function(x, rounded):
        branch = x @ down.astype(np.float64) @ up.astype(np.float64).T
        inputs = rounded(x / smooth.astype(np.float64))
        return inputs @ weight.T + branch + stored_bias.astype(np.float64)

    return parts, weight, function


def in_groups(x):
    groups = x.reshape(len(x), -1, 64)
    step = np.abs(groups).max(axis=2, keepdims=True) / 7
    return (np.rint(groups / step) * step).reshape(x.shape)


@pytest.fixture(scope="module")
def network():
    arrays = diffusers_arrays(random_arrays(dit_shapes(WIDTH, depth=1)))
    said = {"quant_method": "nunchaku_lite", "svdq_w4a4": {"precision": "int4", "rank": RANK}}
    config = diffusers_config(
        attention_head_dim=32, num_attention_heads=4, num_layers=1, quantization_config=said
    )
    return arrays, config


def with_layers(arrays, layers):
    bare = {k: v for k, v in arrays.items() if k.removesuffix(".bias") not in layers}
    return made.with_layers(bare, layers)


def read(tmp_path, arrays, config):
    folder = tmp_path / "network"
    write_folder(folder, {}, config)
    made.write(folder / "diffusion_pytorch_model.safetensors", arrays)
    return convert(folder)


def smooth_factor(seed=1):
    return np.random.default_rng(seed).uniform(0.5, 2, WIDTH).astype(BF16)


@pytest.mark.parametrize("fp4", [False, True], ids=["int4", "nvfp4"])
def test_a_layer_computes_what_its_tensors_stand_for(fp4, network, tmp_path):
    arrays, config = network
    name = f"{BLOCK}.attn1.to_out.0"
    w, bias = (arrays[f"{name}.{part}"] for part in ("weight", "bias"))
    parts, weight, function = layer(w, bias, smooth_factor(), fp4)
    found = read(tmp_path, with_layers(arrays, {name: parts}), config)
    ours = found.params["blocks_0"]["attn"]["proj"]
    np.testing.assert_allclose(dequantize(ours["kernel"]), weight.T, atol=1e-6)
    assert ours["act_quant"].spec.group_size == (16 if fp4 else 64)
    assert found.metadata["quantized"] == [f"svdq_w4a4 {'nvfp4' if fp4 else 'int4'}"]
    x = np.random.default_rng(2).standard_normal((6, WIDTH))
    quantizer = ours["act_quant"]

    def by_format(values):
        return np.asarray(quantizer(jnp.asarray(values, jnp.float32)), np.float64)

    expected = function(x, by_format if fp4 else in_groups)
    for numerics in ("simulated", "integer"):
        y = Linear(WIDTH, numerics=numerics).apply({"params": ours}, jnp.asarray(x, jnp.float32))
        np.testing.assert_allclose(y, expected, atol=2e-5 * np.abs(expected).max(), rtol=0)


def test_layers_with_one_smooth_factor_are_joined_with_their_branches(network, tmp_path):
    arrays, config = network
    names = [f"{BLOCK}.attn1.to_{part}" for part in "qkv"]
    smooth = smooth_factor()
    made_layers = [
        layer(arrays[f"{n}.weight"], arrays[f"{n}.bias"], smooth, False, seed)
        for seed, n in enumerate(names)
    ]
    layers = {n: parts for n, (parts, _, _) in zip(names, made_layers, strict=True)}
    found = read(tmp_path, with_layers(arrays, layers), config)
    ours = found.params["blocks_0"]["attn"]["qkv"]
    x = np.random.default_rng(2).standard_normal((6, WIDTH))
    expected = np.concatenate([function(x, in_groups) for _, _, function in made_layers], axis=1)
    y = Linear(3 * WIDTH).apply({"params": ours}, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y, expected, atol=2e-5 * np.abs(expected).max(), rtol=0)
    other = layer(arrays[f"{names[0]}.weight"], arrays[f"{names[0]}.bias"], smooth_factor(9), False)
    layers[names[0]] = other[0]
    with pytest.raises(UserError, match=r"to_v\.weight are one layer here, .*: smooth factors;"):
        read(tmp_path, with_layers(arrays, layers), config)


MISTAKES = {
    "a missing branch": ({"proj_up": None}, r"missing: .*to_out\.0\.proj_up"),
    "channels that are padded": (
        {"qweight": np.zeros((120, 64), np.int8)},
        r"qweight has shape \[120, 64\]; layers of svdq_w4a4 have multiples of 128",
    ),
    "its own files": ({"lora_down": np.zeros(2, BF16)}, "is of Nunchaku's own files"),
    "NaN": (
        {"smooth_factor": np.full(WIDTH, np.nan, BF16)},
        r"128 of 128 values of .*smooth_factor are not scales: nan",
    ),
    "scales per channel": (
        {"wcscales": np.full(WIDTH, 2, BF16)},
        r"wcscales holds scales per output channel \(2\.0 to 2\.0\)",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_is_not_understood_is_refused_by_name(case, network, tmp_path):
    changes, message = MISTAKES[case]
    arrays, config = network
    name = f"{BLOCK}.attn1.to_out.0"
    w, bias = (arrays[f"{name}.{part}"] for part in ("weight", "bias"))
    parts, _, _ = layer(w, bias, smooth_factor(), True)
    parts = {k: v for k, v in {**parts, **changes}.items() if v is not None}
    with pytest.raises(UserError, match=message):
        read(tmp_path, with_layers(arrays, {name: parts}), config)


def test_another_quantizer_in_config_json_is_refused(network, tmp_path):
    arrays, config = network
    said = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(UserError, match="quantized by 'bitsandbytes', which convert does not read"):
        read(tmp_path, arrays, {**config, "quantization_config": said})
    assert "blocks_0/attn/qkv/kernel" in flat(read(tmp_path, arrays, config).params)
