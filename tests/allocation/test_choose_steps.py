"""Which steps get few bits: the budget is kept, and nothing cheaper to find does better."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from tiny_models import tiny_checkpoint

import qdit_jax as qdit
from qdit_jax.allocation import Rollouts, choose_steps, schedule_error
from qdit_jax.allocation.steps import final_latents
from qdit_jax.ptq import schedule_act_bits
from qdit_jax.quant import OVER_TIME

STEPS = 5
ROLLOUTS = Rollouts(num_steps=STEPS, num_batches=2, batch_size=4)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def checkpoint():
    recipe = qdit.Recipe.preset("w4a4", group_size=16)
    return qdit.quantize(tiny_checkpoint(depth=2), "rtn", recipe)


@pytest.fixture(scope="module")
def chosen(checkpoint):
    counted = []
    found = choose_steps(
        checkpoint, KEY, mean_bits=9.5, rollouts=ROLLOUTS, progress_fn=counted.append
    )
    assert sum(counted) == STEPS + 2
    return found


def test_the_schedule_keeps_the_budget_and_is_the_best_sum(chosen):
    assert chosen.levels == (None, 16)
    assert chosen.over_time.act_bits.count(16) == 2  # 2 x 16 + 3 x 4 bits are 8.8 on average
    assert chosen.mean_bits == pytest.approx(8.8)
    alone = chosen.errors[:, 0]
    assert (alone > 0).all()
    assert (chosen.errors[:, 1] == 0).all()
    assert chosen.predicted == pytest.approx(np.sort(alone)[:3].sum())
    kept = {i for i, bits in enumerate(chosen.over_time.act_bits) if bits == 16}
    assert kept == set(np.argsort(alone)[-2:].tolist())


def test_it_is_no_worse_than_the_mean_schedule_of_equal_cost(checkpoint, chosen):
    error_fn = schedule_error(checkpoint, KEY, rollouts=ROLLOUTS)
    assert error_fn(chosen.over_time.act_bits) == pytest.approx(chosen.measured)
    random = np.random.RandomState(0)
    others = [error_fn(random.permutation(chosen.over_time.act_bits).tolist()) for _ in range(6)]
    assert chosen.measured <= np.mean(others)


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
    with pytest.raises(ValueError, match="none is quantized"):
        choose_steps(tiny_checkpoint(), KEY, mean_bits=8, rollouts=ROLLOUTS)
