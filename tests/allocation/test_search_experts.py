"""A network of two experts is searched: each counts for the steps in which it runs."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from tiny_models import random_params

import qdit_jax as qdit
from qdit_jax.allocation import BitOps, Bytes, CpuCost, Rollouts, cost_table, search_space
from qdit_jax.cli import main
from qdit_jax.models import FAMILIES, build_model, expert_numbers, rows_per_sample, step_shares
from qdit_jax.sampling import checkpoint_sampler, sampler_timesteps

CONFIG = {**FAMILIES["wan"].examples[1], "boundary": 900.0}
STEPS = 4


@pytest.fixture(scope="module")
def full():
    model = build_model("wan", CONFIG)
    return qdit.Checkpoint(model, random_params(model))


def prompts(count=2):
    text = np.random.default_rng(5).standard_normal((count, 6, 12)).astype(np.float32)
    return {"text": text, "null_text": 0.1 * text[:1]}


def spaces(full):
    timesteps = sampler_timesteps(checkpoint_sampler(full, STEPS))
    rows = rows_per_sample(full.model)
    shares = step_shares(full.model, rows, timesteps)
    options = {"rows": rows, "group_sizes": (8, 16)}
    return (
        search_space(full.params, **options),
        search_space(full.params, shares=shares, **options),
        timesteps,
    )


def test_costs_count_an_expert_for_its_steps(full):
    """What the network computes on average over the steps: one expert's work, not both's."""
    plain, shared, timesteps = spaces(full)
    ran = expert_numbers(full.model, timesteps)
    assert 0 < ran.mean() < 1
    assert ran.mean() != 0.5  # the experts differ in their steps
    for cost in (BitOps(), CpuCost()):
        totals = {"high": 0.0, "low": 0.0}
        for one, other, layer in zip(
            cost_table(plain, cost), cost_table(shared, cost), plain.layers, strict=True
        ):
            name = layer.path.split("/")[0]
            share = np.mean(ran == ("high", "low").index(name))
            np.testing.assert_allclose(other, share * one)
            totals[name] += one[0]
        assert totals["high"] == pytest.approx(totals["low"])
        found = sum(row[0] for row in cost_table(shared, cost))
        assert found == pytest.approx(totals["high"])
    for one, other in zip(cost_table(plain, Bytes()), cost_table(shared, Bytes()), strict=True):
        np.testing.assert_array_equal(one, other)


def test_one_network_has_no_shares():
    model = build_model("wan", FAMILIES["wan"].examples[0])
    assert step_shares(model, rows_per_sample(model), [900.0, 100.0]) == {}


def test_a_sampler_that_leaves_an_expert_out_is_refused(full):
    rollouts = Rollouts(num_steps=1, num_batches=1, batch_size=1, conditions=prompts())
    with pytest.raises(ValueError, match="expert 'low' runs at none of the 1 timesteps"):
        qdit.search(full, jax.random.key(0), budget="bytes=1.0x-g16", rollouts=rollouts)


@pytest.mark.slow
def test_the_verb_searches_both(full, tmp_path):
    """The dear choices go to the expert where they count: the budget is that of a step on average."""
    qdit.save(tmp_path / "wan", full)
    np.savez(tmp_path / "prompts.npz", **prompts())
    status = main(
        [
            *("search", str(tmp_path / "wan"), str(tmp_path / "out")),
            *("--embeds", str(tmp_path / "prompts.npz"), "--guidance", "4,3"),
            *("--budget", "bitops=1.0x-g16", "--group-sizes", "8", "16", "--steps", str(STEPS)),
            *("--num-batches", "2", "--batch-size", "2"),
            *("--layers", r"(high|low)/blocks_0/(ffn_0|self_attn/o)"),
        ]
    )
    assert status == 0
    history = json.loads((tmp_path / "out/history.json").read_text())
    assert set(history["layers"]) == {
        f"{name}/blocks_0/{layer}" for name in ("high", "low") for layer in ("ffn_0", "self_attn/o")
    }
    assert history["cost"] <= history["limit"] * (1 + 1e-9)
    recipe = qdit.Recipe.from_json(tmp_path / "out/recipe.json")
    small = qdit.quantize(full, "rtn", recipe)
    assert set(recipe.resolve(full.params)) == set(history["layers"])
    made = qdit.generate(small, checkpoint_sampler(small, STEPS), prompts(), batch_size=2)
    assert np.isfinite(made).all()
