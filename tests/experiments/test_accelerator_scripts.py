"""The scripts for accelerators and several hosts, run on processes and devices of this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import qdit_jax as qdit
from qdit_jax.cli import main
from qdit_jax.testing import realistic_dit

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "experiments" / "accelerators"
LABELS = "1,2,3,4"
SMALL = ("--group-sizes", "32", "64", "--num-batches", "1", "--batch-size", "2", "--steps", "2")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a small checkpoint, where `qdit` is this tree's and finds two devices."""
    model, params = realistic_dit(0)
    qdit.save(tmp_path / "net", qdit.Checkpoint(model, params))
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "qdit"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m qdit_jax "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(os.pathsep.join(filter(None, sys.path))))
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    return tmp_path


def finished(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, f"{out}\n{err[-3000:]}"
    return out


def started(folder: Path, *command: str, **environment: str) -> subprocess.Popen:
    env = {**os.environ, **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=env, text=True, **pipes)


def test_other_verbs_refuse_several_processes(capsys):
    assert main(["sample", "net", "--out", "x.npz", "--coordinator", "10.0.0.1:1"]) == 2
    assert "only `qdit search` works over several processes" in capsys.readouterr().err


def test_joined_samples_keep_the_order_of_the_hosts(tmp_path):
    for host in (10, 2):
        np.savez(tmp_path / f"samples-{host}.npz", latents=np.full((2, 3), host))
    command = [sys.executable, str(SCRIPTS / "join_samples.py"), str(tmp_path), "all.npz"]
    assert "4 samples of 2 hosts" in finished(started(tmp_path, *command))
    assert np.load(tmp_path / "all.npz")["latents"][:, 0].tolist() == [2, 2, 10, 10]


@pytest.mark.slow
def test_two_hosts_sample_what_one_process_samples_with_their_seeds(folder):
    script = str(SCRIPTS / "sample_on_a_host.sh")
    command = ("sh", script, "net", "out", LABELS, "--steps", "2")
    hosts = [started(folder, *command, HOST=str(host)) for host in range(2)]
    for host in hosts:
        finished(host)
    finished(started(folder, sys.executable, str(SCRIPTS / "join_samples.py"), "out", "all.npz"))
    found = np.load(folder / "all.npz")
    assert found["label"].tolist() == [1, 2, 3, 4] * 2
    ckpt = qdit.load(folder / "net")
    for host in range(2):
        alone = qdit.generate(ckpt, qdit.ddim(steps=2), [1, 2, 3, 4], seed=host, guidance=1.5)
        ours = found["latents"][4 * host : 4 * host + 4]
        np.testing.assert_allclose(ours, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_two_processes_of_two_devices_search_as_one(folder):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{one.getsockname()[1]}"
    search = ("qdit", "search", "net")
    alone = started(folder, *search, "alone", "--budget", "bitops=1.0x-g64", *SMALL)
    finished(alone)
    several = ("several", "--budget", "bitops=1.0x-g64", *SMALL, "--coordinator", address)
    pair = [
        started(folder, *search, *several, "--num-processes", "2", "--process-id", str(number))
        for number in range(2)
    ]
    for process in pair:
        finished(process)
    recipes = [(folder / name / "recipe.json").read_text() for name in ("alone", "several")]
    assert recipes[0] == recipes[1]


@pytest.mark.slow
def test_every_stage_runs_on_the_devices_of_one_host(folder):
    settings = {
        **{"SAMPLES": "4", "STEPS": "2", "BATCHES": "1", "METHOD": "smoothquant", "LABELS": LABELS},
        **{"REPEATS": "3", "SEARCH": "--group-sizes 32 64 128 --batch-size 2"},
    }
    finished(started(folder, "sh", str(SCRIPTS / "road_one_host.sh"), "net", "out", **settings))
    names = ("stats.npz", "found/recipe.json", "compared/report.html", "samples.npz")
    assert all((folder / "out" / name).exists() for name in (*names, "speed/bench.json"))
    assert len(np.load(folder / "out" / "samples.npz")["label"]) == 4
