"""Reports say when, where and with what they were made, and in which groups ranges are shown."""

from __future__ import annotations

import datetime
import json
import platform

import jax
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

import qdit_jax
from qdit_jax import report
from qdit_jax.checkpoint import Checkpoint, save
from qdit_jax.cli import main
from qdit_jax.demo.run import TIMING
from qdit_jax.evaluation.pages import closeness_figure, timing_text
from qdit_jax.ptq import quantize_params
from qdit_jax.recipes import LayerSpec, Recipe, Rule
from qdit_jax.testing import realistic_dit


@pytest.fixture(scope="module")
def small():
    model, params = realistic_dit(0, hidden_size=24, depth=1, num_heads=2)
    recipe = Recipe.preset("w4a8", params, group_size=12)
    return Checkpoint(model, quantize_params(params, recipe=recipe), recipe), params


def test_provenance_names_date_versions_and_device():
    made = report.provenance()
    at = datetime.datetime.strptime(made["date"], "%Y-%m-%d %H:%M UTC")
    assert abs(datetime.datetime.now(datetime.UTC).replace(tzinfo=None) - at).total_seconds() < 120
    assert made["qdit_jax"] == qdit_jax.__version__
    assert made["jax"] == jax.__version__
    assert made["python"] == platform.python_version()
    assert f"{jax.device_count()} x cpu" in made["device"]
    for value in (made["date"], f"jax {jax.__version__}", f"qdit_jax {qdit_jax.__version__}"):
        assert value in report.provenance_text(made)


def test_ranges_are_shown_in_the_groups_that_a_model_has(small):
    checkpoint, full = small
    paths = report.block_layers(full)
    assert report.group_text(report.shown_group_sizes([full], paths)) == (
        "groups of 24 or 32 input channels"  # 32, or the whole column of 24 channels
    )
    sizes = report.shown_group_sizes([full, checkpoint.params], paths)
    assert set(sizes.values()) == {12}
    assert report.group_text(sizes) == "groups of 12 input channels"
    found = report.weight_ranges(checkpoint.params, ["blocks_0/attn/qkv"], sizes)
    assert found["blocks_0/attn/qkv"].size == 2 * 72  # 24 channels make 2 groups, 72 outputs
    mixed = Recipe((*checkpoint.recipe.rules, Rule("blocks_0/mlp/fc2", LayerSpec())))
    params = quantize_params(full, recipe=mixed)
    assert report.shown_group_sizes([params], paths)["blocks_0/mlp/fc2"] == 32


def test_the_report_of_a_model_in_groups_of_12_says_so(small, tmp_path, capsys):
    save(tmp_path / "small", small[0])
    out = tmp_path / "out"
    options = ["--stats", "--num-samples", "1", "--steps", "2", "--out", str(out), "--json"]
    assert main(["inspect", str(tmp_path / "small"), *options]) == 0
    page = (out / "report.html").read_text()
    assert "of weights in groups of 12 input channels" in page
    assert "groups of 32" not in page
    made = json.loads((out / "stats.json").read_text())["made"]
    assert json.loads(capsys.readouterr().out)["made"] == made
    assert report.provenance_text(made) in page
    assert "seed 0" in page


def test_a_single_timing_is_called_noisy():
    assert "noisy" in timing_text(1)
    assert "noisy" in TIMING
    assert timing_text(5) == "the median of 5 batches, one run."


def test_labels_stay_inside_the_picture_and_off_the_points():
    outcomes = {"full precision": (7.5, None), "W8A8, groups of 32": (4.06, 39.4),
                "W4A8, groups of 32": (3.46, 20.0), "W4A8, per channel": (3.3847, 7.8),
                "W4A8, per channel, static": (3.3849, 6.0)}  # fmt: skip
    models = [{"title": title, "bytes": size * 1e6} for title, (size, _) in outcomes.items()]
    paired = {
        title: {"latent_snr_db": {"estimate": near, "low": near - 1, "high": near + 1}}
        for title, (_, near) in list(outcomes.items())[1:]
    }
    chart = closeness_figure({"models": models, "paired": paired})
    FigureCanvasAgg(chart).draw()
    (legend,) = chart.legends
    assert [text.get_text() for text in legend.texts] == list(paired)
    box, frame = legend.get_window_extent(), chart.axes[0].get_window_extent()
    assert frame.x1 <= box.x0
    assert box.x1 <= chart.bbox.x1
    assert chart.bbox.y0 <= box.y0
    assert box.y1 <= chart.bbox.y1
