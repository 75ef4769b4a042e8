"""`qdit quantize`: roundings, ranges, parts and activation modes, as a person asks for them."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os

import jax
import numpy as np
import pytest
from tiny_models import tiny_checkpoint

import qdit_jax as qdit
from qdit_jax.checkpoint import Checkpoint, load, save
from qdit_jax.cli import main
from qdit_jax.cli import quantize as verb
from qdit_jax.cli.quantize_options import PresetOptions, recipe_of
from qdit_jax.diffusion import ddim
from qdit_jax.files import locked
from qdit_jax.methods import METHODS, CalibrationData
from qdit_jax.ptq import ReconstructionSettings, reconstruction
from qdit_jax.ptq.unfinished import Unfinished
from qdit_jax.quant import QTensor, ranges
from qdit_jax.recipes import Recipe
from qdit_jax.sampling import generate
from qdit_jax.testing import realistic_dit

FEW = ["--num-samples", "4", "--steps", "4", "--group-size", "16"]


@pytest.fixture
def folder(tmp_path):
    model, params = realistic_dit(0, hidden_size=32, depth=1, num_heads=2)
    save(tmp_path / "model", Checkpoint(model, params))
    return tmp_path


def quantize(folder, *options):
    return main(["quantize", str(folder / "model"), str(folder / "out"), *options])


def test_gptq_prints_held_out_errors_and_writes_the_checkpoint(folder, capsys):
    options = ["--recipe", "w3a8", "--layers", "blocks_0/attn/qkv", "--method", "gptq", *FEW]
    assert quantize(folder, *options, "--range", "percentile:0.99") == 0
    printed = capsys.readouterr().out
    assert "outputs' signal to error, dB" in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("blocks_0/attn/qkv")]
    assert " -> " in line
    assert "measured on held-out inputs" in printed
    assert "note:" not in printed  # 24 items of 16 tokens for 32 channels
    out = load(folder / "out")
    assert isinstance(out.params["blocks_0"]["attn"]["qkv"]["kernel"], QTensor)
    assert out.metadata["quantization"]["method"] == "gptq"
    assert out.recipe.rules[0].spec.weight.range_fn == ranges.percentile(0.99)


def test_collected_inputs_serve_several_roundings(folder, capsys):
    items, model = str(folder / "items.npz"), str(folder / "model")
    few = ["--num-samples", "4", "--steps", "3"]
    assert main(["calibrate", model, items, "--collect", "qdit-release", *few]) == 0
    assert "4 inputs of 4 trajectories" in capsys.readouterr().out
    options = ["--recipe", "w4a16", "--layers", "final_layer/linear", "--group-size", "16"]
    assert quantize(folder, *options, "--rounding", "gptq", "--items", items) == 0
    assert "measured on held-out inputs" in capsys.readouterr().out
    assert quantize(folder, *options, "--rounding", "gptq", "--items", model, "--force") == 2
    assert "holds no calibration inputs" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["gptq-authors", "adaround"])
def test_other_roundings_write_a_checkpoint(folder, rounding, capsys):
    options = ["--recipe", "w4a8", "--rounding", rounding, "--adaln", "w4a16", *FEW]
    assert quantize(folder, *options) == 0
    printed = capsys.readouterr().out
    out = load(folder / "out")
    weight = out.recipe.rules[0].spec.weight
    if rounding == "gptq-authors":
        assert "nothing was held out" in printed
        assert "note: 64 inputs for the 128 channels of blocks_0/mlp/fc2" in printed
        assert weight.range_fn == ranges.qdit_release_gptq
        assert out.recipe.rules[0].spec.act.range_fn == ranges.qdit_release
    else:
        assert weight.range_fn == ranges.minmax
    assert isinstance(out.params["blocks_0"]["adaLN_modulation"]["kernel"], QTensor)


def test_parts_have_bits_of_their_own(folder, capsys):
    parts = ["--adaln", "w6a8", "--embedders", "w8a8", "--final", "w8a16", "--attention", "w16a8"]
    assert (
        quantize(folder, "--recipe", "w4a8", "--group-size", "16", "--method", "rtn", *parts) == 0
    )
    assert "10 layers" in capsys.readouterr().out
    params = load(folder / "out").params
    bits = {
        "blocks_0/attn/qkv": 4, "blocks_0/adaLN_modulation": 6, "final_layer/adaLN_modulation": 6,
        "x_embedder/proj": 8, "t_embedder/mlp_0": 8, "final_layer/linear": 8,
    }  # fmt: skip
    for path, expected in bits.items():
        layer = params
        for name in path.split("/"):
            layer = layer[name]
        assert layer["kernel"].bits == expected, path
        assert ("act_quant" in layer) == (path != "final_layer/linear"), path
    attention = params["blocks_0"]["attn"]
    assert {f"{name}_quant" for name in ("q", "k", "v", "softmax")} <= set(attention)


def test_static_per_timestep_survives_the_checkpoint(folder, capsys):
    stats = str(folder / "stats.npz")
    model = str(folder / "model")
    assert main(["calibrate", model, stats, "--num-samples", "2", "--steps", "2"]) == 0
    assert not [name for name in os.listdir(folder) if "unfinished" in name]
    options = ["--recipe", "w8a8", "--act-mode", "static-per-timestep", "--stats", stats]
    assert (
        quantize(folder, *options, "--group-size", "0", "--attention", "w16a8", "--method", "rtn")
        == 0
    )
    attention = load(folder / "out").params["blocks_0"]["attn"]
    assert attention["qkv"]["act_quant"].scale.shape == (2, 1)
    assert attention["softmax_quant"].timesteps.shape == (2,)
    latents = generate(load(folder / "out"), ddim(steps=2), [1, 2])
    assert np.isfinite(latents).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--range", "widest"], "--range widest is not known; use minmax, absmax, percentile:P"),
        (["--layers", "nothing"], "matches no layer"),
        (["--recipe", "w16a16"], "quantizes nothing"),
        (["--stats", "s.npz"], "--stats s.npz has no effect: no activation is static"),
        (
            ["--method", "rtn", "--holdout", "0.5"],
            "--holdout 0.5 has no effect: --method rtn looks at no",
        ),
        (["--method", "rtn", "--num-samples", "8"], "--num-samples 8 has no effect: --method rtn"),
        (["--recipe", "w4a16", "--act-group-size", "8"], "--act-group-size 8 has no effect"),
        (["--recipe", "w4a16", "--act-mode", "static"], "--act-mode static has no effect"),
        (["--recipe", "w16a8", "--range", "mse", "--method", "rtn"], "--range mse has no effect"),
        (["--recipe", "w16a8", "--rounding", "gptq"], "--method gptq has no effect"),
        (["--recipe", "w4a16", "--shifted-gelu"], "--shifted-gelu has no effect"),
        (["--recipe", "w4a8-all", "--layers", ".*"], "does not go with --recipe w4a8-all"),
        (["--adaln", "w4a8-all"], "--adaln w4a8-all: -all belongs to a whole recipe"),
        (["--range", "percentile"], "--range percentile is not known"),
        (["--range", "percentile:x"], "--range percentile:x:"),
        (["--attention", "w4a8"], "attention operands have no weights"),
        (["--adaln", "small"], "--adaln small is not a preset"),
        (["--method", "gptq", "--num-samples", "1", "--steps", "2"], "leaves one side empty"),
        (["--method", "qdit_release", "--stages", "layer"], "has the release's own stages"),
        (["--method", "qdit", "--group-size", "0"], "one scale per channel"),
        (["--method", "gptq", "--num-samples", "0"], "--num-samples"),
        (["--method", "gptq", "--act-mode", "static"], "static activations need --stats FILE"),
    ],
)
def test_bad_options_end_in_one_sentence(folder, options, message, capsys):
    assert quantize(folder, "--recipe", "w4a8", *options) == 2
    assert message in capsys.readouterr().err
    assert os.listdir(folder) == ["model"]


def test_methods_are_listed_in_words_and_as_json(capsys):
    assert main(["methods"]) == 0
    printed = capsys.readouterr().out
    assert "calibration data: nothing" in printed
    assert "arXiv:2406.17343" in printed
    assert main(["methods", "--json"]) == 0
    described = json.loads(capsys.readouterr().out)["methods"]
    assert [method["name"] for method in described] == list(METHODS)


@pytest.mark.parametrize(
    ("options", "method", "ranges_used"),
    [
        (["--rounding", "nearest"], "rtn", ("minmax", "minmax")),
        (["--rounding", "gptq-authors"], "qdit_release", ("qdit_release_gptq", "qdit_release")),
        (["--method", "qdit_release", "--range", "mse"], "qdit_release", ("mse", "minmax")),
        (["--method", "qdit_release_gptq"], "qdit_release_gptq", ("qdit_release_gptq", "minmax")),
        (["--method", "rtn"], "rtn", ("minmax", "minmax")),
    ],
)
def test_the_method_brings_its_ranges_unless_one_is_given(options, method, ranges_used):
    parser = argparse.ArgumentParser()
    verb.add_parser(parser.add_subparsers())
    args = parser.parse_args(["quantize", "a", "b", "--recipe", "w4a8", *options])
    assert args.method == method
    chosen = PresetOptions.of(vars(args))
    params = tiny_checkpoint().params
    for rule in recipe_of("w4a8", dataclasses.replace(chosen, adaln="w6a8"), method, params).rules:
        spec = rule.spec
        assert (spec.weight.range_fn.name, spec.act.range_fn.name) == ranges_used


def method_of(folder):
    return load(folder / "out").metadata["quantization"]["method"]


@pytest.mark.parametrize(
    ("options", "method"),
    [([], "best"), (["--quiet"], "best"), (["--method", "rtn"], "rtn"), (["--bits", "nf4"], "rtn")],
)
def test_who_asks_for_no_method_gets_the_preset_s_and_is_told(folder, capsys, options, method):
    layer = ["--layers", "blocks_0/mlp/fc1"]
    few = [] if method == "rtn" else ["--num-samples", "4", "--steps", "4"]
    assert quantize(folder, "--recipe", "w4a8", *layer, *few, *options) == 0
    told = (
        "method best: samples 4 trajectories of 4 steps first; --method rtn"
        in capsys.readouterr().err
    )
    assert told == (options == [])
    assert method_of(folder) == method


def test_a_recipe_s_file_gets_the_best_method_in_python_too(folder):
    recipe = Recipe.preset("w4a8", layers="blocks_0/mlp/fc1", group_size=16)
    (folder / "recipe.json").write_text(json.dumps(recipe.to_json()))
    few = CalibrationData(num_samples=4, num_steps=4)
    full = load(folder / "model")
    fp8 = Recipe.preset("fp8_e4m3", layers="blocks_0/mlp/fc1")
    expected = {"best": (recipe, folder / "recipe.json"), "rtn": ("nf4",), "smoothquant": (fp8,)}
    for given, method in ((given, method) for method, some in expected.items() for given in some):
        made = qdit.quantize(full, recipe=given, data=None if method == "rtn" else few)
        assert made.metadata["quantization"]["method"] == method


def test_unknown_methods_are_refused_with_the_known_ones(folder, capsys):
    assert quantize(folder, "--recipe", "w4a8", "--method", "rounding") == 2
    assert "choose from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "bits", "leaves"),
    [
        ("smoothquant", "w4a8", {"InputMap"}),
        ("svdquant", "w4a4", {"LowRank"}),
        ("convrot", "w8a8", {"Rotation"}),
        ("ptq4dm", "w8a8", set()),
        ("rtn", "w4a8-fast", set()),
        ("lut4", "w4a8", set()),
    ],
)
def test_a_method_goes_from_the_command_line_to_samples(folder, method, bits, leaves, capsys):
    layers = ["--layers", "blocks_0/mlp/fc2"]
    few = [] if method in ("convrot", "rtn", "lut4") else FEW[:4]
    assert quantize(folder, "--bits", bits, "--method", method, *layers, *few) == 0
    assert "wrote" in capsys.readouterr().out
    out = load(folder / "out")
    found = out.params["blocks_0"]["mlp"]["fc2"]
    assert leaves <= {type(leaf).__name__ for leaf in found.values()}
    assert out.recipe.rules[0].spec.act.mode == ("static" if method == "ptq4dm" else "dynamic")
    samples = generate(out, ddim(steps=2), np.arange(2), guidance=1.5)
    assert np.isfinite(samples).all()


def test_what_is_given_comes_before_the_method_s_own_settings(folder):
    own = quantized_to(PresetOptions(), "svdquant")
    assert (own.weight.group_size, own.weight.symmetric, own.act.symmetric) == (64, True, True)
    given = PresetOptions(group_size=16, symmetric=False, act_group_size=0)
    spec = quantized_to(given, "svdquant")
    assert (spec.weight.group_size, spec.weight.symmetric, spec.act.group_size) == (16, False, 0)
    static = quantized_to(PresetOptions(), "tfmq_dm").act
    assert (static.mode, static.per_timestep) == ("static", True)
    dynamic = quantized_to(PresetOptions(act_mode="dynamic"), "tfmq_dm").act
    assert (dynamic.mode, dynamic.per_timestep) == ("dynamic", False)
    assert quantized_to(PresetOptions(), "nf4").weight.fmt.name == "nf4"
    lut4 = quantized_to(PresetOptions(), "lut4")
    assert (lut4.weight.fmt.name, lut4.weight.group_size, lut4.act.group_size) == ("lut4", 16, 0)
    parts = recipe_of("w4a8", PresetOptions(adaln="w8a8"), "nf4", tiny_checkpoint().params)
    assert [rule.spec.weight.bits for rule in parts.rules] == [4, 8]


def quantized_to(options, method):
    return recipe_of("w4a8", options, method, tiny_checkpoint().params).rules[0].spec


class StoppedError(BaseException):
    """Stands for a kill."""


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """Returns a folder with a network of two blocks, and inputs of it."""
    folder = tmp_path_factory.mktemp("collected")
    model, params = realistic_dit(0, hidden_size=32, depth=2, num_heads=2)
    save(folder / "model", Checkpoint(model, params))
    few = ["--num-samples", "4", "--steps", "2", "--collect", "spread"]
    assert main(["calibrate", str(folder / "model"), str(folder / "items.npz"), *few]) == 0
    return folder


@pytest.fixture
def learn(tmp_path, collected, monkeypatch):
    """Returns a function that learns two blocks by the command line, killed after `stop_after`."""
    short = functools.partial(ReconstructionSettings, num_steps=5)
    monkeypatch.setattr(reconstruction, "ReconstructionSettings", short)
    write, kept = Unfinished.write, []

    def run(out, *options, stop_after=None, model="model"):
        def stopping(self, number, result):
            write(self, number, result)
            kept.append(number)
            if number == stop_after:
                raise StoppedError

        monkeypatch.setattr(Unfinished, "write", stopping)
        kept.clear()
        paths = [str(collected / model), str(tmp_path / out)]
        given = ["--recipe", "w3a16", "--layers", r"blocks_\d/mlp/fc1", "--method", "brecq"]
        given += ["--items", str(collected / "items.npz"), "--group-size", "16"]
        status = main(["quantize", *paths, *given, *options])
        return status, list(kept)

    return run


def test_blocks_that_a_killed_command_has_learned_are_kept(learn, tmp_path, capsys):
    assert learn("whole") == (0, [0, 1])
    with pytest.raises(StoppedError):
        learn("out", stop_after=0)
    assert sorted(os.listdir(tmp_path)) == [".out.unfinished", "whole"]
    assert learn("out") == (0, [1])
    assert "resuming from" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"]
    ours, whole = (load(tmp_path / name) for name in ("out", "whole"))
    jax.tree.map(np.testing.assert_array_equal, ours.params, whole.params)
    layers = [loaded.metadata["quantization"]["layers"] for loaded in (ours, whole)]
    assert layers[0] == layers[1]


def test_blocks_of_another_command_are_not_continued(learn, collected, tmp_path, capsys):
    with pytest.raises(StoppedError):
        learn("out", stop_after=0)
    save(collected / "other", tiny_checkpoint(depth=2), overwrite=True)
    for options, model, differing in [
        (["--batch-size", "4"], "model", "data"),
        (["--group-size", "8"], "model", "recipe"),
        (["--method", "ptq4dit"], "model", "method"),
        ([], "other", "checkpoint"),
    ]:
        assert learn("out", *options, model=model) == (2, [])
        told = capsys.readouterr().err
        assert f"its {differing} is not the same" in told
        assert "--force to start from scratch" in told
    with pytest.raises(StoppedError):
        learn("out", "--group-size", "8", "--force", stop_after=0)
    assert learn("out", "--group-size", "8", "--force") == (0, [1])  # the same command resumes
    assert os.listdir(tmp_path) == ["out"]


def test_a_command_that_fails_before_its_first_block_leaves_nothing(learn, tmp_path, capsys):
    assert learn("out", "--stages", "layer") == (2, [])
    assert "block reconstruction has stages of its own" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_two_commands_do_not_write_to_one_place(learn, tmp_path, capsys):
    (tmp_path / ".out.unfinished").mkdir()
    with locked(tmp_path / ".out.unfinished"):
        assert learn("out") == (2, [])
    assert "another process writes to" in capsys.readouterr().err
