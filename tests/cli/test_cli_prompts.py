"""Verbs on a network that takes prompts: `--embeds`, `--prompts-from`, `--size` and `--frames`."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_models import CONFIG, random_params, tiny_vae
from toy_family import ROW, ToyVideo, prompts
from toy_painter import ROW as PAINTER
from toy_painter import ToyPainter

import qdit_jax as qdit
from qdit_jax.cli import main
from qdit_jax.models import FAMILIES, DiT, build_model

TEXTS = ("a red fox", "a blue fox", "two foxes")
STEPS = ("--steps", "2", "--batch-size", "2")


@pytest.fixture(autouse=True)
def families(monkeypatch):
    monkeypatch.setitem(FAMILIES, ROW.name, ROW)
    monkeypatch.setitem(FAMILIES, PAINTER.name, PAINTER)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Returns a folder with checkpoints of the toy families, and files of conditions."""
    base = tmp_path_factory.mktemp("prompts")
    FAMILIES[ROW.name], FAMILIES[PAINTER.name] = ROW, PAINTER
    try:
        model = ToyVideo(depth=1, hidden_size=16)
        full = qdit.Checkpoint(model, random_params(model))
        qdit.save(base / "video", full)
        qdit.save(base / "decoded", dataclasses.replace(full, vae=tiny_vae()))
        recipe = qdit.Recipe.preset("w4a8", full, group_size=8)
        params = qdit.quantize_params(full.params, recipe=recipe)
        qdit.save(base / "small", dataclasses.replace(full, params=params, recipe=recipe))
        painter = ToyPainter()
        qdit.save(base / "painter", qdit.Checkpoint(painter, random_params(painter)))
        gray = DiT(**{**CONFIG, "in_channels": 1})
        qdit.save(base / "gray", qdit.Checkpoint(gray, random_params(gray)))
    finally:
        del FAMILIES[ROW.name], FAMILIES[PAINTER.name]
    qdit.write_conditions(base / "p.npz", prompts(), TEXTS)
    null = {f"null_{name}": entry for name, entry in prompts(1).items()}
    qdit.write_conditions(base / "null.npz", {**prompts(), **null}, TEXTS)
    return base


def run(*arguments):
    return main([str(one) for one in arguments])


def refused(capsys, *arguments):
    assert run(*arguments) == 2
    return capsys.readouterr().err


def sampled(base, out, *options):
    assert run("sample", base / "video", *STEPS, "--out", out, "--force", *options) == 0
    return np.load(out)


def test_prompts_are_sampled_in_turn(base, tmp_path):
    out = tmp_path / "out.npz"
    found = sampled(base, out, "--embeds", base / "p.npz", "--num-samples", 4)
    assert found["latents"].shape == (4, 2, 4, 4, 4)
    assert found["row"].tolist() == [0, 1, 2, 0]
    assert found["prompts"].tolist() == [*TEXTS, TEXTS[0]]
    checkpoint = qdit.load(base / "video")
    expected = qdit.generate(
        checkpoint, qdit.ddim(2), {n: e[[0, 1, 2, 0]] for n, e in prompts().items()}, batch_size=2
    )
    np.testing.assert_allclose(found["latents"], expected, atol=1e-5)
    chosen = sampled(base, out, "--embeds", base / "p.npz", "--prompts-from", "2,0-1")
    assert chosen["prompts"].tolist() == [TEXTS[2], *TEXTS[:2]]


def test_the_null_of_the_file_is_what_guidance_uses(base, tmp_path):
    out = tmp_path / "out.npz"
    with_null, own = (
        sampled(base, out, "--embeds", base / name, "--guidance", 3)["latents"]
        for name in ("null.npz", "p.npz")
    )
    assert np.abs(with_null - own).max() > 1e-3
    unguided = [
        sampled(base, out, "--embeds", base / name, "--guidance", 1)["latents"]
        for name in ("null.npz", "p.npz")
    ]
    np.testing.assert_array_equal(*unguided)


