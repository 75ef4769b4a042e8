"""`qdit inspect --stats`: the figures it draws follow the weights and inputs they are of."""

from __future__ import annotations

import json
import os
import re

import numpy as np
import pytest
from PIL import Image
from tiny_models import tiny_vae

from qdit_jax.calibration import Stats
from qdit_jax.checkpoint import Checkpoint, save
from qdit_jax.cli import main
from qdit_jax.ptq import quantize_params
from qdit_jax.recipes import Recipe
from qdit_jax.report import model_stats
from qdit_jax.testing import realistic_dit

CHARTS = ("weights", "activations", "timesteps", "outliers", "ranges")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("inspect")
    model, params = realistic_dit(0, hidden_size=64, depth=1, num_heads=4, input_size=8)
    recipe = Recipe.preset("w4a8", params, group_size=32)
    small = quantize_params(params, recipe=recipe)
    save(base / "model", Checkpoint(model, params))
    save(base / "small", Checkpoint(model, small, recipe))
    save(base / "vae", tiny_vae())
    return base


def test_charts_page_and_figures(folder, tmp_path, capsys):
    out = tmp_path / "out"
    options = ("--num-samples", "2", "--steps", "4", "--out", str(out))
    assert main(["inspect", str(folder / "model"), "--stats", *options]) == 0
    printed = capsys.readouterr().out
    assert "blocks_0/attn/qkv: weights spread" in printed
    expected = {"report.html", "stats.json", *(f"{name}.png" for name in CHARTS)}
    assert set(os.listdir(out)) == expected
    for name in CHARTS:
        assert Image.open(out / f"{name}.png").width > 500
    page = (out / "report.html").read_text()
    assert page.count("data:image/png") == len(CHARTS)
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    summary = json.loads((out / "stats.json").read_text())
    assert len(summary["timesteps"]) == 4
    qkv = summary["inputs"]["blocks_0/attn/qkv"]
    assert 1 <= qkv["num_outliers"] < 10  # what the model was built with
    assert qkv["largest_over_median"] > model_stats.OUTLIER_FACTOR
    weights = summary["weights"]["blocks_0/attn/qkv"]
    assert weights["input_spread"] > weights["output_spread"]


def made_stats():
    """Returns statistics of one layer of 10 channels: channel 3 is 20 times the others at step 1."""
    high = np.ones((2, 10), np.float32)
    high[1] *= 2
    high[1, 3] = 40
    return Stats(np.array([900, 100]), {"a": -high / 2}, {"a": high})


def test_outliers_and_drift_of_known_inputs():
    facts = model_stats.activation_facts(made_stats(), ["a"])["a"]
    assert facts["outlier_channels"] == [3]
    assert facts["largest_over_median"] == pytest.approx(20)
    assert facts["drift"] == pytest.approx(40)
    np.testing.assert_allclose(facts["median_by_timestep"], [1, 2])


def test_negative_values_count_by_their_size():
    stats = made_stats()
    low = {"a": stats.low["a"] * 4}
    facts = model_stats.activation_facts(Stats(stats.timesteps, low, stats.high), ["a"])["a"]
    assert facts["by_channel"][3] == 80


def test_spreads_of_known_weights():
    kernel = np.ones((8, 4), np.float32)
    kernel[0] = 9
    params = {"blocks_0": {"attn": {"qkv": {"kernel": kernel}}}}
    facts = model_stats.weight_facts(params, ["blocks_0/attn/qkv"])["blocks_0/attn/qkv"]
    np.testing.assert_array_equal(facts["by_input"], kernel[:, 0])
    assert facts["output_spread"] == 0
    assert facts["input_spread"] == pytest.approx(np.std(kernel[:, 0]) / 2)


def test_ranges_of_groups_with_a_shorter_last_one():
    w = np.arange(10, dtype=np.float32)[:, None] * np.array([1, -2], np.float32)
    found = model_stats.group_ranges(w, 4)
    np.testing.assert_array_equal(found, [3, 6, 3, 6, 1, 2])
    np.testing.assert_array_equal(model_stats.group_ranges(w, 0), [9, 18])


def test_quantized_kernels_are_unpacked(folder):
    from qdit_jax.checkpoint import load

    full, small = (load(folder / name).params for name in ("model", "small"))
    paths = model_stats.block_layers(small)
    kinds = ("attn/proj", "attn/qkv", "mlp/fc1", "mlp/fc2")
    assert paths == {f"blocks_0/{kind}": ("blocks_0", 0, kind) for kind in kinds}
    for path in paths:
        w, q = model_stats.kernel_of(full, path), model_stats.kernel_of(small, path)
        assert 0 < np.abs(w - q).max() < 0.2 * np.abs(w).max()


def test_blocks_are_in_the_order_of_their_numbers():
    layer = {"attn": {"qkv": {"kernel": np.ones((2, 2))}}}
    params = {f"blocks_{i}": layer for i in (10, 2, 0)}
    found = [(place.block, place.number) for place in model_stats.block_layers(params).values()]
    assert found == [("blocks_0", 0), ("blocks_2", 1), ("blocks_10", 2)]


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("vae", ("--stats",), "is not a diffusion model"),
        ("absent", ("--stats",), "does not exist"),
        ("model/model.json", ("--stats",), "is not a checkpoint folder"),
        ("model", ("--stats", "--steps", "0"), "--steps: '0' is not supported"),
        ("model", ("--stats", "--num-samples", "0"), "--num-samples: '0' is not supported"),
        ("model", ("--stats", "--out", "model/model.json"), "is a file"),
        ("model", ("--steps", "5"), "--steps is an option of --stats"),
    ],
)
def test_bad_input_gets_a_sentence(folder, monkeypatch, capsys, path, options, message):
    monkeypatch.chdir(folder)
    before = sorted(os.listdir(folder))
    assert main(["inspect", path, *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert sorted(os.listdir(folder)) == before
