"""A network of two experts is searched: each counts for the steps in which it runs."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import random_params

import qdit_jax as qdit
from qdit_jax.allocation import BitOps, Bytes, CpuCost, Rollouts, cost_table, search_space
from qdit_jax.allocation.rollouts import OneStep, Rollout, seeds, step_experts
from qdit_jax.allocation.sensitivity import effects
from qdit_jax.cli import main
from qdit_jax.diffusion import flow_euler
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
def test_the_expert_that_runs_at_a_step_is_the_one_differentiated(full):
    """The effects are those of running both, and the other's parameters are never touched."""
    rows = {p: n for p, n in rows_per_sample(full.model).items() if p.endswith("_0/self_attn/o")}
    space = search_space(full.params, rows=rows, group_sizes=(8,), weight_bits=(4,))
    condition = {"text": jnp.asarray(prompts()["text"])}

    def found(params, sigmas, with_experts):
        units = {"flow_times": full.model.flow_times, "velocity_to": full.model.velocity_to}
        sampler = flow_euler(len(sigmas) - 1, sigmas=sigmas, **units)
        rollout = Rollout.of(full.model, sampler, 1.0)
        noise, _, keys = seeds(full.model, jax.random.key(1), 1, 2, conditions=prompts())
        return effects(
            OneStep(rollout),
            params,
            None,
            rollout.start(noise[0]),
            condition,
            keys[0],
            jax.random.key(2),
            experts=step_experts(rollout) if with_experts else None,
            space=space,
            num_steps=rollout.num_steps,
            num_probes=1,
        )

    both = [1.0, 0.95, 0.4, 0.0]
    mine, all_run = (found(full.params, both, with_experts) for with_experts in (True, False))
    assert (np.abs(mine.change) > 0).all()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), mine, all_run)
    lost = {**full.params, "low": jax.tree.map(lambda a: a * jnp.nan, full.params["low"])}
    alone = found(lost, [1.0, 0.96, 0.93, 0.0], True)
    assert np.isfinite(alone.change).all()
    ran = np.array([layer.path.startswith("high") for layer in space.layers])
    assert ((np.asarray(alone.change) != 0).all(axis=(0, 1, 3)) == ran).all()


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