def test_a_size_is_of_latents_without_an_autoencoder_and_of_pixels_with_one(base, tmp_path, capsys):
    out = tmp_path / "out.npz"
    options = ("--embeds", base / "p.npz", "--prompts-from", "0")
    found = sampled(base, out, *options, "--size", "6x8", "--frames", 3)
    assert found["latents"].shape == (1, 3, 6, 8, 4)
    assert "--size 6x8: rows x columns of latents" in capsys.readouterr().out
    assert run("sample", base / "decoded", *STEPS, *options, "--size", "8x12", "--out", out, "--force") == 0  # fmt: skip
    assert np.load(out)["arr_0"].shape == (1, 2, 8, 12, 3)
    assert "--size 8x12: pixels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("checkpoint", "options", "message"),
    [
        ("video", ("--size", "5x4"), "the network cannot take samples of shape (2, 5, 4, 4)"),
        ("decoded", ("--size", "9x8"), "makes 2x2 pixels of every latent; use multiples, such as 8x8"),
        ("gray", ("--size", "8x8"), "the network cannot take samples of shape (8, 8, 1): x has shape"),
        ("gray", ("--frames", "2"), "--frames 2 does not fit: this network makes images"),
        ("video", ("--size", "64"), "--size: '64' cannot be read; write rows x columns"),
    ],
)  # fmt: skip
def test_a_size_that_does_not_fit_is_refused(base, tmp_path, capsys, checkpoint, options, message):
    embeds = () if checkpoint == "gray" else ("--embeds", base / "p.npz")
    out = ("--out", tmp_path / "out.npz")
    text = refused(capsys, "sample", base / checkpoint, *embeds, *STEPS, *options, *out)
    assert message in text
    assert not list(tmp_path.iterdir())


def test_videos_are_clips_and_rows_of_frames(base, tmp_path):
    options = ("--embeds", base / "p.npz", "--steps", 2)
    for name in ("clip.gif", "grid.png"):
        assert run("sample", base / "decoded", *options, "--out", tmp_path / name) == 0
    clip = Image.open(tmp_path / "clip.gif")
    assert clip.n_frames == 2
    grid = Image.open(tmp_path / "grid.png")
    assert grid.height > grid.width  # three rows of two frames
    assert run("sample", base / "decoded", *options, "--out", tmp_path / "clip.gif", "--force") == 0


def test_an_mp4_needs_its_package(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "imageio", None)
    options = ("--embeds", base / "p.npz", "--out", tmp_path / "clip.mp4")
    text = refused(capsys, "sample", base / "decoded", *options)
    assert "pip install 'qdit-jax[video]'" in text
    text = refused(capsys, "sample", base / "gray", "--out", tmp_path / "clip.gif")
    assert "this model makes images" in text


def test_no_autoencoder_decodes_latents_of_another(tmp_path, capsys):
    """Open-Sora 1.2 has the 4 channels of many an autoencoder of images, which would decode nonsense."""
    model = build_model("stdit3", FAMILIES["stdit3"].examples[0])
    qdit.save(tmp_path / "stdit3", qdit.Checkpoint(model, random_params(model)))
    qdit.save(tmp_path / "vae", tiny_vae())
    example = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), model.example_condition(1))
    np.savez(tmp_path / "p.npz", **example)
    options = ("sample", tmp_path / "stdit3", "--embeds", tmp_path / "p.npz", "--guidance", 1)
    for more in (("--out", tmp_path / "c.gif"), ("--vae", tmp_path / "vae", "--out", "c.npz")):
        text = refused(capsys, *options, *more)
        assert "Open-Sora 1.2's video autoencoder is not supported" in text
        assert "--out latents.npz" in text


NEEDED = "takes prompts (text, text_mask); give --embeds FILE"


