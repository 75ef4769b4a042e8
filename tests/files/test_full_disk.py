"""A disk that is full: said before anything is computed, or in one sentence when it happens."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from tiny_models import tiny_checkpoint

from qdit_jax import checkpoint as checkpoints
from qdit_jax.cli import main
from qdit_jax.errors import UserError
from qdit_jax.ptq import quantize_checkpoint, quantize_params
from qdit_jax.recipes import Recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("full") / "ckpt"
    checkpoints.save(path, tiny_checkpoint(in_channels=1))
    return path


@pytest.fixture
def full(monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 4096}))


def test_sizes_are_known_beforehand(folder, tmp_path, full, monkeypatch, capsys):
    out = str(tmp_path / "out")
    quantize = ["quantize", str(folder), out, "--recipe", "w4a8", "--group-size", "16"]
    verbs = {
        "nearest": [*quantize, "--method", "rtn"],
        "gptq": [*quantize, "--method", "gptq"],
        "export": ["export", str(folder), f"{out}.safetensors"],
        "sample": ["sample", str(folder), "--num-samples", "1000", "--out", f"{out}.npz"],
    }
    for arguments in verbs.values():
        assert main(arguments) == 2
        told = capsys.readouterr().err
        assert "would take" in told
        assert "but its disk has 4,096 left" in told
    assert os.listdir(tmp_path) == []


def test_a_quantized_checkpoint_needs_its_own_room_not_the_source_s(folder, tmp_path, monkeypatch):
    recipe = Recipe.preset("w4a8", group_size=16)
    whole = checkpoints.open_checkpoint(folder)
    small = quantize_params(checkpoints.materialized(whole).params, recipe=recipe)
    needed = checkpoints.num_bytes(checkpoints.Checkpoint(whole.model, small))
    assert needed < checkpoints.num_bytes(whole)
    for free in (needed, needed - 1):
        usage = type("Usage", (), {"free": free})
        monkeypatch.setattr("shutil.disk_usage", lambda folder, usage=usage: usage)
        out = tmp_path / str(free)
        if free == needed:
            quantize_checkpoint(folder, out, recipe=recipe)
            continue
        with pytest.raises(UserError, match=f"would take {needed:,} bytes"):
            quantize_checkpoint(folder, out, recipe=recipe)
        assert not out.exists()


LIMITED = """
import resource, sys
from qdit_jax.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
for out in sys.argv[2:]:
    options = ["--recipe", "w8a8", "--group-size", "16", "--method", "rtn"]
    verb = ["export"] if out.endswith("s") else ["quantize", *options]
    print(main([verb[0], sys.argv[1], out, *verb[1:]]), flush=True)
"""


def test_the_disk_s_own_refusal_is_one_sentence(folder, tmp_path):
    outs = [str(tmp_path / "out"), str(tmp_path / "out.safetensors")]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": ""}
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, str(folder), *outs],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert run.stdout.splitlines()[-1] == "2"
    told = [line for line in run.stderr.splitlines() if line]
    assert told == [f"qdit: error: {out} cannot be written: File too large." for out in outs]
    assert os.listdir(tmp_path) == []
