"""A family of convolutions without a condition goes the road as well: nothing assumes a class."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from tiny_models import quantized_layers, random_params
from toy_painter import ROW, ToyPainter

import qdit_jax as qdit
from qdit_jax.allocation import Rollouts
from qdit_jax.calibration import Items
from qdit_jax.diffusion import x0_prediction
from qdit_jax.evaluation import Contender, Protocol, run_evaluation, summarize
from qdit_jax.methods import CalibrationData
from qdit_jax.models import FAMILIES
from qdit_jax.sampling import checkpoint_sampler

BLOCKS = {f"{level}/{name}" for level in ("down", "middle", "up") for name in ("widen", "narrow")}


@pytest.fixture(autouse=True)
def painter(monkeypatch):
    monkeypatch.setitem(FAMILIES, ROW.name, ROW)


@pytest.fixture(scope="module")
def checkpoint():
    model = ToyPainter()
    return qdit.Checkpoint(model, random_params(model))


def quantized(checkpoint, name="w8a8"):
    recipe = qdit.Recipe.preset(name, checkpoint, group_size=8)
    params = qdit.quantize_params(checkpoint.params, recipe=recipe)
    return dataclasses.replace(checkpoint, params=params, recipe=recipe)


def test_the_sampler_reads_what_the_network_predicts(checkpoint):
    sampler = checkpoint_sampler(checkpoint, 3)
    assert sampler.predict_fn is x0_prediction
    with pytest.raises(ValueError, match="this model predicts sample; use ddim or ddpm"):
        checkpoint_sampler(checkpoint, 3, sampler="flow")


def test_samples_are_counted_where_there_is_no_condition(checkpoint):
    sampler = checkpoint_sampler(checkpoint, 3)
    images = qdit.generate(checkpoint, sampler, None, num_samples=3, guidance=None, batch_size=2)
    assert images.shape == (3, 4, 4, 1)
    whole = qdit.generate(checkpoint, sampler, None, num_samples=3, guidance=None)
    np.testing.assert_allclose(images, whole, atol=1e-5)
    with pytest.raises(ValueError, match=r"condition=None .* give num_samples"):
        qdit.generate(checkpoint, sampler, None, guidance=None)
    by_default = qdit.generate(checkpoint, sampler, None, num_samples=3)
    np.testing.assert_array_equal(by_default, whole)
    with pytest.raises(ValueError, match="needs a null"):
        qdit.generate(checkpoint, sampler, None, num_samples=3, guidance=2.0)


def test_calibration_and_sequential_rounding(checkpoint, tmp_path):
    stats = qdit.calibrate(
        checkpoint, jax.random.key(0), 4, sampler=checkpoint_sampler(checkpoint, 2), batch_size=2
    )
    assert set(stats.halves) == {"conditional"}
    assert set(stats.low) >= BLOCKS
    items = qdit.collect_items(
        checkpoint, jax.random.key(1), 4, sampler=checkpoint_sampler(checkpoint, 2), batch_size=4
    )
    assert items.condition is None
    items.save(tmp_path / "items.npz")
    loaded = Items.load(tmp_path / "items.npz")
    assert loaded.condition is None
    np.testing.assert_array_equal(loaded.x, items.x)
    labelled = CalibrationData(items=items._replace(condition=items.sample))
    with pytest.raises(ValueError, match=r"data.items holds conditions PyTreeDef\(\*\), but"):
        qdit.quantize(checkpoint, "gptq", "w4a8", data=labelled)
    recipe = qdit.Recipe.preset("w4a8", checkpoint, group_size=8)
    params = qdit.round_params(checkpoint.model, checkpoint.params, items, recipe=recipe)
    assert quantized_layers(params) == BLOCKS


def test_evaluation_pairs_samples(checkpoint, tmp_path):
    contenders = [Contender("full", checkpoint), Contender("w8a8", quantized(checkpoint))]
    protocol = Protocol(checkpoint_sampler(checkpoint, 2), {}, 4, guidance=1.0, batch_size=2)
    run = run_evaluation(contenders, protocol, tmp_path / "run")
    summary = summarize(run, contenders, {})
    assert summary["paired"]["w8a8"]["latent_snr_db"]["estimate"] > 15


@pytest.mark.slow  # it compiles the network's rollouts
def test_search_finds_a_recipe(checkpoint):
    found = qdit.search(
        checkpoint,
        jax.random.key(2),
        budget="bitops=1.0x-g8",
        space={"group_sizes": (8, 16)},
        rollouts=Rollouts(
            num_steps=2, num_batches=1, batch_size=2, num_calibration=1, num_probes=2, guidance=None
        ),
    )
    assert {layer.path for layer in found.space.layers} == BLOCKS