@pytest.mark.parametrize(
    "arguments",
    [
        ("sample", "video"),
        ("calibrate", "video", "{out}/s.npz"),
        ("search", "video", "{out}/s", "--budget", "bitops=1.0x-g8"),
        ("evaluate", "video", "--num-samples", "2", "--out", "{out}/e"),
        ("verify", "small", "--against", "video"),
        ("schedule", "small", "{out}/s", "--mean-bits", "6", "--act-bits", "4", "8"),
        ("quantize", "video", "{out}/q", "--recipe", "w4a8", "--method", "gptq"),
        ("quantize", "video", "{out}/q", "--recipe", "w4a8", "--method", "gptq", "--weight-timesteps"),
    ],
)  # fmt: skip
def test_verbs_say_that_prompts_are_missing(base, tmp_path, capsys, arguments):
    verb, name, *options = arguments
    given = [option.format(out=tmp_path) for option in options]
    given = [base / word if word == "video" else word for word in given]
    assert NEEDED in refused(capsys, verb, base / name, *given)


def test_quantize_by_default_names_the_method_that_needs_no_prompts(base, tmp_path, capsys):
    given = ("quantize", base / "video", tmp_path / "q", "--recipe", "w4a8")
    message = refused(capsys, *given)
    assert NEEDED in message
    assert "Or use --method rtn, which looks at no inputs." in message
    assert "Or use" not in refused(capsys, *given, "--prompts-from", "0")
    assert run(*given, "--method", "rtn") == 0


