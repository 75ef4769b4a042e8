"""Searches whose processes are killed: the same command resumes to the very same result."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from search_models import small_model

import qdit_jax as qdit

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
OPTIONS = [
    "--budget",
    "bitops=1.0x-g16",
    "--group-sizes",
    "8",
    "16",
    "32",
    "64",
    "--steps",
    "2",
    "--num-batches",
    "2",
    "--batch-size",
    "2",
]
EVOLUTION = ["--population", "6", "--generations", "5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("killed") / "ckpt"
    qdit.save(path, qdit.Checkpoint(*small_model()))
    return path


def started(*arguments):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "qdit_jax", "search", *map(str, arguments)]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finished(process):
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, f"{out}\n{err[-3000:]}"
    return out + err


def kill_after(process, state: Path, num_saved: int) -> None:
    """Sends SIGKILL once the search has saved `num_saved` times."""
    for _ in range(4000):
        steps = [int(p.name) for p in state.glob("*") if p.name.isdigit()]
        if max(steps, default=0) >= num_saved:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError(f"{state} was never saved {num_saved} times.")


def outcome(out: Path):
    history = json.loads((out / "history.json").read_text())
    history.pop("seconds")
    history.pop("made")  # the date
    return history, json.loads((out / "recipe.json").read_text())


@pytest.mark.parametrize("method", ["default", "nsga2", "qdit-paper"])
def test_a_killed_search_goes_on_to_the_same_result(folder, tmp_path, method):
    arguments = [*OPTIONS, "--method", method, *(EVOLUTION if method != "default" else ())]
    finished(started(folder, tmp_path / "whole", *arguments))
    for count in (1, 3):
        kill_after(
            started(folder, tmp_path / "killed", *arguments), tmp_path / "killed/state", count
        )
    assert not (tmp_path / "killed/recipe.json").exists()
    assert "resuming from" in finished(started(folder, tmp_path / "killed", *arguments))
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def pair(folder, out):
    address = f"127.0.0.1:{free_port()}"
    together = ["--coordinator", address, "--num-processes", "2"]
    arguments = [*OPTIONS, *EVOLUTION, "--method", "qdit-paper", *together]
    return [started(folder, out, *arguments, "--process-id", str(i)) for i in range(2)]


def test_after_a_lost_worker_the_same_commands_go_on(folder, tmp_path):
    alone = tmp_path / "alone"
    finished(started(folder, alone, *OPTIONS, *EVOLUTION, "--method", "qdit-paper"))
    out = tmp_path / "two"
    first, second = pair(folder, out)
    kill_after(second, out / "state", 2)
    _, err = first.communicate(timeout=400)
    assert first.returncode == 2, err[-3000:]
    assert "lost another one" in err
    assert "start all processes again" in err
    for process in pair(folder, out):
        finished(process)
    assert outcome(out) == outcome(alone)
