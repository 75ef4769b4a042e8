"""`qdit verify`: what it prints and writes, and how it exits."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest
from tiny_models import tiny_checkpoint

import qdit_jax as qdit
from qdit_jax.cli import main

FAST = ("--num-samples", "2", "--steps", "2", "--batch-size", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("verify")
    full = tiny_checkpoint()
    small = qdit.quantize(full, "rtn", qdit.Recipe.preset("w8a8", full, group_size=16))
    params = {**small.params, "blocks_0": {**small.params["blocks_0"]}}
    params["blocks_0"]["mlp"] = {**params["blocks_0"]["mlp"], "fc1": full.params["blocks_0"]["mlp"]["fc1"]}  # fmt: skip
    checkpoints = {
        "full": full,
        "small": small,
        "broken": dataclasses.replace(small, params=params),
        "deeper": tiny_checkpoint(depth=2),
    }
    for name, checkpoint in checkpoints.items():
        qdit.save(base / name, checkpoint)
    return base


def run(folder, name, *options, against="full"):
    paths = str(folder / name), "--against", str(folder / against)
    return main(["verify", *paths, *FAST, *map(str, options)])


def test_all_limits_kept_is_0_and_a_table(folder, capsys):
    limits = ("--min-db", 20, "--min-layer-db", 20, "--max-bytes", "0.9x", "--max-ms-ratio", 1e6)
    before = sorted(os.listdir(folder))
    assert run(folder, "small", *limits, "--implementation", "xla_cpu") == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    (row,) = (line for line in lines if line.startswith("blocks_0/attn/qkv "))
    assert "8b g16" in row
    assert "xla_cpu, simulated" in row
    assert "12,288" in row
    assert sum(line.startswith("pass  --") for line in lines) == 5
    assert "FAIL" not in printed
    assert "measured here on 1 x cpu" in printed
    assert lines[-1].endswith("small: passed, 4 layers, 5 limits")
    assert sorted(os.listdir(folder)) == before


def test_a_limit_that_is_not_kept_is_1_and_json_says_so(folder, tmp_path, capsys):
    out = tmp_path / "report.json"
    limits = ("--min-db", 99, "--max-bytes", "1KiB", "--implementation", "xla")
    assert run(folder, "small", *limits, "--no-timing", "--json", "--out", out) == 1
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found == json.loads(out.read_text())
    assert not found["passed"]
    assert found["failures"] == []
    assert [entry["passed"] for entry in found["limits"]] == [False] * 3
    assert found["milliseconds"] is None
    assert found["layers"][0]["weights"]["bits"] == 8
    assert printed.err.count("FAIL  --") == 3
    # The file is replaced only if asked to.
    assert run(folder, "small", "--out", out) == 2
    assert "exists already" in capsys.readouterr().err
    out.write_text('{"mine": 1}')
    assert run(folder, "small", "--out", out, "--force") == 2
    assert out.read_text() == '{"mine": 1}'


def test_a_silent_no_op_is_1_by_name(folder, capsys):
    assert run(folder, "broken", "--no-timing") == 1
    lines = capsys.readouterr().out.splitlines()
    assert "FAIL  blocks_0/mlp/fc1: not quantized" in lines
    assert lines[-1].endswith("broken: 1 failed, 4 layers, no limits set")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-bytes", "5 apples"], "--max-bytes: 5 apples is not a size; use a number of bytes"),
        (["--implementation", "fast"], "--implementation fast is not known; use one of xla_cpu"),
        (
            ["--max-ms-ratio", "2", "--no-timing"],
            "--max-ms-ratio 2 needs the time of a call; leave",
        ),
        (["--max-ms-ratio", "0"], "--max-ms-ratio: '0' is not supported; use a number above 0"),
        (["--min-db", "nan"], "--min-db: 'nan' is not supported; use a finite number"),
        (["--num-samples", "1"], "--num-samples: '1' is not supported; use a whole number from 2"),
        (["--steps", "abc"], "--steps abc cannot be read"),
    ],
)
def test_what_cannot_be_run_is_2(folder, options, message, capsys):
    assert run(folder, "small", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_networks_that_do_not_belong_together_are_2(folder, capsys):
    assert run(folder, "small", against="deeper") == 2
    error = capsys.readouterr().err
    assert "small has depth=1 and" in error
    assert "deeper has depth=2; give the full-precision checkpoint of the same network" in error
    assert run(folder, "small", against="small") == 2
    assert "small is quantized (w8a8-g16)" in capsys.readouterr().err
    assert run(folder, "full") == 2
    assert (
        "nothing in it is quantized; give the output of `qdit quantize`" in capsys.readouterr().err
    )
    assert main(["verify", str(folder / "small")]) == 2
    assert "--against" in capsys.readouterr().err
