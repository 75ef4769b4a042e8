"""`qdit.evaluate`: the whole comparison in one call, as the verb makes it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny_models import tiny_checkpoint
from told import Told

import qdit_jax as qdit
from qdit_jax.cli import main

SAMPLER = qdit.ddim(2)
SETTINGS = {"num_samples": 4, "batch_size": 2, "guidance": 1.5, "seed": 3}


@pytest.fixture(scope="module")
def pair():
    full = tiny_checkpoint()
    recipe = qdit.Recipe.preset("w4a8", full, group_size=16)
    return full, qdit.quantize(full, "rtn", recipe)


def test_a_pair_in_memory_is_compared_and_nothing_is_kept(pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    full, small = pair
    told = Told()
    found = qdit.evaluate(small, against=full, sampler=SAMPLER, progress_fn=told.tell, **SETTINGS)
    assert sum(told.counts) == 4
    assert [m["title"] for m in found["models"]] == ["full precision", "w4a8-g16"]
    closeness = found["paired"]["w4a8-g16"]["latent_snr_db"]
    assert 3 < closeness["low"] <= closeness["estimate"] <= closeness["high"] < 80
    assert (found["settings"]["sampler"], found["settings"]["steps"]) == ("DDIM", 2)
    assert not list(tmp_path.iterdir())


def test_it_is_what_the_verb_measures_and_resumes(pair, tmp_path):
    full, small = pair
    qdit.save(tmp_path / "full", full)
    qdit.save(tmp_path / "small", small)
    out = tmp_path / "out"
    found = qdit.evaluate(
        tmp_path / "small", against=tmp_path / "full", sampler=SAMPLER, out=out, **SETTINGS
    )
    assert json.loads((out / "metrics.json").read_text()) == json.loads(json.dumps(found))
    assert (out / "report.html").is_file()
    options = ["--steps", "2", "--num-samples", "4", "--batch-size", "2", "--seed", "3"]
    options += ["--guidance", "1.5", "--out", str(tmp_path / "verb"), "--range-samples", "0"]
    assert (
        main(["evaluate", str(tmp_path / "small"), "--against", str(tmp_path / "full"), *options])
        == 0
    )
    by_verb = json.loads((tmp_path / "verb/metrics.json").read_text())
    for name, entry in found["paired"]["small"].items():
        np.testing.assert_allclose(by_verb["paired"]["small"][name]["estimate"], entry["estimate"])
    again = Told()
    qdit.evaluate(
        *(tmp_path / "small",),
        against=tmp_path / "full",
        sampler=SAMPLER,
        out=out,
        progress_fn=again.tell,
        **SETTINGS,
    )
    assert again.counts == [4]  # all of them were on disk


def test_what_cannot_be_compared_is_refused(pair, tmp_path):
    full, small = pair
    with pytest.raises(ValueError, match="compare needs against=REFERENCE"):
        qdit.evaluate(small, compare=full)
    (tmp_path / "metrics.json").write_text("mine")
    with pytest.raises(qdit.UserError, match="metrics"):
        qdit.evaluate(small, against=full, sampler=SAMPLER, out=tmp_path, **SETTINGS)
    assert (tmp_path / "metrics.json").read_text() == "mine"


def test_many_models_are_rows_and_are_not_tested_two_by_two(pair, tmp_path):
    full, small = pair
    others = {f"other {i}": small for i in range(3)}
    found = qdit.evaluate(
        others, against=full, sampler=SAMPLER, num_probed=0, out=tmp_path / "out", **SETTINGS
    )
    assert [m["title"] for m in found["models"]] == ["full precision", *others]
    assert "comparison" not in found
    page = (tmp_path / "out/report.html").read_text()
    assert "the others: quantized, simulated numerics in float32" in page
    assert "<th>model</th><th>final latents: signal to error, dB</th>" in page
    assert "<tr><td>other 0</td>" in page
    with pytest.raises(ValueError, match="two checkpoints are called 'w4a8-g16'"):
        qdit.evaluate({"w4a8-g16": full}, against=small)
