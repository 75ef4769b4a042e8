"""Weight-only layers of diffusers' `nunchaku_lite`: where codes lie, zeros that are no whole codes."""

from __future__ import annotations

import argparse

import jax
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
from safetensors.numpy import save_file
from test_nunchaku import layer as svdq
from test_nunchaku import smooth_factor

from qdit_convert import convert
from qdit_convert.joint import swapped_linear
from qdit_convert.nunchaku_awq import codes_of, read, stored_kernel
from qdit_convert.quantized import row_order
from qdit_convert.stored_layer import StoredLayer
from qdit_convert.tensors import StoredTensor
from qdit_jax.checkpoint import load
from qdit_jax.cli import convert as verb
from qdit_jax.errors import UserError
from qdit_jax.kernels import implementations_used
from qdit_jax.models import Linear
from qdit_jax.quant import integer_codes, scale_values

WIDTH = 128
MODULATION = "transformer_blocks.0.norm1.linear"
PROJ = "transformer_blocks.0.attn1.to_out.0"
BF16 = ml_dtypes.bfloat16


def packed(codes):
    """Returns the words in which codes `[N, K]` lie, put there one by one.

    Output channel n and input channel k = 64 g + c: row n // 4; in it, 32 words per group, 8 per output
    channel; of these, the bits 32, 4 and 2 of c choose one, and 1, 16 and 8 the four bits in it.
    """
    rows, columns = codes.shape
    words = np.zeros((rows // 4, columns // 2), np.uint32)
    for n in range(rows):
        for k in range(columns):
            c = k % 64
            word = k // 64 * 32 + n % 4 * 8 + c // 32 * 4 + c % 8 // 2
            place = c % 2 * 4 + c % 32 // 8
            words[n // 4, word] |= np.uint32(codes[n, k]) << np.uint32(4 * place)
    return words.view(np.int32)


def layer(w, zero, dtype=BF16):
    """Returns a layer's tensors for a weight `[N, K]`, and the float64 weight that they stand for.

    Args:
        zero: `"seven"` for the zeros that the format's writer makes, `"any"` for arbitrary ones.
    """
    rng = np.random.default_rng(5)
    groups = w.astype(np.float64).reshape(len(w), -1, 64)
    scale = (np.abs(groups).max(axis=2) / 7).astype(dtype)
    if zero == "any":
        scale[0] = 0
    step = scale.astype(np.float64)
    exact = -7 * step if zero == "seven" else rng.uniform(-17, 3, step.shape) * step
    zeros = exact.astype(dtype)
    safe = np.where(step > 0, step, 1)[..., None]
    codes = np.clip(np.rint((groups - zeros.astype(np.float64)[..., None]) / safe), 0, 15)
    weight = codes * step[..., None] + zeros.astype(np.float64)[..., None]
    codes = codes.astype(np.uint8).reshape(w.shape)
    parts = {
        "qweight": packed(codes),
        "wscales": np.ascontiguousarray(scale.T),
        "wzeros": np.ascontiguousarray(zeros.T),
    }
    return parts, codes, weight.reshape(w.shape)


def stored(parts):
    tensors = {
        name: StoredTensor(values.shape, values.dtype, lambda values=values: values)
        for name, values in parts.items()
    }
    return StoredLayer(MODULATION, {}, tensors)


def function_of(kernel):
    """Returns the float64 weight `[N, K]` of a kernel and its branch."""
    zero = np.repeat(kernel.zero_point.astype(np.float64), 64, axis=1)
    weight = (kernel.codes - zero) * np.repeat(kernel.scale.astype(np.float64), 64, axis=1)
    if kernel.down is None:
        return weight
    return weight + (kernel.down.astype(np.float64) @ kernel.up.astype(np.float64)).T


@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32])
@pytest.mark.parametrize("zero", ["seven", "any"])
def test_a_kernel_and_its_branch_are_the_weight_exactly(zero, dtype):
    w = np.random.default_rng(0).standard_normal((12, 128)).astype(np.float32)
    parts, codes, weight = layer(w, zero, dtype)
    np.testing.assert_array_equal(codes_of(parts["qweight"]), codes)
    shape, found = stored_kernel(stored(parts))
    kernel = found.read()
    assert (shape, found.format, kernel.act) == ((12, 128), "awq_w4a16", None)
    np.testing.assert_array_equal(kernel.codes, codes)
    np.testing.assert_array_equal(kernel.scale, parts["wscales"].T.astype(np.float32))
    scale = np.abs(weight).max()
    np.testing.assert_allclose(function_of(kernel), weight, atol=1e-7 * scale, rtol=0)
    if zero == "seven":  # what -7 scales lose in the file's dtype is all that is left to the branch
        assert np.array_equal(kernel.zero_point, np.full_like(kernel.zero_point, 7))
        assert kernel.down is None or np.abs(kernel.up.astype(float)).max() < 0.03 * scale
    order = row_order(swapped_linear, 12)
    np.testing.assert_array_equal(order, [*range(6, 12), *range(6)])
    np.testing.assert_allclose(function_of(kernel.rows(order)), weight[order], atol=1e-7 * scale)


def test_whole_zeros_need_no_branch():
    w = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    parts, codes, _ = layer(w, "seven")
    parts["wzeros"] = (-8 * parts["wscales"].astype(np.float32)).astype(BF16)  # exact
    kernel = read(stored(parts))
    assert kernel.down is None
    assert np.array_equal(kernel.zero_point, [[8]] * 4)
    expected = (codes - 8.0) * parts["wscales"].T.astype(np.float64)
    np.testing.assert_array_equal(function_of(kernel), expected)


@pytest.fixture(scope="module")
def network():
    arrays = diffusers_arrays(random_arrays(dit_shapes(WIDTH, depth=1)))
    said = {
        "quant_method": "nunchaku_lite",
        "awq_w4a16": {"precision": "int4", "group_size": 64, "targets": [MODULATION]},
    }
    config = diffusers_config(
        attention_head_dim=32, num_attention_heads=4, num_layers=1, quantization_config=said
    )
    return arrays, config


def written(folder, arrays, config, metadata=None):
    write_folder(folder, {}, config)
    save_file(arrays, folder / "diffusion_pytorch_model.safetensors", metadata=metadata)
    return folder


@pytest.mark.parametrize("zero", ["seven", "any"])
def test_a_layer_is_a_float_product_of_what_the_file_says(zero, network, tmp_path):
    arrays, config = network
    parts, codes, weight = layer(arrays[f"{MODULATION}.weight"], zero)
    bias = arrays[f"{MODULATION}.bias"].astype(BF16)
    found = convert(
        written(
            tmp_path / "in", made.with_layers(arrays, {MODULATION: parts | {"bias": bias}}), config
        )
    )
    ours = found.params["blocks_0"]["adaLN_modulation"]
    np.testing.assert_array_equal(integer_codes(ours["kernel"]), codes.T)
    np.testing.assert_array_equal(scale_values(ours["kernel"]), parts["wscales"].astype(np.float32))
    np.testing.assert_array_equal(ours["bias"], bias.astype(np.float32))  # not permuted
    assert "act_quant" not in ours
    x = np.random.default_rng(2).standard_normal((6, WIDTH)).astype(np.float32)
    expected = x.astype(np.float64) @ weight.T + bias.astype(np.float64)
    for numerics in ("simulated", "integer"):
        layers = Linear(6 * WIDTH, numerics=numerics)
        y = layers.apply({"params": ours}, jnp.asarray(x))
        np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
    half = Linear(6 * WIDTH, dtype="bfloat16").apply({"params": ours}, jnp.asarray(x))
    np.testing.assert_allclose(half, expected, atol=0.02 * np.abs(expected).max(), rtol=0)


def test_a_network_with_both_kinds_of_layers_runs_in_both_numerics(network, tmp_path, capsys):
    arrays, config = network
    kinds = {
        MODULATION: layer(arrays[f"{MODULATION}.weight"], "seven")[0]
        | {"bias": arrays[f"{MODULATION}.bias"].astype(BF16)},
        PROJ: svdq(arrays[f"{PROJ}.weight"], arrays[f"{PROJ}.bias"], smooth_factor(), False)[0],
    }
    bare = {k: v for k, v in arrays.items() if k.removesuffix(".bias") not in kinds}
    written(tmp_path / "in", made.with_layers(bare, kinds), config)
    parser = argparse.ArgumentParser()
    verb.add_parser(parser.add_subparsers(dest="verb"))
    args = parser.parse_args(["convert", str(tmp_path / "in"), str(tmp_path / "out")])
    args.run(args)
    printed = capsys.readouterr().out
    assert "1 weights stored as awq_w4a16 kept bit for bit" in printed
    checkpoint = load(tmp_path / "out")
    spec = checkpoint.recipe.resolve(checkpoint.params)["blocks_0/adaLN_modulation"]
    assert (spec.weight.bits, spec.weight.symmetric, spec.act) == (4, False, None)
    args = (
        jax.random.normal(jax.random.key(0), (2, 4, 4, 4)),
        jnp.array([0, 900]),
        jnp.array([1, 2]),
    )
    simulated, integer = (
        np.asarray(checkpoint.model.clone(numerics=one).apply({"params": checkpoint.params}, *args))
        for one in ("simulated", "integer")
    )
    np.testing.assert_allclose(integer, simulated, atol=1e-5 * np.abs(simulated).max(), rtol=0)
    used = implementations_used(checkpoint.params, "integer", dtype="float32")
    assert sum(used.values()) == 2


MISTAKES = {
    "no scales": ({"wscales": None}, r"missing: .*linear\.wscales, which the format awq_w4a16 has"),
    "an odd width": (
        {"qweight": np.zeros((192, 20), np.int32)},
        r"qweight has shape \[192, 20\]; layers of awq_w4a16 have .* a multiple of 64",
    ),
    "bytes": ({"qweight": np.zeros((192, 64), np.int8)}, "qweight is int8; expected int32 or"),
    "groups": (
        {"wzeros": np.zeros((1, 768), BF16)},
        r"wzeros \(found \[1, 768\], expected \[2, 768",
    ),
    "NaN": ({"wzeros": np.full((2, 768), np.nan, BF16)}, "wzeros are not finite: nan"),
    "negative": ({"wscales": np.full((2, 768), -1, BF16)}, "wscales are not scales: -1"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_is_not_understood_is_refused_by_name(case, network, tmp_path):
    changes, message = MISTAKES[case]
    arrays, config = network
    parts, _, _ = layer(arrays[f"{MODULATION}.weight"], "seven")
    parts = {k: v for k, v in {**parts, **changes}.items() if v is not None}
    with pytest.raises(UserError, match=message):
        convert(written(tmp_path / "in", made.with_layers(arrays, {MODULATION: parts}), config))


def test_another_order_of_modulations_and_other_groups_are_refused(network, tmp_path):
    arrays, config = network
    parts, _, _ = layer(arrays[f"{MODULATION}.weight"], "seven")
    whole = made.with_layers(arrays, {MODULATION: parts})
    said = {"quantization_config": '{"targets": [{"nunchaku_op": "adanorm_awq_w4a16"}]}'}
    with pytest.raises(
        UserError, match="says adanorm_awq_w4a16: its modulations lie in the order of"
    ):
        convert(written(tmp_path / "own", whole, config, said))
    groups = {"quant_method": "nunchaku_lite", "awq_w4a16": {"group_size": 128}}
    with pytest.raises(UserError, match="group_size=128 of awq_w4a16; convert reads groups of 64"):
        convert(written(tmp_path / "groups", whole, {**config, "quantization_config": groups}))
