"""The measurement of a device: it runs through on a CPU, and keeps the fastest blocks by device and shape."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from qdit_jax.kernels import gpu_tiles, tpu_blocks
from qdit_jax.kernels.gpu_tiles import CANDIDATES, Shape, fits
from qdit_jax.kernels.measured import packaged
from qdit_jax.kernels.tpu_blocks import Tiles
from qdit_jax.quant import ActSpec, WeightSpec

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "experiments" / "accelerators"
SHAPE = Shape(4096, 1152, 1152, 4, 2)


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.mark.usefixtures("scripts")
def test_the_fastest_blocks_are_kept_by_device_and_shape(tmp_path):
    from block_sweep import GPU, Layer, keep, swept

    usable = [tiles for tiles in CANDIDATES if fits(tiles, SHAPE)]

    def times(calls, num_rounds):
        assert [call.name for call in calls] == [str(tiles) for tiles in usable]
        return np.array([[1e-6 * (5 - i) ** 2 + 1e-6] * num_rounds for i in range(len(calls))])

    layer = Layer(4096, 1152, 1152, "w4a8-fast", 256)
    [row] = swept(GPU, layer, call_fn=lambda *_: lambda: None, time_fn=times)
    assert row["tiles"] == dataclasses.asdict(usable[5])
    assert row["microseconds"][str(usable[5])] == 1.0
    table = tmp_path / "tiles.json"
    keep(GPU, [row], "H", {"date": "today"}, table)
    keep(GPU, [row], "another", {"date": "today"}, table)
    slower = {**row, "tiles": dataclasses.asdict(usable[0])}
    keep(GPU, [slower], "H", {"date": "tomorrow"}, table)
    held = json.loads(table.read_text())
    assert [len(rows) for rows in held.values()] == [1, 1]
    assert gpu_tiles.TABLE.rows_of(held, "H") == {SHAPE: usable[0]}
    assert gpu_tiles.TABLE.rows_of(held, "another") == {SHAPE: usable[5]}


@pytest.mark.usefixtures("scripts")
def test_on_a_tpu_blocks_that_divide_a_sample_have_a_row_of_their_own(tmp_path):
    from block_sweep import TPU, Layer, keep, layers_of, swept

    def times(calls, num_rounds):  # the first, of 512 rows, is the fastest
        return np.arange(1, len(calls) + 1)[:, None] * np.full((1, num_rounds), 1e-6)

    assert len(list(layers_of(TPU, [(1152, 4608), (4608, 1152)], [16, 2], 256))) == 16
    layer = Layer(4096, 1152, 1152, "w4a8-g128", 256)
    rows = swept(TPU, layer, call_fn=lambda *_: lambda: None, time_fn=times)
    table = tmp_path / "blocks.json"
    keep(TPU, rows, "V", {"date": "today"}, table)
    held = tpu_blocks.TABLE.rows_of(json.loads(table.read_text()), "V")
    alone = tpu_blocks.groups_sizes((4096, 1152), WeightSpec(4, 128), 2, ActSpec(8, 128))
    alone = dataclasses.replace(alone, width=1152)
    in_samples = dataclasses.replace(alone, tokens_per_sample=256)
    assert held == {alone: Tiles(512, 384), in_samples: Tiles(256, 384)}


@pytest.mark.usefixtures("scripts")
@pytest.mark.parametrize("recipe", ["w4a8-fast", "w8a8-fast", "w4a8-g128", "w4a16"])
def test_shapes_of_a_tpus_sweep_are_those_that_its_kernels_ask_for(recipe, monkeypatch):
    from block_sweep import TPU, Layer, product_call

    asked = []

    def chosen(sizes):
        asked.append(sizes)
        return tpu_blocks.blocks_by_arithmetic(sizes)

    monkeypatch.setattr("qdit_jax.kernels.tpu_call.chosen_blocks", chosen)
    monkeypatch.setattr("qdit_jax.kernels.tpu_reasons.machine_reason", lambda: None)
    layer = Layer(64, 256, 256, recipe, 32)
    run = product_call(TPU, layer, None)
    jax.eval_shape(run.func, *run.args)
    assert {tpu_blocks.alone(sizes) for sizes in asked} == {
        tpu_blocks.alone(sizes) for sizes in TPU.shapes(layer)
    }


def test_the_packaged_tables_can_be_read():
    for device, rows in packaged(gpu_tiles.TABLE.file).items():
        held = gpu_tiles.TABLE.rows_of({device: rows}, device)
        assert all(fits(tiles, shape) for shape, tiles in held.items())
    for device, rows in packaged(tpu_blocks.TABLE.file).items():
        held = tpu_blocks.TABLE.rows_of({device: rows}, device)
        assert {tpu_blocks.misfit(tiles, sizes) for sizes, tiles in held.items()} == {None}


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
