"""Quantized files of others: codes and scales as stored, products as by hand, and what is refused."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import quantized_samples as made
from convert_samples import dit_shapes, flat, random_arrays

from qdit_convert import convert, read_model
from qdit_convert.bits import from_tiles, in_tiles, nibbles, packed_nibbles
from qdit_jax.errors import UserError
from qdit_jax.models import Linear
from qdit_jax.quant import ActSpec, QTensor, dequantize, integer_codes, scale_values

WIDTH = 64  # so that fc2, and fc2 alone, has 256 input channels
PATHS = {
    "blocks.0.attn.qkv": "blocks_0/attn/qkv",
    "blocks.0.mlp.fc2": "blocks_0/mlp/fc2",
    "blocks.1.adaLN_modulation.1": "blocks_1/adaLN_modulation",
}
FORMATS = {
    "int8_tensorwise": lambda w: made.int8(w),
    "int8 rotated": lambda w: made.int8(w, 256),
    "int8 rotated in 64": lambda w: made.int8(w, 64),
    "int8 of one scale": lambda w: made.int8(w, per_row=False),
    "float8_e4m3fn": lambda w: made.float8(w),
    "float8_e5m2": lambda w: made.float8(w, ml_dtypes.float8_e5m2),
    "nvfp4": made.nvfp4,
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
        step = np.abs(x).max(axis=1, keepdims=True) / 127
        return np.rint(x / step) * step
    values = act.fmt.values().astype(np.float64)
    values = np.where(np.isfinite(values), values, 0)
    size = act.group_size or x.shape[1]
    groups = x.reshape(len(x), -1, size)
    step = np.abs(groups).max(axis=2, keepdims=True) / values.max()
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
