"""The same fitness on one device, eight devices and two processes, to the bit."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("distributed_worker.py")
ROOT = WORKER.parents[2]


def started(num_devices: int, *arguments: str) -> subprocess.Popen:
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(WORKER.parent)]),
    }
    return subprocess.Popen(
        [sys.executable, str(WORKER), *arguments],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result_of(process: subprocess.Popen) -> dict:
    out, err = process.communicate(timeout=300)
    lines = [line for line in out.splitlines() if line.startswith("RESULT ")]
    assert lines, f"{out}\n{err[-3000:]}"
    return json.loads(lines[0].removeprefix("RESULT "))


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def alone() -> dict:
    return result_of(started(1))


@pytest.mark.parametrize("num_devices", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_devices_do_not_change_the_fitness(alone, num_devices):
    several = result_of(started(num_devices))
    assert several["devices"] == num_devices
    assert several["compilations"] == alone["compilations"] == 1
    assert several["fitness"] == alone["fitness"]


def test_processes_do_not_change_the_fitness(alone):
    address = f"127.0.0.1:{free_port()}"
    pair = [started(1, address, "2", str(i)) for i in range(2)]
    for found in map(result_of, pair):
        assert (found["processes"], found["devices"]) == (2, 2)
        assert found["compilations"] == 1
        assert found["fitness"] == alone["fitness"]
