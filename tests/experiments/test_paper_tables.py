"""The table of methods on a checkpoint of one's own: its autoencoder, its dry run, and its cells."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_models import tiny_checkpoint, tiny_vae

import qdit_jax as qdit
from qdit_jax.calibration import Items

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments/tables"


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    before = set(sys.modules)
    yield importlib.import_module("paper_tables")
    for name in set(sys.modules) - before:
        if str(EXPERIMENTS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("tables")
    qdit.save(base / "model", tiny_checkpoint())
    qdit.save(base / "vae", tiny_vae())
    for channels in (1, 3):
        images = np.full((4, 8, 8, channels), 9, np.uint8)
        np.savez(base / f"images{channels}.npz", arr_0=images)
    return base


@pytest.fixture
def run(tables, tmp_path, monkeypatch):
    def main(*options):
        given = ["--out", tmp_path / "out", "--num-samples", 2, "--steps", 2, "--batch-size", 2]
        argv = ["paper_tables.py", *given, "--methods", "rtn", "--bits", "w8a8", *options]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        tables.main()

    return main


def test_latents_are_not_scored_as_images(folder, run, monkeypatch, tables, tmp_path):
    monkeypatch.setattr(tables, "bed_of", None)  # nothing is sampled
    model = ["--checkpoint", f"mine={folder / 'model'}"]
    reference = ["--reference", folder / "images3.npz"]
    with pytest.raises(SystemExit) as refused:
        run(*model, *reference)
    told = str(refused.value)
    assert "mine makes samples of 4 channels" in told
    assert "needs images of 3" in told
    assert "--vae FOLDER" in told
    vae = ["--vae", folder / "vae"]
    with pytest.raises(SystemExit, match=r"mine makes samples of 3 channels, and .* images of 1"):
        run(*model, *vae, "--reference", folder / "images1.npz", "--out", tmp_path / "grey")
    with pytest.raises(TypeError, match="NoneType"):  # it goes on to sample
        run(*model, *vae, *reference, "--out", tmp_path / "decoded")


def test_the_dry_run_says_what_its_time_leaves_out(folder, run, capsys):
    model = ["--checkpoint", f"mine={folder / 'model'}", "--vae", folder / "vae"]
    run(*model, "--reference", folder / "images3.npz", "--dry-run")
    told = capsys.readouterr().out
    assert "1 cells are left" in told
    assert "quantizing, and decoding and scoring, are not in that time" in told


def test_an_autoencoder_belongs_to_a_checkpoint(folder, run, capsys):
    with pytest.raises(SystemExit):
        run("--vae", folder / "vae")
    assert "it goes with --checkpoint" in capsys.readouterr().err


@pytest.mark.slow
def test_a_cell_says_its_transforms(tables, folder):
    checkpoint = tables.State(folder / "model", vae=str(folder / "vae")).read()
    settings = {"num_samples": 2, "steps": 1, "batch_size": 2, "guidance": 1.5, "seeds": [0]}
    args = argparse.Namespace(**settings, out=folder)
    noise = np.random.default_rng(0).standard_normal((2, 4, 4, 4)).astype(np.float32)
    items = Items(
        noise, np.array([10, 500], np.float32), np.arange(2, dtype=np.int32), np.arange(2)
    )
    full = tables.latents(checkpoint, None, args, 0)
    bed = tables.Bed("mine", checkpoint, None, items, {0: full})
    found = tables.cell(bed, tables.Entry("rtn", 16), "w8a8", None, args)
    assert found["transforms"] == {}
    assert tables.images_of(checkpoint, full, 2).shape == (2, 8, 8, 3)
