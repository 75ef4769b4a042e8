"""Two real processes that JAX joins: their results, and what is said and kept when one is killed."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_models import tiny_checkpoint

import qdit_jax as qdit
from qdit_jax.cli import main
from qdit_jax.ptq import quantize_params
from qdit_jax.recipes import Recipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a full-precision and a quantized checkpoint."""
    path = tmp_path_factory.mktemp("hosts")
    full = tiny_checkpoint(in_channels=1, input_size=16, patch_size=8)
    recipe = Recipe.preset("w4a8", full.params, group_size=16)
    qdit.save(path / "full", full)
    params = quantize_params(full.params, recipe=recipe)
    qdit.save(path / "small", dataclasses.replace(full, params=params, recipe=recipe))
    return path


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def settings(folder):
    """Returns how processes are started in a folder."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return {"env": env, "cwd": folder, **pipes}


def pair(folders, *words):
    """Starts `qdit` with these words as two processes, in a folder each or in one."""
    others = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2", "--process-id"]
    command = [sys.executable, "-m", "qdit_jax", *map(str, words), *others]
    places = folders if isinstance(folders, list) else [folders, folders]
    return [
        subprocess.Popen([*command, str(i)], **settings(place)) for i, place in enumerate(places)
    ]


def alone(folder, *words):
    """Starts `qdit` with these words as one process.

    In this one annotations are checked: samplers are other objects, with whose batches no run resumes.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "qdit_jax", *map(str, words)], **settings(folder)
    )


def finished(processes):
    """Returns what processes that ended well have printed."""
    found = [process.communicate(timeout=300) for process in processes]
    for process, (out, err) in zip(processes, found, strict=True):
        assert process.returncode == 0, f"{out}\n{err[-3000:]}"
    return [out for out, _ in found]


SAMPLE = ("--num-samples", "5", "--batch-size", "2", "--steps", "2")


def test_two_processes_sample_as_one(folder, monkeypatch):
    # One test of real processes that always runs: they cost 5 s of CPU each.
    monkeypatch.chdir(folder)
    first, second = finished(pair(folder, "sample", "full", "--out", "two.npz", *SAMPLE))
    assert "two.npz: 5 samples" in first
    assert "process 1 of 2 has done its share; process 0 wrote two.npz" in second
    assert main(["sample", "full", "--out", "one.npz", *SAMPLE]) == 0
    assert (folder / "two.npz").read_bytes() == (folder / "one.npz").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--hessians", ".*"), ("--collect", "spread")], ids=" ".join)
def test_two_processes_calibrate_as_one(folder, options, monkeypatch):
    monkeypatch.chdir(folder)
    out = {name: f"{name}{options[0]}.npz" for name in ("one", "two")}
    finished(pair(folder, "calibrate", "full", out["two"], *SAMPLE, *options))
    assert main(["calibrate", "full", out["one"], *SAMPLE, *options]) == 0
    assert (folder / out["two"]).read_bytes() == (folder / out["one"]).read_bytes()
    assert not [path for path in folder.iterdir() if "unfinished" in path.name]


@pytest.mark.slow
def test_two_processes_compare_as_one(folder, monkeypatch):
    monkeypatch.chdir(folder)
    given = ("evaluate", "small", "--against", "full", *SAMPLE, "--reference", "demo")
    given += ("--min-samples", "2", "--json", "--range-samples", "2", "--out")
    told = [json.loads(text) for text in finished(pair(folder, *given, "two"))]
    assert main([*given, "one"]) == 0
    stored = [json.loads((folder / name / "metrics.json").read_text()) for name in ("two", "one")]
    assert told[0] == told[1] == stored[0]
    for name in ("paired", "trajectory", "scores"):
        assert stored[0][name] == stored[1][name]
    for name in ("samples.npz", "reference_samples.npz", "ranges.npz", "pictures.png"):
        assert (folder / "two" / name).read_bytes() == (folder / "one" / name).read_bytes()


LONG = ("--num-samples", "120", "--batch-size", "2", "--steps", "1000")


@pytest.fixture(scope="module")
def whole(folder):
    """The bytes of the samples of a run that nothing ended."""
    assert main(["sample", str(folder / "full"), "--out", str(folder / "whole.npz"), *LONG]) == 0
    return (folder / "whole.npz").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_after_a_killed_process_nothing_is_lost(folder, whole, victim, tmp_path):
    out = tmp_path / "samples.npz"
    command = ("sample", "full", "--out", out, *LONG)
    processes = pair(folder, *command)
    shards = tmp_path / ".samples.npz.unfinished" / "shards"
    while len(list(shards.glob("[0-9]*"))) < 6:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)
    processes[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    left = processes[1 - victim]
    _, err = left.communicate(timeout=120)
    assert time.monotonic() - killed < 60
    assert left.returncode == 2, err[-3000:]
    last = err.strip().splitlines()[-1]
    assert f"process {victim} of 2" in last
    assert "start all processes again with the same command" in last
    processes[victim].communicate()
    assert not out.exists()
    assert 6 <= len(list(shards.glob("[0-9]*"))) < 60
    again = pair(folder, *command) if victim == 1 else [alone(folder, *command)]
    assert "resuming from" in finished(again)[0]
    assert out.read_bytes() == whole


@pytest.mark.slow
def test_a_folder_that_is_not_shared_is_refused(folder, tmp_path):
    # Each process has an OUT of its own, as on the disks of two hosts.
    apart = [tmp_path / "a", tmp_path / "b"]
    for place in apart:
        place.mkdir()
    processes = pair(apart, "sample", folder / "full", "--out", "samples.npz", *SAMPLE)
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    for err in errors:
        assert "process 1 does not see what process 0 wrote" in err
    assert [list(place.iterdir()) for place in apart] == [[], []]
