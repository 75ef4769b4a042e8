"""`qdit export --format`: what is written is read back bit for bit, and what does not fit is named."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
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

import qdit_jax as qdit
from qdit_convert import comfy_writing, convert, export, flux, read_model
from qdit_convert.comfy_writing import Layer
from qdit_convert.safetensors_file import read_safetensors
from qdit_jax.checkpoint import Checkpoint, load, save
from qdit_jax.cli import main
from qdit_jax.errors import UserError
from qdit_jax.models import build_model
from qdit_jax.quant import (
    ActQuant,
    ActSpec,
    InputMap,
    LowRank,
    Rotation,
    WeightSpec,
    dequantize,
    formats,
    from_codes,
    integer_codes,
    quantize_array,
)
from qdit_jax.recipes import LayerSpec, Recipe, Rule

WIDTH = 64


@pytest.fixture(scope="module")
def arrays():
    return random_arrays(dit_shapes(WIDTH))


@pytest.fixture(scope="module")
def network(arrays, tmp_path_factory):
    """Returns a small DiT in full precision."""
    path = made.write(tmp_path_factory.mktemp("dit") / "model.safetensors", arrays)
    return convert(path, num_heads=4)


def of(weight=None, act=None):
    return Recipe((Rule(".*/attn/.*|.*/fc[12]", LayerSpec(weight, act)),))


def stored_in(path):
    """Returns the tensors of a safetensors file."""
    return {key: tensor.read() for key, tensor in read_safetensors(path).items()}


NAMES = ("blocks.0.attn.qkv", "blocks.1.mlp.fc2", "final_layer.linear")
STORED = {
    "int8_tensorwise": lambda w: made.int8(w, 256),
    "int8_tensorwise rotated": lambda w: made.int8(w, 64),
    "asym_w4a8_int8": lambda w: made.lut(w, 64),
    "nvfp4": made.nvfp4,
}


@pytest.mark.parametrize("case", STORED)
def test_what_was_read_is_written_bit_for_bit(case, arrays, tmp_path):
    name = case.split()[0]
    layers = {key: STORED[case](arrays[f"{key}.weight"])[0] for key in NAMES}
    stored = made.with_layers(arrays, layers)
    source, out = made.write(tmp_path / "theirs.safetensors", stored), tmp_path / "ours.safetensors"
    written = export(convert(source, num_heads=4), out, format=name)
    assert (written.quantized, written.kept) == (3, len(arrays) - 3)
    found = stored_in(out)
    assert set(found) == set(stored)
    for key, array in stored.items():
        if key.endswith("comfy_quant"):
            said, expected = (json.loads(a.tobytes()) for a in (found[key], array))
            if said.get("convrot_groupsize") != expected.get("convrot_groupsize"):
                # Of a layer that is not rotated: 256 does not divide its channels.
                assert key != "blocks.1.mlp.fc2.comfy_quant"
                del expected["convrot"], expected["convrot_groupsize"]
            assert said == expected
        else:
            np.testing.assert_array_equal(found[key].view(np.uint8), array.view(np.uint8), key)
            assert found[key].shape == array.shape


def test_our_own_quantization_is_read_back_with_its_rotations(network, tmp_path):
    recipe = of(WeightSpec(8, 0, True), ActSpec(8, 0, True))
    quantized = qdit.quantize(network, "convrot", recipe)
    out = tmp_path / "out.safetensors"
    assert export(quantized, out, format="int8_tensorwise").quantized == 8
    again = convert(out, num_heads=4)
    ours, theirs = flat(quantized.params), flat(again.params)
    assert set(ours) == set(theirs)
    assert theirs["blocks_1/mlp/fc2/rotation"].size == 256
    assert jax.tree.structure(quantized.params) == jax.tree.structure(again.params)
    jax.tree.map(np.testing.assert_array_equal, quantized.params, again.params)
    marker = json.loads(stored_in(out)["blocks.0.attn.qkv.comfy_quant"].tobytes())
    assert marker == {
        "format": "int8_tensorwise",
        "per_row": True,
        "convrot": True,
        "convrot_groupsize": 64,
    }


def test_an_input_in_full_precision_is_said_by_the_marker():
    kernel = quantize_array(jnp.ones((16, 4)), WeightSpec(8, 0, True))
    marker = comfy_writing.written(Layer("a", kernel, {}), "int8_tensorwise")["comfy_quant"]
    assert json.loads(marker.tobytes())["full_precision_matrix_mult"] is True


INT8, NVFP4 = WeightSpec(8, 0, True), WeightSpec(fmt=formats.nvfp4)
PLAIN = ActQuant(ActSpec(8, 0, True))
UNFIT = {
    "groups of weights": (
        *("int8_tensorwise", WeightSpec(8, 16, True), {"act_quant": PLAIN}),
        r"blocks_0/attn/qkv has symmetric int8 weights in groups of 16, not a scale per output "
        "channel, which the format int8_tensorwise cannot hold; quantize again to fit it .*w8a8-fast",
    ),
    "asymmetric weights": (
        *("int8_tensorwise", WeightSpec(8, 0), {"act_quant": PLAIN}),
        "asymmetric int8 weights per channel, not symmetric integers of 8 bits",
    ),
    "groups of inputs": (
        *("int8_tensorwise", INT8, {"act_quant": ActQuant(ActSpec(8, 16, True))}),
        "quantizes its input to 8 bits, symmetric, dynamic, in groups of 16",
    ),
    "asymmetric inputs": (
        *("int8_tensorwise", INT8, {"act_quant": ActQuant(ActSpec(8, 0))}),
        "quantizes its input to 8 bits, asymmetric, dynamic, per token",
    ),
    "static inputs": (
        *("int8_tensorwise", INT8, {"act_quant": ActQuant(ActSpec(8, 0, True, mode="static"))}),
        "8 bits, symmetric, static, per token",
    ),
    "another rotation": (
        *("int8_tensorwise", INT8, {"rotation": Rotation("hadamard", 4, jnp.ones(64))}),
        "rotates its input by a hadamard matrix, not a regular one",
    ),
    "scales of the input": (
        *("int8_tensorwise", INT8, {"input_map": InputMap(jnp.ones(64))}),
        "scales or shifts its input",
    ),
    "a branch": (
        *("int8_tensorwise", INT8, {"low_rank": LowRank(jnp.ones((64, 1)), jnp.ones((1, 8)))}),
        "has a 16-bit branch",
    ),
    "no codebook": ("asym_w4a8_int8", INT8, {}, r"not a codebook \(lut4_e4m3\)"),
    "a rotation": (
        *("nvfp4", NVFP4, {"rotation": Rotation("regular", 64)}),
        "rotates its input, which the format nvfp4 cannot hold",
    ),
    "inputs of int8": (
        *("nvfp4", NVFP4, {"act_quant": PLAIN}),
        "quantizes its input to 8 bits, symmetric",
    ),
    "another format": ("nvfp4", INT8, {}, "symmetric int8 weights per channel, not NVFP4"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_layer_that_does_not_fit_is_named(case):
    name, spec, beside, message = UNFIT[case]
    kernel = quantize_array(jax.random.normal(jax.random.key(0), (64, 8)), spec)
    with pytest.raises(UserError, match=message):
        comfy_writing.written(Layer("blocks_0/attn/qkv", kernel, beside), name)


def test_codebooks_need_a_rotation_and_steps_that_e4m3_holds():
    spec = WeightSpec(group_size=16, fmt=formats.lut4)
    codes = jnp.zeros((64, 8), jnp.uint8)
    more = {"channel_scale": jnp.ones(8), "codebook": jnp.linspace(-1, 1, 16)}

    def layer(step, beside):
        q = from_codes(codes, jnp.full((4, 8), step, jnp.uint8), None, spec)
        return Layer("qkv", dataclasses.replace(q, **more), beside)

    turn = {"rotation": Rotation("regular", 64)}
    found = comfy_writing.written(layer(18, turn), "asym_w4a8_int8")
    assert (found["weight_s_rel"].astype(np.float32) == 18).all()
    with pytest.raises(UserError, match="qkv does not rotate its input"):
        comfy_writing.written(layer(18, {}), "asym_w4a8_int8")
    with pytest.raises(UserError, match="qkv has whole steps of levels that E4M3 does not hold"):
        comfy_writing.written(layer(17, turn), "asym_w4a8_int8")


def test_a_checkpoint_without_such_weights_or_names_is_refused(network, tmp_path):
    out = tmp_path / "out.safetensors"
    with pytest.raises(UserError, match="no quantized weights to write in the format nvfp4"):
        export(network, out, format="nvfp4")
    with pytest.raises(UserError, match="format='gguf' is not known; use one of int8_tensorwise"):
        export(network, out, format="gguf")
    from_diffusers = dataclasses.replace(network, model=network.model.clone(frequency_shift=1))
    with pytest.raises(UserError, match=r"frequency_shift=1, .*they would compute something else"):
        export(from_diffusers, out, format="int8_tensorwise")
    inputs = qdit.quantize(network, "rtn", of(None, ActSpec(8, 0, True)))
    with pytest.raises(
        UserError, match=r"has blocks_0/attn/proj/act_quant \(ActQuant\), for which"
    ):
        export(inputs, out, format="int8_tensorwise")
    pixart = build_model("vae", {})
    with pytest.raises(
        UserError,
        match=r"family vae cannot be written .*; those of dit, sit, latte, pixart, .* can",
    ):
        export(Checkpoint(pixart, {}), out, format="int8_tensorwise")


def test_the_verb_writes_and_replaces_only_its_own(network, tmp_path, capsys):
    folder, out = tmp_path / "w8a8", tmp_path / "comfy.safetensors"
    save(folder, qdit.quantize(network, "rtn", "w8a8-fast"))
    command = ["export", str(folder), str(out), "--format", "int8_tensorwise"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "DiT in the facebook layout, 8 weights in int8_tensorwise, 24 tensors as they" in printed
    assert main(command) != 0
    assert "exists already" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0
    foreign = made.write(tmp_path / "foreign.safetensors", {"a.weight": np.zeros(2)})
    assert main([*command[:2], str(foreign), *command[3:], "--force"]) != 0
    assert "not weights that qdit export wrote" in capsys.readouterr().err
    assert main([*command[:2], str(tmp_path / "folder"), *command[3:]]) != 0
    assert "must be a .safetensors file" in capsys.readouterr().err
    assert main(["convert", str(out), str(tmp_path / "again"), "--num-heads", "4"]) == 0
    assert load(tmp_path / "again").recipe is not None


@pytest.fixture(scope="module")
def narrow():
    """Returns a DiT of one block of width 64 in diffusers' names, where q, k and v are apart."""
    facebook = random_arrays(dit_shapes(WIDTH, depth=1))
    config = diffusers_config(attention_head_dim=16, num_attention_heads=4, num_layers=1)
    return facebook, diffusers_arrays(facebook), config


