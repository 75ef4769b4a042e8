"""Every packaged model is converted by the ordinary road, small, and hard enough to compare methods on."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import qdit_jax as qdit
from qdit_jax.calibration import default_sampler
from qdit_jax.demo import PACKAGED, DemoSettings
from qdit_jax.models import asset

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments" / "testbeds"
NEW = pytest.mark.parametrize("name", [name for name in PACKAGED if name != "digits"])


@NEW
def test_the_weights_are_small_and_become_a_checkpoint(name, tmp_path):
    packaged = PACKAGED[name]
    assert asset(packaged.weights).stat().st_size < 2.5e6
    checkpoint = packaged.convert(tmp_path / name)
    conditions, prompts = packaged.conditions(), packaged.prompts()
    assert (conditions is None) == (prompts is None)
    condition = np.arange(2) if conditions is None else jax.tree.map(lambda a: a[:2], conditions)
    found = qdit.generate(checkpoint, default_sampler(checkpoint, 2), condition, batch_size=2)
    assert found.shape == (2, *checkpoint.model.sample_shape())
    assert np.isfinite(found).all()


@pytest.mark.slow
@NEW
def test_static_ranges_break_it_and_groups_mend_most(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    check = importlib.import_module("check_testbed")
    checkpoint = PACKAGED[name].convert(tmp_path / name)
    latents = check.sample_all(
        checkpoint,
        default_sampler(checkpoint, 10),
        check.recipes(32),
        num_samples=10,
        seeds=[0],
        guidance=PACKAGED[name].guidance,
    )
    mean = {title: found.mean() for title, found in check.decibels(latents).items()}
    assert mean[check.W8A8] > 25
    assert mean[check.STATIC] < 10
    assert mean[check.GROUPS] > mean[check.STATIC] + 8
    assert mean[check.A4_GROUPS] > mean[check.A4_TOKEN] + 3
    for module in [
        m for m in sys.modules.values() if str(EXPERIMENTS) in str(m.__dict__.get("__file__"))
    ]:
        del sys.modules[module.__name__]


@pytest.mark.parametrize("name", PACKAGED)
def test_guidance_is_the_models_own_unless_it_is_given(name):
    assert DemoSettings(model=name).scale == PACKAGED[name].guidance
    assert DemoSettings(model=name, guidance=1.0).scale == 1.0
