"""URLs: what is saved to a bucket comes back, and no reader there finds half a checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_models import tiny_checkpoint, tiny_vae

from qdit_jax import checkpoint as checkpoints
from qdit_jax.calibration import Stats
from qdit_jax.cli import main
from qdit_jax.errors import UserError
from qdit_jax.files import as_path, files_below, replaced_folder, write_arrays
from qdit_jax.metrics import image_batches
from qdit_jax.ptq import quantize_checkpoint, quantize_params
from qdit_jax.recipes import Recipe
from qdit_jax.report import write_report


def same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_a_checkpoint_goes_to_a_bucket_and_back(bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = tiny_checkpoint()
    recipe = Recipe.preset("w4a8", whole.params, group_size=16)
    small = checkpoints.Checkpoint(
        whole.model, quantize_params(whole.params, recipe=recipe), recipe, {"a": 1}, tiny_vae()
    )
    checkpoints.save("gs://b/small", small)
    found = checkpoints.load("gs://b/small")
    same(found.params, small.params)
    same(found.vae.params, small.vae.params)
    assert (found.recipe, found.metadata) == (recipe, {"a": 1})
    lazy = checkpoints.open_checkpoint("gs://b/small")
    same(checkpoints.materialized(lazy).params, small.params)
    checkpoints.save("gs://b/small.safetensors", small)
    same(checkpoints.load("gs://b/small.safetensors").params, small.params)
    assert checkpoints.exported_parts("gs://b/small.safetensors")["model"]["metadata"] == {"a": 1}
    # What pathlib makes of a URL is the URL, and no folder of that name.
    same(checkpoints.load(Path("gs://b/small")).params, small.params)
    assert os.listdir(tmp_path) == []
    with pytest.raises(UserError, match=r"gs://b/small exists already"):
        checkpoints.save("gs://b/small", small)
    with pytest.raises(UserError, match=r"gs://b/absent does not exist"):
        checkpoints.load("gs://b/absent")


def test_a_checkpoint_is_quantized_from_bucket_to_bucket(bucket):
    whole = tiny_checkpoint()
    recipe = Recipe.preset("w4a8", whole.params, group_size=16)
    checkpoints.save("gs://b/whole", whole)
    quantize_checkpoint("gs://b/whole", "gs://b/small", recipe=recipe)
    same(checkpoints.load("gs://b/small").params, quantize_params(whole.params, recipe=recipe))
    for out in ("gs://b/whole", "gs://b", "gs://b/whole/params/x"):
        with pytest.raises(UserError, match="the input gs://b/whole"):
            quantize_checkpoint("gs://b/whole", out, recipe=recipe, overwrite=True)


def test_the_marker_is_removed_first_and_written_last(bucket, monkeypatch):
    order = []
    remove = bucket.rm_file
    opened = bucket._open

    def open_noted(self, path, mode="rb", **options):
        if "w" in mode:
            order.append(f"write {path}")
        return opened(self, path, mode=mode, **options)

    def remove_noted(self, path):
        order.append(f"remove {path}")
        return remove(self, path)

    monkeypatch.setattr(bucket, "_open", open_noted)
    monkeypatch.setattr(bucket, "rm_file", remove_noted)
    model = json.dumps({"format_version": 1, "family": "f", "config": {}, "params": {}})
    for _ in range(2):
        with replaced_folder("gs://b/out", overwrite=True) as folder:
            (folder / "params").mkdir()
            (folder / "model.json").write_text(model)
            (folder / "params/z").write_text("z")
    begin = ["write /b/out/params/z", "write /b/out/model.json"]
    middle = ["remove /b/out/model.json", "remove /b/out/params/z"]
    assert [line.replace("gs://", "/") for line in order] == [*begin, *middle, *begin]


def test_a_stranger_in_a_bucket_is_kept(bucket):
    as_path("gs://b/out/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not a checkpoint"):
        checkpoints.save("gs://b/out", tiny_checkpoint(), overwrite=True)
    assert files_below(as_path("gs://b/out")) == ["notes.txt"]


def test_recipes_statistics_samples_and_reports(bucket):
    recipe = Recipe.preset("w4a8", group_size=16)
    as_path("gs://b/recipe.json").write_text(json.dumps(recipe.to_json()))
    assert Recipe.from_json("gs://b/recipe.json") == recipe
    stats = Stats(np.array([9, 1]), {"a": np.zeros((2, 3))}, {"a": np.ones((2, 3))})
    stats.save("gs://b/stats.npz")
    stats.save("gs://b/stats.npz")
    np.testing.assert_array_equal(Stats.load("gs://b/stats.npz").high["a"], np.ones((2, 3)))
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    write_arrays("gs://b/images.npz", {"arr_0": images})
    np.testing.assert_array_equal(next(image_batches("gs://b/images.npz", 8)), images)
    write_report("gs://b/report.html", "title", [])
    assert "title" in as_path("gs://b/report.html").read_text()


def test_the_command_line_takes_urls(bucket, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    whole = tiny_checkpoint(in_channels=1)
    checkpoints.save("gs://b/whole", whole)
    options = ("--recipe", "w4a8", "--group-size", "16", "--method", "rtn")
    assert main(["quantize", "gs://b/whole", "gs://b/small", *options]) == 0
    assert main(["inspect", "gs://b/small"]) == 0
    options = ("--num-samples", "3", "--batch-size", "2", "--steps", "2")
    assert main(["sample", "gs://b/small", *options, "--out", "gs://b/samples.npz"]) == 0
    assert next(image_batches("gs://b/samples.npz", 8)).shape == (3, 4, 4, 1)
    assert os.listdir(tmp_path) == []
    names = {name.partition("/")[0] for name in files_below(as_path("gs://b"))}
    assert names == {"whole", "small", "samples.npz"}
    assert main(["inspect", "https://host/small"]) == 2
    assert "https:// is not supported" in capsys.readouterr().err
