"""The scripts for accelerators and several hosts, run on processes and devices of this machine."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import qdit_jax as qdit
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


def free_ports(count):
    """Returns the first of so many ports in a row that are free."""
    for first in range(20000 + os.getpid() % 10000, 40000, count):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise AssertionError("no ports are free")


@pytest.mark.slow
def test_two_hosts_go_the_whole_road(folder):
    settings = {
        **{"SAMPLES": "8", "STEPS": "2", "BATCHES": "1", "METHOD": "smoothquant", "LABELS": LABELS},
        **{"SEARCH": "--group-sizes 32 64 128 --batch-size 2", "ADDRESS": "127.0.0.1"},
        **{"HOSTS": "2", "PORT": str(free_ports(4))},
    }
    command = ("sh", str(SCRIPTS / "road_several_hosts.sh"), "net", "out")
    for host in [started(folder, *command, HOST=str(number), **settings) for number in range(2)]:
        finished(host)
    names = ("stats.npz", "found/recipe.json", "samples.npz", "compared/report.html")
    assert all((folder / "out" / name).exists() for name in names)
    found = np.load(folder / "out" / "samples.npz")
    assert found["label"].tolist() == [1, 2, 3, 4]
    ckpt = qdit.load(folder / "out" / "small")
    alone = qdit.generate(ckpt, qdit.ddim(steps=2), [1, 2, 3, 4], guidance=1.5)
    np.testing.assert_allclose(found["latents"], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_any_shared_verb_runs_by_two_processes(folder):
    script = str(SCRIPTS / "several_hosts.sh")
    given = ("net", "stats.npz", "--num-samples", "6", "--steps", "2", "--batch-size", "2")
    command = ("sh", script, "calibrate", *given)
    out = finished(started(folder, *command, PORT=str(free_ports(1))))
    assert "wrote stats.npz" in out
    assert "process 1 of 2 has done its share" in out


def test_a_slice_is_asked_to_run_the_verb_on_every_host(folder):
    program = folder / "bin" / "gcloud"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    words = ("sample", "/mnt/ckpt", "--out", "/mnt/x.npz")
    out = finished(started(folder, "sh", str(SCRIPTS / "tpu_slice.sh"), "v5e", "zone", *words))
    assert "--worker=all" in out.splitlines()
    assert out.strip().endswith("qdit sample /mnt/ckpt --out /mnt/x.npz --distributed")


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
