"""`qdit convert` as a program: what it prints, how it fails, and what it leaves on disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from convert_samples import dit_shapes, flat, random_arrays, write_pipeline
from torch_file import write_torch_file

import qdit_jax.checkpoint as checkpoints
from qdit_convert import convert, describe, description_text
from qdit_jax.cli import convert as verb
from qdit_jax.errors import UserError


def command(*args):
    """Runs the verb alone, as `qdit convert` does."""
    import argparse

    parser = argparse.ArgumentParser()
    verb.add_parser(parser.add_subparsers(dest="verb"))
    parsed = parser.parse_args(["convert", *map(str, args)])
    parsed.run(parsed)


def test_the_verb_writes_a_checkpoint_that_loads(pt, dit, tmp_path, capsys):
    out = tmp_path / "out"
    command(pt(dit), out, "--num-heads", 2)
    printed = capsys.readouterr().out
    assert "family dit (DiT in the facebook layout)" in printed
    assert "--family sit" in printed
    assert f"wrote {out}" in printed
    loaded = checkpoints.load(out)
    assert loaded.model.num_heads == 2
    assert loaded.metadata["source"] == "model.pt"
    kernel = flat(loaded.params)["blocks_0/mlp/fc1/kernel"]
    np.testing.assert_array_equal(kernel, dit["blocks.0.mlp.fc1.weight"].T)


def test_the_verb_prints_what_was_done_to_the_names(pt, dit, tmp_path, capsys):
    content = {f"model.{name}": array for name, array in dit.items()}
    command(pt({**content, "step": np.ones(1, np.float32)}), tmp_path / "out", "--num-heads", 2)
    printed = capsys.readouterr().out
    assert 'names: stripped "model."\n' in printed
    assert "names: left out 1 tensors: step\n" in printed
    kept = checkpoints.load(tmp_path / "out").metadata["names"]
    assert kept == ['stripped "model."', "left out 1 tensors: step"]


def test_a_pipeline_is_written_with_its_vae(tmp_path):
    convert(write_pipeline(tmp_path / "p"), tmp_path / "out")
    assert (tmp_path / "out" / "vae" / "model.json").is_file()


def test_an_existing_output_is_replaced_only_by_force(pt, dit, tmp_path):
    out = tmp_path / "out"
    convert(pt(dit), out, num_heads=2)
    before = (out / "model.json").read_text()
    with pytest.raises(UserError, match=r"exists already.*--force"):
        convert(pt(dit), out, num_heads=4)
    assert (out / "model.json").read_text() == before
    convert(pt(dit), out, num_heads=4, force=True)
    assert checkpoints.load(out).model.num_heads == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.pt", "out"]


def test_bad_input_leaves_nothing_and_the_old_output(pt, dit, tmp_path):
    out = tmp_path / "deep" / "out"
    dit["pos_embed"][:] = np.nan
    with pytest.raises(UserError, match="NaN"):
        convert(pt(dit), out, num_heads=2)
    assert not out.parent.exists()


def test_output_that_cannot_be_written_is_a_sentence(pt, dit, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        convert(pt(dit), tmp_path / "file" / "out", num_heads=2)


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        command("--help")
    text = capsys.readouterr().out
    assert "qdit convert DiT-XL-2-256x256.pt" in text
    assert "--num-heads" in text


def test_describe_says_what_convert_would_do(pt, dit, tmp_path):
    told = describe(write_pipeline(tmp_path / "p"))
    assert [network["family"] for network in told["networks"]] == ["dit", "vae"]
    assert told["problem"] is None
    assert "convert with: qdit convert" in description_text(told)
    told = describe(pt(dit))
    assert "--num-heads" in told["problem"]
    assert told["networks"][0]["family"] == "dit"
    assert told["networks"][0]["num_values"] == sum(a.size for a in dit.values())
    assert told["networks"][0]["bytes"] == 4 * told["networks"][0]["num_values"]
    assert "convert would say" in description_text(told)
    told = describe(pt({"a.weight": np.ones(3, np.float32)}))
    assert "family" not in told["networks"][0]


CHILD = """
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
from qdit_convert import convert
print("ready", flush=True)
for heads in (2, 4) * 20:
    convert({src!r}, {out!r}, num_heads=heads, force=True)
    print(heads, flush=True)
"""


@pytest.mark.slow
def test_a_kill_leaves_the_old_or_the_new_checkpoint(tmp_path):
    src, out = tmp_path / "model.pt", tmp_path / "out"
    write_torch_file(src, random_arrays(dit_shapes(64, 3)))
    convert(src, out, num_heads=4)
    code = CHILD.format(paths=sys.path, src=str(src), out=str(out))
    for delay in (0.0, 0.02, 0.05, 0.1, 0.2, 0.3):
        child = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        child.stdout.readline()
        child.stdout.readline()
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert checkpoints.load(out).model.num_heads in (2, 4)


def test_every_choice_of_a_user_is_an_option_and_a_keyword():
    from dataclasses import fields

    from qdit_convert.choices import Choices, Told
    from qdit_jax.cli.convert import NETWORK_OPTIONS

    names = {field.name for field in fields(Choices)}
    assert names == set(Told.__annotations__)
    assert names == {*NETWORK_OPTIONS, "input_size"}
