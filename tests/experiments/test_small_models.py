"""The text and the video model that experiments train: their data, layouts and outliers."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import random_params

import qdit_jax as qdit
from qdit_jax.demo import embed_captions
from qdit_jax.models.latte import Latte
from qdit_jax.models.pixart import PixArt

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments" / "testbeds"
TEXT = PixArt(
    sample_size=8,
    stored_positions=True,
    patch_size=4,
    in_channels=1,
    hidden_size=64,
    depth=2,
    num_heads=2,
    mlp_width=128,
    text_length=5,
    text_width=32,
)
VIDEO = Latte(
    input_size=8, num_frames=2, patch_size=4, in_channels=1, hidden_size=64, depth=2, num_heads=2
)
MODELS = pytest.mark.parametrize("model", [TEXT, VIDEO], ids=["text", "video"])


@pytest.fixture
def script(monkeypatch):
    """Returns a function from the name of a script to its module."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(EXPERIMENTS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def digits(tmp_path):
    """Returns a file of two pictures: a block of light in the middle, labeled 3 and 8."""
    images = np.zeros((2, 28, 28), np.uint8)
    images[:, 10:18, 12:16] = 255
    np.savez(tmp_path / "digits.npz", images=images, labels=np.array([3, 8]))
    return tmp_path / "digits.npz"


@MODELS
def test_the_written_layout_is_converted_back(script, model, tmp_path):
    script("published_layout").write_published(
        tmp_path / "a.safetensors", params := random_params(model), dtype=np.float32
    )
    found = script("testbed_measures").read_checkpoint(tmp_path / "a.safetensors", 2)
    assert type(found.model) is type(model)
    assert (found.model.depth, found.model.hidden_size) == (2, 64)
    jax.tree.map(np.testing.assert_array_equal, found.params, params)


@MODELS
def test_injection_keeps_the_function_and_makes_outliers(script, model):
    injector = script("inject_outliers")
    checkpoint = qdit.Checkpoint(model, random_params(model))
    params = injector.inject(checkpoint, injector.Injection())
    assert injector.largest_change(checkpoint, params) < 1e-5
    for layer in (("attn", "qkv"), ("mlp", "fc1")):
        before, after = (
            np.sort(np.abs(np.asarray(p["blocks_1"][layer[0]][layer[1]]["kernel"])).max(1))
            for p in (checkpoint.params, params)
        )
        assert after[-1] > 2 * before[-1]
        assert after[0] < before[0] / 2


def test_blocks_that_share_a_modulation_get_the_same_channels(script):
    injector = script("inject_outliers")
    checkpoint = qdit.Checkpoint(TEXT, random_params(TEXT))
    params = injector.inject(checkpoint, injector.Injection())
    ratios = [
        np.asarray(params[block]["mlp"]["fc1"]["kernel"])
        / np.asarray(checkpoint.params[block]["mlp"]["fc1"]["kernel"])
        for block in ("blocks_0", "blocks_1")
    ]
    np.testing.assert_allclose(ratios[0], ratios[1], rtol=1e-4)
    assert np.ptp(ratios[0][:, 0]) > 1


def test_a_drawn_picture_has_the_embedding_of_its_caption(script, digits):
    placed = script("placed_digits")
    data = jax.tree.map(jnp.asarray, placed.load_captioned(str(digits)))
    pictures, condition = placed.draw_captioned(data, jax.random.key(0), 64)
    assert pictures.shape == (64, 16, 16, 1)
    texts = ["a large three", "a small eight, left", "a small three, top, inverted"]
    wanted = embed_captions(texts)
    for row in range(len(texts)):
        same = [
            i
            for i in range(64)
            if np.array_equal(condition["text"][i], wanted["text"][row])
            and np.array_equal(condition["text_mask"][i], wanted["text_mask"][row])
        ]
        assert same, texts[row]
        light = np.asarray(pictures)[same, ..., 0] > 0
        rows, columns = np.nonzero(light.mean(0) > 0.5)
        if row == 0:
            assert np.ptp(rows) >= 4
        if row == 1:
            assert columns.mean() < 6
        if row == 2:
            assert light.mean() > 0.5


def test_a_digit_moves_evenly_and_stays_inside(script, digits):
    placed = script("placed_digits")
    data = jax.tree.map(jnp.asarray, placed.load_moving(str(digits)))
    videos, labels = placed.draw_moving(data, jax.random.key(1), 32)
    assert videos.shape == (32, 8, 16, 16, 1)
    assert set(np.unique(labels)) == {3, 8}
    light = np.asarray(videos)[..., 0] + 1
    np.testing.assert_allclose(light.sum((2, 3)), light.sum((2, 3)).mean(), rtol=1e-4)
    centers = (light.sum(3) * np.arange(16)).sum(2) / light.sum((2, 3))  # [B, F], rows
    speed = np.abs(np.diff(centers, axis=1))
    # One speed but for the frames at which it turns.
    assert (speed <= speed.max(1, keepdims=True) + 1e-4).all()
    assert (np.abs(speed - speed.max(1, keepdims=True)) < 1e-3).mean() > 0.6
    assert speed.max() == pytest.approx(0.5, abs=1e-3)


def test_noise_above_the_signal_weighs_as_the_sample_does(script):
    training = script("training")
    snr = jnp.array([100.0, 5.0, 1.0, 0.5, 0.125, 0.01])
    plain = training.loss_weights(snr, 5.0)
    np.testing.assert_allclose(plain, [0.05, 1, 1, 1, 1, 1], rtol=1e-6)
    found = training.loss_weights(snr, 5.0, noisy_weight=8.0)
    np.testing.assert_allclose(found, [0.05, 1, 1, 2, 8, 8], rtol=1e-6)


def test_a_continued_training_has_every_point_of_its_curve_once(script, tmp_path):
    training = script("training")
    path = tmp_path / "curve.csv"
    training.cut_curve(path, 0)
    path.write_text("100,2.0,0.1\n200,1.5,0.1\n300,1.2,0.1\n")
    training.cut_curve(path, 200)
    assert path.read_text() == "100,2.0,0.1\n200,1.5,0.1\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_captioned", "train_moving"])
def test_a_stopped_training_goes_on_and_can_be_tuned_further(script, digits, tmp_path, name):
    trainer = script(name)
    data = ["--data", str(digits), "--batch-size", "4"]
    for steps in ("100", "200"):
        options = ["--model", "tiny", "--save-every", "100", "--steps", steps]
        trainer.main([*options, *data, "--out", str(tmp_path)])
    lines = (tmp_path / "curve.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["100", "200"]
    assert float(lines[1].split(",")[1]) < float(lines[0].split(",")[1])
    assert (tmp_path / "samples.png").exists()
    (weights,) = tmp_path.glob("*.safetensors")
    out = tmp_path / "tuned.safetensors"
    few = ["--steps", "50", "--judged", "4", "--num-heads", "2"]
    script("finetune_digits").main([str(weights), str(out), *data, *few])
    assert out.exists()
