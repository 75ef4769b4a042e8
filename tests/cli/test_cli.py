"""The command line as a person meets it: verbs, their output, and one sentence on bad input."""

from __future__ import annotations

import json
import os

import pytest

from qdit_jax.checkpoint import Checkpoint, load, save
from qdit_jax.cli import VERBS, main
from qdit_jax.quant import QTensor
from qdit_jax.testing import realistic_dit


@pytest.fixture
def folder(tmp_path):
    model, params = realistic_dit(0, hidden_size=48, depth=1, num_heads=4, input_size=8)
    save(tmp_path / "model", Checkpoint(model, params))
    return tmp_path


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert f"qdit {verb}" in capsys.readouterr().out.split("usage:")[1].split("\n", 1)[1]


def test_quantize_writes_what_it_says(folder, capsys):
    arguments = [
        str(folder / "model"),
        str(folder / "small"),
        "--recipe",
        "w4a8",
        "--group-size",
        "32",
        "--method",
        "rtn",
    ]
    assert main(["quantize", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "blocks_0/attn/qkv" in printed
    assert "4 layers" in printed
    small = load(folder / "small")
    assert isinstance(small.params["blocks_0"]["mlp"]["fc1"]["kernel"], QTensor)
    assert small.recipe.name == "w4a8-g32"
    assert main(["quantize", *arguments]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(folder, capsys):
    arguments = [str(folder / "model"), str(folder / "small"), "--recipe", "w6a8", "--dry-run"]
    assert main(["quantize", *arguments]) == 0
    assert "bytes by the formula" in capsys.readouterr().out
    assert os.listdir(folder) == ["model"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "w4"], "--recipe w4 is not a preset"),
        (["--recipe", "w4a8", "--layers", "nothing"], "matches no layer"),
        (["--recipe", "w4a8", "--act-mode", "static", "--method", "rtn"], "need --stats"),
        (["--recipe", "absent.json"], "recipe file absent.json does not exist"),
        (["--recipe", "absent.json", "--group-size", "32"], "belong to presets"),
    ],
)
def test_quantize_refuses_in_one_sentence(folder, options, message, capsys):
    assert main(["quantize", str(folder / "model"), str(folder / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("qdit: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert os.listdir(folder) == ["model"]


def test_inspect_counts_bytes_by_part(folder, capsys):
    paths = [str(folder / "model"), str(folder / "small")]
    main(["quantize", *paths, "--recipe", "w4a8", "--method", "rtn"])
    capsys.readouterr()
    assert main(["inspect", str(folder / "small"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    held = sum(leaf.nbytes for leaf in jax_leaves(load(folder / "small").params))
    assert summary["bytes"] == held
    assert "4-bit" in summary["parts"]["blocks/attn/qkv"]["dtypes"]
    assert summary["recipe"]["name"] == "w4a8-g128"
    count = {"xla_cpu": num_kernels(folder / "small")}
    used = {"simulated": count, "integer": count}
    assert summary["implementations"] == used
    assert summary["attention"] == {"xla": summary["config"]["depth"]}
    assert main(["inspect", str(folder / "small")]) == 0
    assert "family: dit" in capsys.readouterr().out


def test_inspect_tells_an_exported_file_from_a_torch_file(folder, capsys, golden):
    exported = str(folder / "model.safetensors")
    assert main(["export", str(folder / "model"), exported]) == 0
    capsys.readouterr()
    for path in (exported, str(folder / "model")):
        assert main(["inspect", path, "--json"]) == 0
    first, second = capsys.readouterr().out.split("\n}\n")[:2]
    first, second = json.loads(first + "}"), json.loads(second + "}")
    assert first["bytes"] == second["bytes"]
    assert first["parts"] == second["parts"]
    assert main(["inspect", str(golden("dit_A.pt"))]) == 0
    printed = capsys.readouterr().out
    assert "family: dit, DiT in the facebook layout" in printed
    assert "pass --num-heads" in printed


def num_kernels(checkpoint):
    import jax

    leaves = jax.tree.leaves(load(checkpoint).params, is_leaf=lambda x: isinstance(x, QTensor))
    return sum(isinstance(leaf, QTensor) for leaf in leaves)


def jax_leaves(tree):
    import jax

    return jax.tree.leaves(tree)


def test_calibrate_then_static(folder, capsys):
    stats = str(folder / "stats.npz")
    model = str(folder / "model")
    assert main(["calibrate", model, stats, "--num-samples", "3", "--steps", "2"]) == 0
    assert "at 2 timesteps" in capsys.readouterr().out
    static = ["--recipe", "w8a8", "--act-mode", "static", "--stats", stats, "--method", "rtn"]
    assert main(["quantize", model, str(folder / "static"), *static]) == 0
    act = load(folder / "static").params["blocks_0"]["attn"]["qkv"]["act_quant"]
    assert act.scale.shape == (1,)


@pytest.mark.parametrize("verb", ["inspect", "sample"])
def test_an_absent_checkpoint_is_named(verb, tmp_path, capsys):
    assert main([verb, str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
