"""The measurement of a device: it runs through on a CPU, and keeps the fastest blocks by device and shape."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qdit_jax.kernels import gpu_tiles
from qdit_jax.kernels.gpu_tiles import CANDIDATES, Shape, fits, rows_of

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "experiments" / "accelerators"
SHAPE = Shape(4096, 1152, 1152, 4, 2)


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.mark.usefixtures("scripts")
def test_the_fastest_blocks_are_kept_by_device_and_shape(tmp_path):
    import gpu_sweep

    usable = [tiles for tiles in CANDIDATES if fits(tiles, SHAPE)]

    def times(calls, num_rounds):
        assert [call.name for call in calls] == [str(tiles) for tiles in usable]
        return np.array([[1e-6 * (5 - i) ** 2 + 1e-6] * num_rounds for i in range(len(calls))])

    row = gpu_sweep.swept(SHAPE, call_fn=lambda shape, tiles: lambda: None, time_fn=times)
    assert row["tiles"] == dataclasses.asdict(usable[5])
    assert row["microseconds"][str(usable[5])] == 1.0
    table = tmp_path / "tiles.json"
    gpu_sweep.keep([row], "H", {"date": "today"}, table)
    gpu_sweep.keep([row], "another", {"date": "today"}, table)
    slower = {**row, "tiles": dataclasses.asdict(usable[0])}
    gpu_sweep.keep([slower], "H", {"date": "tomorrow"}, table)
    held = json.loads(table.read_text())
    assert [len(rows) for rows in held.values()] == [1, 1]
    assert rows_of(held, "H") == {SHAPE: usable[0]}
    assert rows_of(held, "another") == {SHAPE: usable[5]}


def test_the_packaged_table_can_be_read():
    held = json.loads((Path(gpu_tiles.__file__).parent / gpu_tiles.TABLE).read_text())
    for device in held:
        for shape, tiles in rows_of(held, device).items():
            assert fits(tiles, shape)


@pytest.mark.usefixtures("scripts")
def test_a_wrong_product_is_seen(monkeypatch):
    import accelerator_checks

    monkeypatch.setattr(accelerator_checks, "RECIPES", ("w4a8-fast",))
    monkeypatch.setattr(accelerator_checks, "TOLERANCE", {"float32": 2e-6})
    rows = list(accelerator_checks.checks(((5, 128, 4),)))
    ran = [row for row in rows if "error" in row]
    assert {row["implementation"] for row in ran} == {"xla_cpu", "xla"}
    assert all(row["passed"] for row in ran)
    product = accelerator_checks.quantized_matmul
    monkeypatch.setattr(
        accelerator_checks, "quantized_matmul", lambda *args: product(*args).at[2, 1].multiply(1.01)
    )
    rows = list(accelerator_checks.checks(((5, 128, 4),)))
    assert not any(row["passed"] for row in rows if "error" in row)


@pytest.mark.slow  # two networks and their steps are compiled, in a process of its own
def test_a_tiny_network_runs_through(tmp_path):
    options = ["--model", "tiny", "--seconds", "240", "--samples", "2", "--rounds", "2"]
    tiles = tmp_path / "tiles.json"
    command = [sys.executable, str(SCRIPTS / "bench_accelerator.py"), *options]
    command += ["--out", str(tmp_path), "--tiles", str(tiles)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "bench_accelerator.json").read_text())
    assert all(row["passed"] for row in found["numerics"] if "error" in row)
    assert {row["title"] for row in found["steps"]} >= {"float32"}
    assert any("NVIDIA GPUs only" in reason for reason in found["left_out"])
    assert not tiles.exists()
    text = (tmp_path / "bench_accelerator.md").read_text()
    assert found["device"] in text
    assert found["made"]["jax"] in text
