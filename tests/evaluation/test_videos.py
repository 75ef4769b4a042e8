"""Networks for videos are evaluated: errors by frame, flicker, the worst sample, FVD."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from tiny_models import random_params

import qdit_jax as qdit
from qdit_jax import evaluation, metrics, sampling
from qdit_jax.cli import evaluate
from qdit_jax.cli.options import Parser
from qdit_jax.models import FAMILIES, build_model

CONFIG = {**FAMILIES["latte"].examples[0], "in_channels": 3, "learn_sigma": False}
NUM_SAMPLES, STEPS = 6, 2


def first_values(videos):
    """Returns features of videos that stand for I3D's: a few of their pixels' means."""
    videos = np.asarray(videos, np.float32)
    return {"pool": videos.mean((2, 3))[:, :2].reshape(len(videos), -1) / 255}


@pytest.fixture(autouse=True)
def small_network_of_features(monkeypatch):
    monkeypatch.setattr(
        evaluation.scoring, "named_features", lambda names, *rest: (first_values, names[0])
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    model = build_model("latte", CONFIG)
    full = qdit.Checkpoint(model, random_params(model))
    recipe = qdit.Recipe.preset("w4a8", full, group_size=8)
    params = qdit.quantize_params(full.params, recipe=recipe)
    qdit.save(base / "full", full)
    qdit.save(base / "w4", dataclasses.replace(full, params=params, recipe=recipe))
    clips = np.random.default_rng(0).integers(0, 256, (20, *model.sample_shape()), np.uint8)
    (base / "clips").mkdir()
    np.savez(base / "clips/first.npz", clips[:12])
    np.savez(base / "clips/second.npz", clips[12:])
    return base


def run(*arguments):
    parser = Parser(prog="qdit")
    evaluate.add_parser(parser.add_subparsers())
    args = parser.parse_args(["evaluate", *map(str, arguments)])
    return args.run(args)


COMMON = (
    "--num-samples",
    NUM_SAMPLES,
    "--steps",
    STEPS,
    "--batch-size",
    3,
    "--clip",
    1,
    "--range-samples",
    0,
)


@pytest.fixture(scope="module")
def out(folders, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            evaluation.scoring, "named_features", lambda names, *rest: (first_values, names[0])
        )
        reference = ("--reference", folders / "clips", "--features", "i3d", "none")
        against = ("--against", folders / "full", "--min-samples", 3)
        run(folders / "w4", *against, *reference, *COMMON, "--out", path)
    return path


def clips_in(file):
    """Returns the clips in a file of 8 bits, in [-1, 1]."""
    return np.load(file)["arr_0"] / 127.5 - 1


def test_frames_and_the_worst_of_them_are_in_every_output(out):
    summary = json.loads((out / "metrics.json").read_text())
    full, w4 = (clips_in(out / name) for name in ("reference_samples.npz", "samples.npz"))
    by_frame = metrics.frame_snr_db(full, w4)
    found = summary["frames"]["w4"]["image_frame_db"]
    shards = [np.load(file)["1/image_frame_db"] for file in sorted(out.glob("shards/0*.npz"))]
    measured = np.concatenate(shards)
    is_far = by_frame < 25  # where 8 bits tell enough
    assert is_far.any()
    np.testing.assert_allclose(measured[is_far], by_frame[is_far], atol=0.2)
    np.testing.assert_allclose(found["mean"], measured.mean(0))
    np.testing.assert_allclose(found["worst"], measured.min(0))
    sample, frame = np.unravel_index(by_frame.argmin(), by_frame.shape)
    assert (found["worst_frame"]["sample"], found["worst_frame"]["frame"]) == (sample, frame)
    paired = summary["paired"]["w4"]
    worst = paired["image_worst_frame_db"]
    assert worst["estimate"] == pytest.approx(measured.min(1).mean())
    assert worst["worst"] == pytest.approx(by_frame.min(), abs=0.2)
    assert paired["image_snr_db"]["worst"] <= paired["image_snr_db"]["low"]
    snr = metrics.signal_to_noise_db(full, w4)
    assert paired["image_snr_db"]["worst_sample"] == snr.argmin()
    flicker = metrics.flicker_error(full, w4)
    assert paired["flicker_error"]["estimate"] == pytest.approx(flicker.mean(), rel=0.1)
    assert paired["flicker_error"]["worst_sample"] == flicker.argmax()
    for name, clips in (("full", full), ("w4", w4)):
        own = metrics.temporal_flickering(clips)
        assert summary["flickering"][name]["estimate"] == pytest.approx(own.mean(), rel=1e-3)
    page = (out / "report.html").read_text()
    for text in ("Frame by frame", "flicker error (less is closer)", "w4, worst", "by VBench"):
        assert text in page


def test_fvd_is_that_of_the_clips_in_files(folders, out, tmp_path):
    score = json.loads((out / "metrics.json").read_text())["scores"]
    assert score["w4"]["frechet_distance"]["label"] == "FVD"
    of_file = run(
        *("--samples", out / "samples.npz", "--reference", folders / "clips"),
        *("--features", "i3d", "none", "--min-samples", 3),
    )
    value = of_file["scores"]["frechet_distance"]["value"]
    assert score["w4"]["frechet_distance"]["value"] == pytest.approx(value)
    assert score["full"]["frechet_distance"]["value"] != value


def test_images_and_videos_are_not_scored_by_the_others_network(folders, tmp_path):
    with pytest.raises(ValueError, match="w4 makes or holds videos, and --features demo scores im"):
        run(folders / "w4", "--reference", folders / "clips", *COMMON, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "images.npz", images)
    with pytest.raises(ValueError, match="and --features i3d scores videos"):
        run(
            *("--samples", tmp_path / "images.npz", "--reference", tmp_path / "images.npz"),
            *("--features", "i3d", "none"),
        )


def test_shards_of_an_earlier_release_lack_what_is_new(folders, out, tmp_path):
    """A run that an earlier release began is finished, without what its shards do not have."""
    contenders = [evaluation.Contender(name, qdit.load(folders / name)) for name in ("full", "w4")]
    sampler = sampling.checkpoint_sampler(contenders[0].checkpoint, STEPS)
    protocol = evaluation.Protocol(sampler, {"steps": STEPS}, 4, batch_size=2, num_probed=0)
    done = evaluation.run_evaluation(contenders, protocol, tmp_path / "run")
    whole = evaluation.summarize(done, contenders)
    first = tmp_path / "run/shards/00000000.npz"
    with np.load(first) as data:
        kept = {k: v for k, v in data.items() if "frame" not in k and "flicker" not in k}
    np.savez(first, **kept)
    found = evaluation.summarize(done, contenders)
    assert "frames" not in found
    assert "flickering" not in found
    assert set(whole["paired"]["w4"]) - set(found["paired"]["w4"]) == {
        *("latent_worst_frame_db", "image_worst_frame_db", "flicker_error")
    }


def test_fvd_guides_a_search(folders):
    """The objective decodes whole videos, as sampling does."""
    from qdit_jax.allocation import Rollouts, frechet_objective, seeds

    vae_model = build_model("wan-vae", FAMILIES["wan-vae"].examples[0])
    vae = qdit.Checkpoint(vae_model, random_params(vae_model, scale=0.1))
    model = build_model("latte", {**CONFIG, "in_channels": vae_model.latent_channels})
    checkpoint = qdit.Checkpoint(model, random_params(model), vae=vae)
    rollout = Rollouts(num_steps=1).rollout(checkpoint, guided=True)
    data = seeds(model, jax.random.key(0), 1, 2)
    reference = metrics.Statistics(np.zeros(6), np.eye(6))
    objective = frechet_objective(checkpoint, rollout, data, first_values, reference, 1)
    videos = np.asarray(jax.jit(lambda p: objective.measure(p, 0))(checkpoint.params))
    assert videos.dtype == np.uint8
    final = rollout(checkpoint.params, *jax.tree.map(lambda a: a[0], data))
    expected = np.clip(np.round(127.5 * np.asarray(sampling.decode(vae, final)) + 127.5), 0, 255)
    assert np.abs(videos - expected).max() <= 1
    pool = first_values(videos)["pool"]
    own = metrics.statistics(metrics.moments(pool))
    expected_score = metrics.frechet_distance(
        reference.mean, reference.covariance, own.mean, own.covariance
    )
    assert objective.score(videos[None]) == pytest.approx(expected_score)
