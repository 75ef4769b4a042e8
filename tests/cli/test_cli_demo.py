"""`qdit demo --quick` from end to end: its report, its figures and their order."""

from __future__ import annotations

import json
import math

import pytest
from PIL import Image

from qdit_jax.cli import main
from qdit_jax.demo.run import MARKER, RESULTS

pytestmark = pytest.mark.slow  # the demonstration takes half a minute

TITLES = ["full precision", "W8A8, groups of 32", "W4A8, groups of 32", "W4A8, per channel, static"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    assert main(["demo", "--quick", "--out", str(folder), "--quiet"]) == 0
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_every_result_is_written_and_every_contender_has_its_row(folder, found):
    assert {MARKER, *RESULTS} <= {path.name for path in folder.iterdir()}
    assert [model["title"] for model in found["models"]] == TITLES
    page = (folder / "report.html").read_text()
    for model in found["models"]:
        assert f"<td>{model['title']}</td><td>" in page
        assert f"<td>{model['bytes']:,}</td>" in page


def test_fewer_bits_are_smaller_and_farther_from_full_precision(found):
    sizes = [model["bytes"] for model in found["models"]]
    assert sizes == sorted(set(sizes), reverse=True)
    assert list(found["paired"]) == TITLES[1:]
    intervals = [found["paired"][title]["latent_snr_db"] for title in TITLES[1:]]
    near = [interval["estimate"] for interval in intervals]
    assert near == sorted(set(near), reverse=True)
    assert near[0] > 30  # 8 bits
    for interval in intervals:
        assert all(map(math.isfinite, interval.values()))
        assert interval["low"] < interval["estimate"] < interval["high"]


def test_the_static_recipe_has_the_worst_distance_to_real_digits(found):
    distances = [found["scores"][title]["frechet_distance"]["value"] for title in TITLES]
    assert all(math.isfinite(d) and d > 0 for d in distances)
    assert max(distances) == distances[-1]
    assert distances[-1] > 2 * max(distances[:-1])


def test_the_text_model_shows_captions_and_no_score(tmp_path):
    out = tmp_path / "out"
    assert main(["demo", "--model", "text", "--quick", "--out", str(out), "--quiet"]) == 0
    found = json.loads((out / "metrics.json").read_text())
    assert [model["title"] for model in found["models"]] == TITLES
    assert not found["scores"]
    near = [found["paired"][title]["latent_snr_db"]["estimate"] for title in TITLES[1:]]
    assert near == sorted(near, reverse=True)
    assert not (out / "clips.gif").exists()


def test_the_video_model_moves(tmp_path):
    out = tmp_path / "out"
    assert main(["demo", "--model", "video", "--quick", "--out", str(out), "--quiet"]) == 0
    found = json.loads((out / "metrics.json").read_text())
    assert [model["title"] for model in found["models"]] == TITLES
    near = [found["paired"][title]["latent_snr_db"]["estimate"] for title in TITLES[1:]]
    assert near == sorted(near, reverse=True)
    with Image.open(out / "clips.gif") as clip:
        assert clip.n_frames == 8
    assert "data:image/gif;base64," in (out / "report.html").read_text()