def parts_of(name):
    return [f"transformer_blocks.0.attn1.to_{part}" for part in name]


def joined(tmp_path, narrow, layers):
    """Returns the kernel that q, k and v become."""
    _, arrays, config = narrow
    folder = tmp_path / "joined"
    write_folder(folder, {}, config)
    file = folder / "diffusion_pytorch_model.safetensors"
    made.write(file, made.with_layers(arrays, layers))
    return flat(convert(folder).params)["blocks_0/attn/qkv/kernel"]


def test_tensors_that_are_one_layer_are_joined_along_the_output_channels(narrow, tmp_path):
    _, arrays, _ = narrow
    both = {name: made.int8(arrays[f"{name}.weight"], 64) for name in parts_of("qkv")}
    q = joined(tmp_path, narrow, {name: parts for name, (parts, _) in both.items()})
    codes = np.concatenate([parts["weight"] for parts, _ in both.values()])
    np.testing.assert_array_equal(np.asarray(integer_codes(q)).astype(int) - 128, codes.T)
    whole = np.concatenate([made.turned(weight, 64) for _, weight in both.values()])
    np.testing.assert_allclose(dequantize(q), whole.T, atol=1e-7)


@pytest.mark.parametrize(
    ("format_fn", "names", "message"),
    [
        (made.nvfp4, "qkv", r"to_v\.weight are one layer here, .*: scales of the whole tensor;"),
        (
            made.int8,
            "qk",
            r"to_q\.weight is stored quantized .* and .*to_v\.weight is not, but both",
        ),
    ],
)
def test_tensors_that_one_kernel_cannot_hold_are_refused(
    format_fn, names, message, narrow, tmp_path
):
    _, arrays, _ = narrow
    layers = {name: format_fn(arrays[f"{name}.weight"])[0] for name in parts_of(names)}
    with pytest.raises(UserError, match=message):
        joined(tmp_path, narrow, layers)


