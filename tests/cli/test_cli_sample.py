"""`qdit sample`: files written, options that do not fit refused in one sentence."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from tiny_models import CONFIG, random_params, tiny_vae

from qdit_jax import checkpoint as checkpoints
from qdit_jax.cli import sample
from qdit_jax.cli.options import Parser
from qdit_jax.cli.sample import chosen_labels
from qdit_jax.errors import UserError
from qdit_jax.models import DiT
from qdit_jax.ptq import quantize_params
from qdit_jax.recipes import Recipe


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Returns checkpoints: of gray pixels, of latents with and without decoder, of velocities."""
    base = tmp_path_factory.mktemp("checkpoints")
    configs = {
        "gray": {"in_channels": 1},
        "latents": {},
        "velocity": {"velocity": True},
        "no_null": {"null_class": False, "in_channels": 1},
    }
    for name, config in configs.items():
        model = DiT(**{**CONFIG, **config})
        checkpoints.save(base / name, checkpoints.Checkpoint(model, random_params(model)))
    checkpoints.save(base / "vae", tiny_vae())
    full = checkpoints.load(base / "gray")
    recipe = Recipe.preset("w4a16", full.params, group_size=16)
    params = quantize_params(full.params, recipe=recipe)
    checkpoints.save(base / "weights", checkpoints.Checkpoint(full.model, params, recipe))
    return base


def run(*arguments):
    parser = Parser(prog="qdit")
    sample.add_parser(parser.add_subparsers())
    args = parser.parse_args(["sample", *map(str, arguments)])
    return args.run(args)


def test_a_grid_of_gray_pictures(folders, tmp_path, capsys):
    out = tmp_path / "grid.png"
    run(folders / "gray", "--labels", "0-2", "--steps", 3, "--out", out)
    assert Image.open(out).size[0] >= 2 * 64
    printed = capsys.readouterr()
    assert "3 samples, DDIM 3 steps, guidance 1.5, full precision" in printed.out
    assert printed.err == ""  # no bar where there is no terminal


def test_weights_unpacked_at_the_start_give_the_same_samples(folders, tmp_path):
    for expand in ("per-call", "load"):
        options = ("--labels", "0-2", "--steps", 2, "--expand", expand)
        run(folders / "weights", *options, "--out", tmp_path / f"{expand}.npz")
    packed, unpacked = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("per-call", "load"))
    np.testing.assert_array_equal(unpacked, packed)


def test_an_archive_of_decoded_latents(folders, tmp_path):
    out = tmp_path / "samples.npz"
    options = ("--num-samples", 3, "--batch-size", 2, "--steps", 3, "--vae", folders / "vae")
    run(folders / "latents", *options, "--out", out)
    stored = np.load(out)
    assert stored["arr_0"].shape == (3, 8, 8, 3)
    assert stored["arr_0"].dtype == np.uint8
    np.testing.assert_array_equal(stored["label"], [0, 1, 2])


def test_modulation_before_the_loop_gives_the_same_latents(folders, tmp_path):
    for name, options in {"loop": (), "ahead": ("--hoist",)}.items():
        few = ("--labels", "0-2", "--steps", 3, "--batch-size", 2, *options)
        run(folders / "velocity", *few, "--out", tmp_path / f"{name}.npz")
    found, expected = (np.load(tmp_path / f"{name}.npz")["latents"] for name in ("ahead", "loop"))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_latents_alone_go_to_an_archive(folders, tmp_path):
    out = tmp_path / "latents.npz"
    run(folders / "velocity", "--labels", "1", "--steps", 3, "--guidance", 1, "--out", out)
    assert np.load(out)["latents"].shape == (1, 4, 4, 4)


def test_multi_step_samplers_take_their_options(folders, tmp_path, capsys):
    out, other = tmp_path / "a.npz", tmp_path / "b.npz"
    few = ("--num-samples", 2, "--steps", 3, "--guidance", 1)
    options = ("--sampler", "unipc", "--shift", 3, "--spacing", "wan")
    run(folders / "velocity", *few, *options, "--out", out)
    assert "2 samples, UniPC 3 steps" in capsys.readouterr().out
    run(folders / "velocity", *few, *options[:-2], "--out", other)
    difference = np.load(out)["latents"] - np.load(other)["latents"]
    assert 1e-6 < np.abs(difference).max() < 1
    run(folders / "gray", *few, "--sampler", "dpm-solver++", "--out", tmp_path / "c.png")
    assert "DPMSolver 3 steps" in capsys.readouterr().out