@pytest.mark.parametrize(
    ("checkpoint", "options", "message"),
    [
        ("video", ("--prompts-from", "0"), "it chooses prompts of --embeds"),
        ("video", ("--embeds", "{base}/p.npz", "--prompts-from", "3"), "row 3 is out of range"),
        ("video", ("--embeds", "{base}/p.npz", "--prompts-from", "a"), "'a' is not a row"),
        ("video", ("--embeds", "{base}/p.npz", "--labels", "1"), "takes no class labels"),
        ("video", ("--embeds", "{base}/none.npz",), "none.npz does not exist; write it with"),
        ("gray", ("--embeds", "{base}/p.npz"), "takes class labels, not embeddings"),
        ("painter", ("--embeds", "{base}/p.npz"), "takes no condition, not embeddings"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(base, tmp_path, capsys, checkpoint, options, message):
    given = [option.format(base=base) for option in options]
    out = ("--out", tmp_path / "out.npz")
    assert message in refused(capsys, "sample", base / checkpoint, *STEPS, *given, *out)
    assert not list(tmp_path.iterdir())


def test_a_network_without_a_condition_is_sampled_too(base, tmp_path):
    out = tmp_path / "out.png"
    options = ("--guidance", 1, "--num-samples", 3, *STEPS, "--out", out)
    assert run("sample", base / "painter", *options) == 0
    assert Image.open(out).size[0] > 128


def test_sampling_resumes_with_the_same_content_of_a_file_only(base, tmp_path, capsys, monkeypatch):
    from qdit_jax.cli.progress import Bar

    def stop(self, count):
        raise KeyboardInterrupt

    out, copy = tmp_path / "out.npz", tmp_path / "copy.npz"
    arguments = ("sample", base / "video", *STEPS, "--out", out, "--embeds")
    with monkeypatch.context() as stopped:
        stopped.setattr(Bar, "update", stop)
        assert run(*arguments, base / "p.npz") == 130
    qdit.write_conditions(copy, {**prompts(), "text": prompts()["text"] + 1}, TEXTS)
    assert "holds a run with other settings (conditions" in refused(capsys, *arguments, copy)
    qdit.write_conditions(copy, prompts(), TEXTS)
    assert run(*arguments, copy) == 0
    assert "resuming from 2 of 3 samples" in capsys.readouterr().out


FEW = ("--num-samples", 2, *STEPS)


def test_statistics_and_items_see_the_null_of_the_file(base, tmp_path):
    embeds = ("--embeds", base / "null.npz", "--size", "4x6")
    stats, items = tmp_path / "stats.npz", tmp_path / "items.npz"
    assert run("calibrate", base / "video", stats, *FEW, *embeds) == 0
    null, own = (qdit.Stats.load(stats).halves[half] for half in ("null", "conditional"))
    assert not np.array_equal(null.low["caption"], own.low["caption"])
    # The null text is the first prompt, of which the ranges are then alone.
    first = prompts(1)["text"].reshape(-1, 12)
    np.testing.assert_allclose(null.low["caption"][0], first.min(0), rtol=1e-6)
    assert run("calibrate", base / "video", items, *FEW, "--collect", "spread", *embeds) == 0
    held = np.load(items)
    assert held["x"].shape[1:] == (2, 4, 6, 4)
    np.testing.assert_allclose(held["condition/text"][-1], prompts(1)["text"][0], rtol=1e-6)


def test_a_report_shows_videos_as_rows_of_frames(base, tmp_path, capsys):
    report = tmp_path / "report"
    arguments = ("evaluate", base / "decoded", "--embeds", base / "p.npz", "--size", "8x12", *FEW)
    arguments = (*arguments, "--range-samples", 0, "--out", report)
    assert run(*arguments, "--json") == 0
    assert json.loads(capsys.readouterr().out)["settings"]["shape"] == [2, 4, 6, 4]
    stored = np.load(report / "samples.npz")
    assert stored["arr_0"].shape == (2, 2, 8, 12, 3)
    assert stored["prompts"].tolist() == list(TEXTS[:2])
    width, height = Image.open(report / "pictures.png").size
    assert width > height / 2  # two rows of two frames, under a title
    assert "conditions" in refused(capsys, *arguments, "--prompts-from", "1-2")
    scored = (*arguments[:-1], tmp_path / "scored", "--reference", "demo")
    assert "makes or holds videos" in refused(capsys, *scored)


@pytest.mark.slow
def test_the_road_from_items_to_a_comparison(base, tmp_path):
    embeds = ("--embeds", base / "null.npz", "--size", "4x6")
    items, folder = tmp_path / "items.npz", tmp_path / "gptq"
    assert run("calibrate", base / "video", items, *FEW, "--collect", "spread", *embeds) == 0
    recipe = ("--recipe", "w4a8", "--group-size", 8, "--method", "gptq", "--holdout", 0.5)
    assert run("quantize", base / "video", folder, *recipe, "--items", items) == 0
    weighed = (*recipe, *FEW, *embeds, "--weight-timesteps")
    assert run("quantize", base / "video", tmp_path / "weighed", *weighed) == 0
    assert run("verify", folder, "--against", base / "video", "--no-timing", *FEW, *embeds) == 0
    options = ("--against", base / "video", *FEW, *embeds, "--out", tmp_path / "report")
    assert run("evaluate", folder, *options) == 0
    assert np.load(tmp_path / "report" / "samples.npz")["row"].tolist() == [0, 1]


@pytest.mark.slow
def test_search_schedule_and_bench_take_them(base, tmp_path, capsys):
    embeds, few = ("--embeds", base / "null.npz"), ("--steps", 2, "--batch-size", 2)
    sizes = ("--group-sizes", 4, 8, "--layers", "layers_0/mlp/.*")
    predicted = ("--budget", "bytes=1.0x-g8", "--objective", "predicted", "--size", "4x8")
    found = tmp_path / "search"
    assert run("search", base / "video", found, *embeds, *few, *sizes, *predicted) == 0
    assert (found / "recipe.json").exists()
    bits = ("--act-bits", 4, 8, "--mean-bits", 6, "--num-batches", 1)
    assert run("schedule", base / "small", tmp_path / "bits", *embeds, *few, *bits) == 0
    measured = ("--batch", 1, "--numerics", "simulated", "--repeats", 2, "--json")
    capsys.readouterr()
    assert run("bench", base / "small", *measured, *embeds) == 0
    given = json.loads(capsys.readouterr().out)["settings"]
    assert run("bench", base / "small", *measured) == 0
    printed = capsys.readouterr()
    assert "random embeddings" in printed.err
    assert "conditions" in given
    assert "conditions" not in json.loads(printed.out)["settings"]
