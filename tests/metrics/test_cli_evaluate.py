"""`qdit evaluate` on ready-made files, as a user runs it."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from PIL import Image

from qdit_jax import checkpoint
from qdit_jax.cli import evaluate
from qdit_jax.cli.options import Parser
from qdit_jax.metrics import DEMO_FRECHET_DISTANCE
from qdit_jax.models import DEMO_STATISTICS, InceptionV3, abstract_params, asset


def run(*arguments) -> None:
    parser = Parser(prog="qdit")
    evaluate.add_parser(parser.add_subparsers())
    args = parser.parse_args(["evaluate", *map(str, arguments)])
    args.run(args)


def strokes(seed: int, count: int = 120, size: int = 16) -> np.ndarray:
    """Returns images of random bars: something a digit network can look at."""
    rng = np.random.default_rng(seed)
    images = np.zeros((count, size, size, 1), np.uint8)
    for image in images:
        for _ in range(3):
            row, column = rng.integers(2, size - 6, 2)
            if rng.random() < 0.5:
                image[row : row + 2, column : column + 6] = rng.integers(120, 256)
            else:
                image[row : row + 6, column : column + 2] = rng.integers(120, 256)
    return images


@pytest.fixture
def files(tmp_path):
    np.savez(tmp_path / "a.npz", strokes(0))
    np.savez_compressed(tmp_path / "b.npz", strokes(1, 150))
    return tmp_path


def test_samples_against_packaged_statistics(files, capsys):
    out = files / "metrics.json"
    run("--samples", files / "a.npz", "--reference", "demo", "--out", out)
    summary = json.loads(out.read_text())
    assert summary["num_samples"] == 120
    assert summary["features"] == "demo"
    assert summary["scores"]["frechet_distance"]["label"] == DEMO_FRECHET_DISTANCE
    assert "precision" not in summary["scores"]
    printed = capsys.readouterr().out
    assert DEMO_FRECHET_DISTANCE in printed
    assert "FID" not in printed


def test_samples_against_images_with_pictures(files):
    out, picture = files / "metrics.json", files / "compare.png"
    common = ["--reference", files / "b.npz", "--batch-size", 50]
    run("--samples", files / "a.npz", *common, "--out", out, "--pictures", picture)
    scores = json.loads(out.read_text())["scores"]
    assert {"precision", "recall", "kernel_distance", "inception_score"} <= set(scores)
    assert all(math.isfinite(entry["value"]) for entry in scores.values())
    assert scores["kernel_distance"]["error"] > 0
    assert Image.open(picture).width > 700
    with pytest.raises(ValueError, match="exists already"):
        run("--samples", files / "b.npz", *common, "--out", out)
    run("--samples", files / "b.npz", *common, "--out", out, "--force")
    same = json.loads(out.read_text())["scores"]
    assert same["frechet_distance"]["value"] == pytest.approx(0, abs=1e-6)
    assert same["precision"]["value"] == same["recall"]["value"] == 1
    assert not list(files.glob(".metrics*"))


def test_published_reference_statistics_do_not_fit_the_demo_network(files):
    np.savez(files / "r.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(ValueError, match="2048 features, but 'demo' has 64"):
        run("--samples", files / "a.npz", "--reference", files / "r.npz")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "a.npz", "--reference", "small.npz"], "16x16 and .*small.npz of 8x8"),
        (["--samples", "small.npz", "--reference", "demo"], "take digits of 16x16"),
        (["--samples", "few.npz", "--reference", "demo"], "5 samples are too few: at least 65"),
        (["--samples", "float.npz", "--reference", "demo"], "must be uint8"),
        (["--samples", "dark.npz", "--reference", "demo"], "must span 0 to 255"),
        (["--samples", "color.npz", "--reference", "demo"], "demo features take gray digits"),
        (["--samples", "a.npz", "--reference", "other.npz"], "'vgg', but the samples are scored"),
        (["--samples", "absent.npz", "--reference", "demo"], "no such file"),
        (["--samples", "a.npz", "--reference", "absent.npz"], "no such file"),
        (["--samples", "a.npz", "--reference", "demo", "--features", "vgg"], "`inception CKPT`"),
        (
            ["--samples", "a.npz", "--reference", "demo", "--features", "inception"],
            "one checkpoint",
        ),
        (
            ["--samples", "a.npz", "--reference", "demo", "--features", "inception", "none"],
            "not exist",
        ),
        (["--samples", "a.npz", "--reference", "demo", "--batch-size", "0"], "--batch-size"),
    ],
)
def test_bad_input_gets_a_sentence_and_no_file(files, monkeypatch, arguments, message):
    monkeypatch.chdir(files)
    np.savez("small.npz", strokes(0, size=8 + 4)[:, :8, :8])
    np.savez("few.npz", strokes(0, 5))
    np.savez("dark.npz", (strokes(0) > 100).astype(np.uint8))
    np.savez("color.npz", strokes(0) * np.array([1, 0, 1], np.uint8))
    np.savez("other.npz", mu=np.zeros(64), sigma=np.eye(64), features=np.array("vgg"))
    np.savez("float.npz", strokes(0) / 127.5 - 1)
    with pytest.raises(ValueError, match=message):
        run(*arguments, "--out", "metrics.json")
    assert not (files / "metrics.json").exists()


def test_few_samples_can_be_asked_for(files):
    np.savez(files / "few.npz", strokes(0, 20))
    out = files / "metrics.json"
    run("--samples", files / "few.npz", "--reference", "demo", "--min-samples", 10, "--out", out)
    assert json.loads(out.read_text())["num_samples"] == 20


def test_the_packaged_statistics_are_found_by_path_too(files):
    run("--samples", files / "a.npz", "--reference", str(asset(DEMO_STATISTICS)))


@pytest.mark.slow
def test_inception_scores_carry_the_published_names(files, capsys):
    model = InceptionV3()
    rng = np.random.default_rng(0)
    flat = {}
    for name, leaf in abstract_params(model).items():
        fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 1
        center = 1 if name.endswith(("scale", "var")) else 0
        spread = (2 / fan_in) ** 0.5 if len(leaf.shape) > 1 else 0.1
        flat[name] = np.float32(center + spread * rng.normal(size=leaf.shape))
    checkpoint.save(
        files / "inception", checkpoint.Checkpoint(model, unflatten_dict(flat, sep="/"))
    )
    np.savez(files / "a.npz", rng.integers(0, 256, (12, 32, 24, 3), np.uint8))
    np.savez(files / "b.npz", rng.integers(0, 200, (10, 32, 24, 3), np.uint8))
    common = ["--samples", files / "a.npz", "--reference", files / "b.npz", "--batch-size", 6]
    common += ["--features", "inception", files / "inception", "--out", files / "metrics.json"]
    with pytest.raises(ValueError, match="12 samples are too few: at least 2049"):
        run(*common)
    run(*common, "--min-samples", 10)
    summary = json.loads((files / "metrics.json").read_text())
    labels = {entry["label"] for entry in summary["scores"].values()}
    assert {"FID", "sFID", "Inception Score", "KID", "precision", "recall"} == labels
    assert summary["preprocessing"] == "published"
    assert all(math.isfinite(entry["value"]) for entry in summary["scores"].values())