def test_labels_are_numbers_and_ranges_repeated_as_needed():
    assert chosen_labels("207,360", None, 1000).tolist() == [207, 360]
    assert chosen_labels("3, 7-9", 6, 10).tolist() == [3, 7, 8, 9, 3, 7]
    assert chosen_labels(None, 5, 3).tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("folder", "options", "message"),
    [
        ("gray", ("--labels", "9"), "label 9 is out of range"),
        ("gray", ("--labels", "cat"), "'cat' is not a class"),
        ("gray", ("--labels", "3-1"), "gives no class"),
        ("gray", ("--steps", "1001"), "1001 steps where the process has 1000"),
        ("gray", ("--steps", "0"), "positive number of steps"),
        ("gray", ("--eta", "2"), "eta=2.0 is not supported"),
        ("gray", ("--sampler", "ddpm", "--eta", "1"), "is an option of ddim"),
        ("gray", ("--sampler", "flow"), "this model predicts noise; use ddim or ddpm"),
        ("gray", ("--labels", "0-99999999999"), "label 99999999999 is out of range"),
        ("gray", ("--labels", "7" * 5000), "is out of range; this model knows 0 to 4"),
        ("gray", ("--num-samples", "0"), "--num-samples: '0' is not supported"),
        ("gray", ("--batch-size", "0"), "--batch-size: '0' is not supported"),
        ("gray", ("--columns", "0"), "--columns: '0' is not supported"),
        ("gray", ("--columns", "2", "--out", "x.npz"), "--columns 2 has no effect: an .npz"),
        ("gray", ("--guidance-channels", "99"), "guidance_channels=99 is more than the 1 channels"),
        ("gray", ("--guidance", "1", "--guidance-channels", "1"), "--guidance 1 guides none"),
        ("gray", ("--expand", "load"), "expanding weights .* has no effect: .* full precision"),
        ("gray", ("--numerics", "integer"), "no effect on this checkpoint: nothing is quantized"),
        ("gray", ("--vae", "{base}/vae"), "latents of 4 channels and the model has 1"),
        ("latents", ("--vae", "{base}/gray"), "is not an autoencoder but a DiT"),
        ("weights", ("--numerics", "integer"), "no layer quantizes its inputs as well"),
        ("velocity", ("--clip", "1", "--out", "x.npz"), "--clip 1.0 has no effect: flow"),
        ("velocity", ("--eta", "1", "--out", "x.npz"), "is an option of ddim"),
        ("gray", ("--out", "grid.jpg"), "must end with .png or .npz"),
        ("gray", ("--out", "grid.gif"), "this model makes images"),
        ("velocity", ("--shift", "3", "--out", "x.npz"), "--shift 3.0: .* of flow-euler, .*unipc"),
        (
            "gray",
            ("--shift", "3"),
            "--shift 3.0: shift=3.0 is an option of flow-euler, .*unipc, not",
        ),
        (
            "velocity",
            ("--sampler", "unipc", "--spacing", "karras", "--out", "x.npz"),
            "spacing='karras' is not known; use one of uniform",
        ),
        ("velocity", ("--sampler", "ddim"), "this model predicts a velocity; use flow"),
        ("velocity", ("--steps", "ddim25", "--out", "x.npz"), "flow takes a positive number"),
        ("latents", (), "holds no autoencoder"),
        ("vae", (), "generates no images by itself"),
        ("no_null", ("--steps", "2", "--guidance", "2"), "needs a null class"),
        ("absent", (), "does not exist"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    folders, tmp_path, monkeypatch, folder, options, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        run(folders / folder, *(option.format(base=folders) for option in options))
    assert not list(tmp_path.iterdir())


def test_samples_that_are_not_finite_are_not_written(folders, tmp_path):
    model = DiT(**{**CONFIG, "in_channels": 1})
    params = random_params(model)
    params["final_layer"]["linear"]["bias"] = params["final_layer"]["linear"]["bias"] * np.nan
    checkpoints.save(tmp_path / "broken", checkpoints.Checkpoint(model, params))
    out = tmp_path / "grid.png"
    with pytest.raises(UserError, match="4 of 4 samples 0 to 3 are not finite"):
        run(tmp_path / "broken", "--steps", 2, "--batch-size", 4, "--out", out)
    assert not out.exists()
