"""Every verb that writes: what is not its own is refused before anything is computed."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
from tiny_models import CONFIG, random_params, tiny_checkpoint, tiny_vae

from qdit_jax import checkpoint as checkpoints
from qdit_jax.calibration import Stats
from qdit_jax.cli import main
from qdit_jax.evaluation import sample_file
from qdit_jax.models import DiT

FAST = ("--steps", "2", "--num-samples", "2", "--batch-size", "2")
SEARCH = (
    "--steps", "2", "--num-batches", "1", "--batch-size", "2", "--group-sizes", "8", "16", "--method",
    "qdit-paper", "--population", "2", "--generations", "1", "--budget", "bitops=1.0x-g16",
)  # fmt: skip
BENCH = (
    "--batch", "1", "--recipes", "w4a8-g16", "--repeats", "2", "--numerics", "simulated",
    "--implementation", "xla",
)  # fmt: skip
QUANTIZE = ("--recipe", "w4a8", "--group-size", "16", "--method", "rtn")
# Verb, options; CKPT and OUT stand for paths.
WRITERS = {
    "quantize": ("quantize", "CKPT", "OUT", *QUANTIZE, "--force"),
    "search": ("search", "CKPT", "OUT", *SEARCH, "--force"),
    "export": ("export", "CKPT", "OUT.safetensors", "--force"),
    "calibrate": ("calibrate", "CKPT", "OUT.npz", *FAST, "--force"),
    "collect": ("calibrate", "CKPT", "OUT.npz", *FAST, "--collect", "spread", "--force"),
    "samples": ("sample", "CKPT", "--out", "OUT.npz", *FAST, "--force"),
    "grid": ("sample", "CKPT", "--out", "OUT.png", *FAST, "--force"),
    "inspect": ("inspect", "CKPT", "--stats", "--out", "OUT", *FAST, "--force"),
    "evaluate": ("evaluate", "CKPT", "--out", "OUT", *FAST, "--force"),
    "bench": ("bench", "CKPT", "OUT", *BENCH, "--force"),
    "verify": ("verify", "CKPT", "--against", "CKPT", "--out", "OUT.json", *FAST, "--force"),
}
FOLDERS = ("quantize", "search", "inspect", "evaluate", "bench")


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    path = tmp_path_factory.mktemp("lost") / "ckpt"
    checkpoints.save(path, tiny_checkpoint(in_channels=1))
    return path


def run(verb, ckpt, out):
    given = [str(part).replace("OUT", str(out)).replace("CKPT", str(ckpt)) for part in verb]
    return main(given)


def contents(folder):
    return {str(p.relative_to(folder)): p.is_file() and p.read_bytes() for p in folder.rglob("*")}


@pytest.mark.parametrize("name", WRITERS)
def test_somebody_s_things_are_kept(ckpt, tmp_path, name, capsys):
    out = tmp_path / "out"
    if name in FOLDERS:
        out.mkdir()
        for file in ("report.html", "recipe.json", "photo.jpg"):
            (out / file).write_text("mine")
    for suffix in (".npz", ".png", ".safetensors", ".json"):
        out.with_suffix(suffix).write_text("mine")
    before = contents(tmp_path)
    assert run(WRITERS[name], ckpt, out) == 2
    assert "replaced" in capsys.readouterr().err
    assert contents(tmp_path) == before


PLACES = {"inside": WRITERS, "link": WRITERS, "same": FOLDERS, "around": FOLDERS}


@pytest.mark.parametrize(("where", "name"), [(at, name) for at in PLACES for name in PLACES[at]])
def test_the_input_is_kept(ckpt, tmp_path, name, where, capsys):
    box = tmp_path / "box"
    shutil.copytree(ckpt, box / "ckpt")
    (tmp_path / "link").symlink_to(box / "ckpt")
    out = {
        "inside": box / "ckpt/out",
        "link": tmp_path / "link/out",
        "same": tmp_path / "box/../box/ckpt",
        "around": box,
    }[where]
    before = contents(tmp_path)
    assert run(WRITERS[name], box / "ckpt", out) == 2
    assert "the input" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_without_force_no_file_is_replaced(ckpt, tmp_path, capsys):
    Stats(np.zeros(1), {"a": np.zeros((1, 2))}, {}).save(tmp_path / "out.npz")
    before = contents(tmp_path)
    for name in ("calibrate", "samples"):
        verb = [part for part in WRITERS[name] if part != "--force"]
        assert run(verb, ckpt, tmp_path / "out") == 2
        assert "exists already; choose another path, or pass --force" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_the_demonstration_renews_its_own_folder_alone(tmp_path, capsys):
    runs = tmp_path / "runs"
    checkpoints.save(runs / "model", tiny_checkpoint())
    before = contents(tmp_path)
    assert main(["demo", "--out", str(runs), "--quick"]) == 2
    assert "is not a demonstration" in capsys.readouterr().err
    (runs / "demo.json").write_text('{"demonstration": {}}')
    (runs / "report.html").write_text("mine")
    assert main(["demo", "--out", str(runs), "--quick"]) == 2
    assert "report.html is not a report" in capsys.readouterr().err
    (runs / "report.html").unlink()
    (runs / "demo.json").unlink()
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "options",
    [
        ("--budget", "bytes=5"),
        ("--layers", "nothing"),
        ("--pin", "x"),
        ("--objective", "frechet"),
        ("--method", "luck"),
    ],
)
def test_a_search_that_cannot_begin_leaves_nothing(ckpt, tmp_path, options):
    options = [*SEARCH, *options]
    assert main(["search", str(ckpt), str(tmp_path / "out"), *options]) == 2
    assert os.listdir(tmp_path) == []


def test_a_forced_search_replaces_the_old_one_when_it_is_done(ckpt, tmp_path, capsys):
    out = tmp_path / "out"
    (out / "state/1/settings").mkdir(parents=True)
    history = {"method": "m", "budget": "b", "assignment": []}
    (out / "history.json").write_text(json.dumps(history))
    (out / "recipe.json").write_text("old")
    bad = [*SEARCH, "--budget", "bytes=5", "--force"]
    assert main(["search", str(ckpt), str(out), *bad]) == 2
    assert (out / "recipe.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]
    assert run(WRITERS["search"], ckpt, out) == 0
    assert json.loads((out / "recipe.json").read_text())["rules"]
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--columns", "0", "--out", "g.png"), "--columns: '0' is not supported"),
        (("--columns", "2", "--out", "s.npz"), "--columns 2 has no effect: an .npz has no grid"),
        (("--vae", "VAE"), "decodes latents of 4 channels and the model has 1"),
        (("--vae", "CKPT"), "is not an autoencoder but a DiT"),
        (("--batch-size", "0"), "--batch-size: '0' is not supported"),
        (("--seed", str(1 << 70)), "--seed"),
    ],
)
def test_samples_are_refused_before_the_first(ckpt, tmp_path, monkeypatch, options, told, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample_file, "generated_batches", None)
    checkpoints.save(tmp_path / "VAE", tiny_vae())
    given = [str(ckpt) if option == "CKPT" else option for option in options]
    assert main(["sample", str(ckpt), "--steps", "2", *given]) == 2
    assert told in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["VAE"]


class StoppedError(BaseException):
    """Stands for a kill."""


def test_stopped_samples_go_on_to_the_same_file(ckpt, tmp_path, monkeypatch, capsys):
    out, whole = tmp_path / "out.npz", tmp_path / "whole.npz"
    options = ["--num-samples", "5", "--batch-size", "2", "--steps", "2"]
    sample = ["sample", str(ckpt), *options, "--out"]
    assert main([*sample, str(whole)]) == 0
    make, made = sample_file.generated_batches, []

    def stopping(*given, **more):
        for start, images in make(*given, **more):
            if made:
                raise StoppedError
            made.append(start)
            yield start, images

    monkeypatch.setattr(sample_file, "generated_batches", stopping)
    with pytest.raises(StoppedError):
        main([*sample, str(out)])
    assert not out.exists()
    assert main([*sample, str(out), "--seed", "1"]) == 2
    told = capsys.readouterr().err
    assert "seed 0, not 1" in told
    assert "--force to start from scratch" in told
    monkeypatch.setattr(sample_file, "generated_batches", lambda *a, **k: seen(make(*a, **k), made))
    assert main([*sample, str(out)]) == 0
    assert "resuming from 2 of 5 samples" in capsys.readouterr().out
    assert made == [0, 2, 4]
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["out.npz", "whole.npz"]
    assert main([*sample, str(out), "--seed", "1", "--force"]) == 0
    assert out.read_bytes() != whole.read_bytes()


def seen(batches, made):
    for start, images in batches:
        made.append(start)
        yield start, images


def test_samples_begun_with_other_settings_give_way_to_force(ckpt, tmp_path, monkeypatch):
    out = tmp_path / "out.npz"
    sample = ["sample", str(ckpt), *FAST, "--out", str(out)]
    make = sample_file.generated_batches

    def stopping(*given, **more):
        yield from make(*given, **more)
        raise StoppedError

    monkeypatch.setattr(sample_file, "generated_batches", stopping)
    with pytest.raises(StoppedError):
        main(sample)
    monkeypatch.setattr(sample_file, "generated_batches", make)
    assert main([*sample, "--seed", "3"]) == 2
    assert main([*sample, "--seed", "3", "--force"]) == 0
    assert os.listdir(tmp_path) == ["out.npz"]


def test_samples_that_are_not_finite_leave_no_batches(tmp_path):
    model = DiT(**{**CONFIG, "in_channels": 1})
    params = random_params(model)
    params["final_layer"]["linear"]["bias"] = params["final_layer"]["linear"]["bias"] * np.nan
    checkpoints.save(tmp_path / "broken", checkpoints.Checkpoint(model, params))
    assert main(["sample", str(tmp_path / "broken"), *FAST, "--out", str(tmp_path / "a.npz")]) == 2
    assert os.listdir(tmp_path) == ["broken"]
