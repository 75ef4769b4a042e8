"""Which steps get few bits: the budget is kept, and nothing cheaper to find does better."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from tiny_models import tiny_checkpoint
from told import Told

import qdit_jax as qdit
from qdit_jax.allocation import Rollouts, ScheduleError, choose_steps, schedule_error
from qdit_jax.allocation.schedule_error import final_latents
from qdit_jax.allocation.step_candidates import candidates
from qdit_jax.ptq import schedule_act_bits
from qdit_jax.quant import OVER_TIME
from qdit_jax.recipes import OverTime

STEPS = 5
ROLLOUTS = Rollouts(num_steps=STEPS, num_batches=2, batch_size=4)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def checkpoint():
    recipe = qdit.Recipe.preset("w4a4", group_size=16)
    return qdit.quantize(tiny_checkpoint(depth=2), "rtn", recipe)


@pytest.fixture(scope="module")
def chosen(checkpoint):
    told = Told()
    found = choose_steps(
        checkpoint,
        KEY,
        mean_bits=9.5,
        rollouts=ROLLOUTS,
        progress_fn=told.tell,
    )
    assert sum(told.counts) == told.total == STEPS + len(found.candidates)
    return found


def test_the_schedule_keeps_the_budget_and_the_best_sum_is_a_candidate(chosen):
    assert chosen.levels == (None, 16)
    assert chosen.mean_bits == pytest.approx(8.8)  # 2 x 16 + 3 x 4 bits are 8.8 on average
    assert chosen.over_time.act_bits.count(16) == 2
    alone = chosen.errors[:, 0]
    assert (alone > 0).all()
    assert (chosen.errors[:, 1] == 0).all()
    by_sum = {row.name: row for row in chosen.candidates}["least predicted"]
    assert by_sum.predicted == pytest.approx(np.sort(alone)[:3].sum())
    kept = {i for i, bits in enumerate(by_sum.act_bits) if bits == 16}
    assert kept == set(np.argsort(alone)[-2:].tolist())
    assert min(row.predicted for row in chosen.candidates) >= by_sum.predicted - 1e-12


def test_it_is_never_worse_than_the_simple_schedules(checkpoint, chosen):
    error_fn = schedule_error(checkpoint, KEY, rollouts=ROLLOUTS)
    assert error_fn(chosen.over_time.act_bits) == pytest.approx(chosen.measured)
    rows = {row.act_bits: row for row in chosen.candidates}
    low, high = [None] * 3, [16] * 2
    for simple in (low + high, high + low, [16, *low, 16], [None, *high, *low[1:]], [None] * 5):
        assert rows[tuple(simple)].measured == pytest.approx(error_fn(simple))
        assert chosen.measured <= error_fn(simple)
    assert all(row.mean_bits <= 9.5 for row in rows.values())
    measured = [row.measured for row in chosen.candidates]
    assert measured == sorted(measured)
    assert measured[0] == chosen.measured


def test_it_goes_on_from_the_best_measured(checkpoint, chosen):
    once = choose_steps(checkpoint, KEY, mean_bits=9.5, rollouts=ROLLOUTS, num_rounds=0)
    assert {row.act_bits for row in once.candidates} < {row.act_bits for row in chosen.candidates}
    assert chosen.measured <= once.measured
    best = np.array([bits == 16 for bits in once.over_time.act_bits])
    more = {row.act_bits for row in chosen.candidates} - {row.act_bits for row in once.candidates}
    gaps = [sum(best != np.array([bits == 16 for bits in one])) for one in more]
    assert 2 in gaps  # two steps exchanged


def test_a_stopped_search_goes_on_where_it_was(checkpoint, chosen, tmp_path, monkeypatch):
    given = {"mean_bits": 9.5, "rollouts": dataclasses.replace(ROLLOUTS, state=tmp_path / "state")}
    calls = []
    original = ScheduleError.__call__

    def counted(self, levels):
        calls.append(levels)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, levels)

    monkeypatch.setattr(ScheduleError, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        choose_steps(checkpoint, KEY, **given)
    found = choose_steps(checkpoint, KEY, **given)
    assert len(calls) == 1 + STEPS + len(chosen.candidates)  # the fourth was asked for twice
    assert found.to_json() == chosen.to_json()
    with pytest.raises(qdit.UserError, match="another search: mean_bits was 9"):
        choose_steps(checkpoint, KEY, **{**given, "mean_bits": 9})


def test_candidates_of_three_levels_keep_the_budget():
    random = np.random.default_rng(0)
    costs = (4.0, 6.0, 8.0)
    for mean in (4.0, 5.3, 6.0, 7.9, 8.0, 20.0):
        errors = random.exponential(size=(7, 3)) * [4, 2, 0]
        found = candidates(errors, costs, mean, 4)
        for schedule in found:
            assert sum(costs[level] for level in schedule) <= 7 * mean + 1e-6
        names = list(found.values())
        assert names[0] == "least predicted"
        assert mean < 4.5 or "more bits last" in names or (2,) * 7 in found


def test_no_schedule_compiles_anew(checkpoint):
    error_fn = schedule_error(checkpoint, KEY, rollouts=ROLLOUTS)
    error_fn((None,) * STEPS)
    size = final_latents._cache_size()
    error_fn((16, None, 16, None, None))
    assert final_latents._cache_size() == size


def test_three_levels_and_a_free_budget(checkpoint):
    found = choose_steps(
        checkpoint, KEY, mean_bits=16, act_bits=(4, 6, 8), rollouts=Rollouts(num_steps=2, num_batches=1, batch_size=2)
    )  # fmt: skip
    assert found.over_time.act_bits == (8, 8)
    assert found.predicted == found.measured == 0
    assert (found.errors[:, 0] > found.errors[:, 1]).all()
    assert schedule_act_bits(checkpoint, found.over_time).params[OVER_TIME].bits == (8,)


def test_what_cannot_be_chosen_is_refused(checkpoint):
    with pytest.raises(ValueError, match="mean_bits=3 is below the fewest bits, 4"):
        choose_steps(checkpoint, KEY, mean_bits=3, rollouts=ROLLOUTS)
    with pytest.raises(ValueError, match="leave no choice"):
        choose_steps(checkpoint, KEY, mean_bits=8, act_bits=(8, 8), rollouts=ROLLOUTS)
    recipe = dataclasses.replace(
        qdit.Recipe.preset("w4a4", group_size=16), over_time=OverTime((900.0,), (None,), (8,))
    )
    scheduled = qdit.quantize(tiny_checkpoint(), "rtn", recipe)
    with pytest.raises(
        ValueError, match="weights change over time, which a schedule of activations"
    ):
        choose_steps(scheduled, KEY, mean_bits=8, rollouts=ROLLOUTS)
    with pytest.raises(ValueError, match="none is quantized"):
        choose_steps(tiny_checkpoint(), KEY, mean_bits=8, rollouts=ROLLOUTS)
