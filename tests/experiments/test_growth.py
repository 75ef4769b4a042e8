"""The measurement of what makes models grow outliers."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments" / "testbeds"


@pytest.fixture
def growth(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    before = set(sys.modules)
    yield importlib.import_module("grow_outliers")
    for name in set(sys.modules) - before:
        if str(EXPERIMENTS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_figures_of_a_layer_with_one_outlier_channel(growth):
    size = np.ones((2, 3, 64))
    size[..., 5] = 30
    layer = {"channel_max": size, "channel_rms": size, "token_ratio": np.full((2, 3), 4.0)}
    layer["channel_max"] = size * np.array([1, 2, 4])[:, None]
    kernel = np.random.default_rng(0).standard_normal((64, 8))
    found = growth.layer_figures([layer], [kernel])
    assert found["ratio"] == found["largest_ratio"] == 30
    assert found["token_ratio"] == 4
    assert found["drift"] == 4
    assert found["drifting_share"] == 1
    assert found["kurtosis"] == pytest.approx(64, rel=0.2)
    even = growth.layer_figures([layer | {"channel_rms": np.ones((2, 3, 64))}], [kernel])
    assert even["kurtosis"] == 1


def test_weight_decay_leaves_modulation_alone(growth):
    params = {"blocks_0": {"adaLN_modulation": {"kernel": jnp.ones(3)}, "mlp": jnp.ones(3)}}
    assert growth.not_modulation(params) == {
        "blocks_0": {"adaLN_modulation": {"kernel": False}, "mlp": True}
    }


def test_the_report_lists_every_measurement(growth, tmp_path):
    kind = growth.layer_figures(
        [
            {
                "channel_max": np.ones((2, 3, 8)),
                "channel_rms": np.ones((2, 3, 8)),
                "token_ratio": np.ones((2, 3)),
            }
        ],
        [np.random.default_rng(0).standard_normal((8, 8))],
    )
    found = {name: kind for name in ("qkv", "proj", "fc1", "fc2")}
    results = {"base": {"500": found, "1500": found | {"noise_error": 0.03}, "4500": found}}
    growth.write_report(tmp_path, results)
    rows = (tmp_path / "growth.md").read_text().splitlines()
    assert len(rows) == 5
    assert rows[3].startswith("| base | 1500 | 0.0300 | 1.0 |")
    assert len({row.count("|") for row in rows}) == 1
    assert (tmp_path / "growth.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_killed_sweep_continues_to_the_same_result(growth, tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "SNAPSHOTS", (100, 200))
    monkeypatch.setattr(growth, "measurement", lambda checkpoint, sampled: {"sampled": sampled})
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (1024, 16, 16, 1)).astype(np.float32)
    data = jnp.asarray(images), jnp.asarray(rng.integers(0, 10, 1024))
    variant = growth.Variant(width=32, depth=1, steps=200)
    whole, halves = {}, {}
    assert list(growth.train(variant, data, tmp_path / "a", 200, whole)) == [100, 200]
    assert list(growth.train(variant, data, tmp_path / "b", 100, halves)) == [100]
    assert list(growth.train(variant, data, tmp_path / "b", 200, halves)) == [200]
    errors = [[found[step]["noise_error"] for step in ("100", "200")] for found in (whole, halves)]
    assert errors[0] == errors[1]
    json.dumps(halves)