def flux_arrays(example):
    shapes = {key: sizes[0] for leaf in example.leaves for key, sizes in leaf.expected.items()}
    return random_arrays(shapes)


def test_a_flux_is_read_and_written_in_its_authors_names(tmp_path):
    example = flux.original_example()
    arrays = flux_arrays(example)
    kernels = [
        key.removesuffix(".weight") for key in arrays if "blocks." in key and ".norm." not in key
    ]
    kernels = [
        key for key in kernels if key.endswith((".qkv", ".proj", ".0", "linear1", "linear2"))
    ]
    both = {key: made.int8(arrays[f"{key}.weight"], 16) for key in kernels}
    stored = made.with_layers(arrays, {key: parts for key, (parts, _) in both.items()})
    prefixed = {f"model.diffusion_model.{key}": array for key, array in stored.items()}
    source = made.write(tmp_path / "theirs.safetensors", prefixed)
    checkpoint = convert(source, **example.choices)
    kernel = flat(checkpoint.params)["single_blocks_1/linear1/kernel"]
    weight = made.turned(both["single_blocks.1.linear1"][1], 16)
    np.testing.assert_allclose(dequantize(kernel), weight.T, atol=1e-7)
    out = tmp_path / "ours.safetensors"
    written = export(checkpoint, out, format="int8_tensorwise")
    assert (written.layout, written.quantized) == (
        "FLUX in the Black Forest Labs layout",
        len(kernels),
    )
    found = stored_in(out)
    assert set(found) == set(stored)
    for key, array in stored.items():
        if not key.endswith("comfy_quant"):
            np.testing.assert_array_equal(found[key], array, key)


def test_rows_that_a_layout_exchanges_are_exchanged_in_quantized_weights_too(tmp_path):
    example = flux.diffusers_example()
    arrays = flux_arrays(example)
    names = ("norm_out.linear", "single_transformer_blocks.0.proj_mlp")
    names += tuple(f"single_transformer_blocks.0.attn.to_{part}" for part in "qkv")
    both = {name: made.int8(arrays[f"{name}.weight"]) for name in names}
    decoded = {f"{name}.weight": w.astype(np.float32) for name, (_, w) in both.items()}
    files = {
        "plain": arrays | decoded,
        "quantized": made.with_layers(arrays, {name: parts for name, (parts, _) in both.items()}),
    }
    read = {}
    for kind, tensors in files.items():
        folder = write_folder(tmp_path / kind, {}, example.config)
        made.write(folder / "diffusion_pytorch_model.safetensors", tensors)
        read[kind] = flat(read_model(folder, **example.choices).params)
    for path in ("final_layer/adaLN_modulation", "single_blocks_0/linear1"):
        kernel = dequantize(read["quantized"][f"{path}/kernel"])
        np.testing.assert_allclose(kernel, read["plain"][f"{path}/kernel"], rtol=1e-6)
