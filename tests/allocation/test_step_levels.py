"""Which steps get wider weights: the one where they matter, and what cannot be chosen, by name."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from tiny_models import tiny_checkpoint

import qdit_jax as qdit
from qdit_jax import diffusion
from qdit_jax.allocation import Rollouts, choose_steps, level_named, level_text, schedule_error
from qdit_jax.allocation.schedule_error import final_latents
from qdit_jax.ptq import schedule_act_bits
from qdit_jax.quant import OVER_TIME
from qdit_jax.recipes import OverTime, Recipe

KEY = jax.random.key(0)
# A flow whose second of four steps goes nearly all the way: errors of the others hardly matter.
SAMPLER = diffusion.flow_euler(4, sigmas=[1.0, 0.999, 0.002, 0.001, 0.0])
ROLLOUTS = Rollouts(sampler=SAMPLER, num_batches=1, batch_size=4)
LEVELS = ("w4a8", "w8a8")


def holding(full, steps, name="w4a8", **options):
    over_time = OverTime.at_steps((3.0, 2.0, 1.0, 0.0), steps)
    recipe = Recipe.preset(name, group_size=16, **options)
    return qdit.quantize(full, "rtn", dataclasses.replace(recipe, over_time=over_time))


@pytest.fixture(scope="module")
def full():
    return tiny_checkpoint(velocity=True)


@pytest.fixture(scope="module")
def both(full):
    return holding(full, {"0": "w8"})


def test_the_wider_weights_go_to_the_step_that_matters(both):
    # One step of w8a8 and three of w4a8 are 40 bit operations on average.
    found = choose_steps(both, KEY, levels=LEVELS, mean_bitops=40, rollouts=ROLLOUTS)
    assert found.over_time.weight_bits == (4, 8, 4, 4)
    assert found.over_time.act_bits == (8, 8, 8, 8)
    assert (found.mean_bits, found.mean_bitops) == (8, 40)
    assert found.levels == ((4, 8), (8, 8))
    assert found.by_step == ((4, 8), (8, 8), (4, 8), (4, 8))
    assert (found.errors[:, 1] == 0).all()
    assert found.errors[1, 0] > 100 * np.delete(found.errors[:, 0], 1).max()
    rows = {(row.weight_bits or (None,) * 4): row for row in found.candidates}
    assert rows[4, 8, 4, 4].measured == found.measured
    assert rows[8, 4, 4, 4].measured > 10 * found.measured
    assert all(row.mean_bitops <= 40 for row in rows.values())
    scheduled = schedule_act_bits(both, found.over_time)
    assert "kernel_w8" in scheduled.params["blocks_0"]["mlp"]["fc1"]
    assert scheduled.params[OVER_TIME].levels == [(4, 8), (8, 8)]


def test_errors_are_against_the_most_bits_of_either_side(both):
    # w8a16 is no level; beside it neither of these is without error.
    levels = ("w4a16", "w8a8")
    error_fn = schedule_error(both, KEY, levels=levels, rollouts=ROLLOUTS)
    assert error_fn.most == (8, 16)
    assert error_fn.costs == [64, 64]
    assert error_fn([(8, 16)] * 4) == 0
    size = final_latents._cache_size()
    every = {chosen: error_fn(chosen) for chosen in itertools.product(error_fn.levels, repeat=4)}
    assert final_latents._cache_size() == size
    assert min(every.values()) > 0
    found = choose_steps(both, KEY, levels=levels, mean_bitops=64, rollouts=ROLLOUTS)
    assert (found.errors > 0).all()
    assert found.measured == pytest.approx(every[found.by_step])
    assert found.over_time.weight_bits[1] == 8  # weights of 4 bits are the larger error


def test_levels_of_one_side_agree_with_act_bits(both):
    plain = schedule_act_bits(both, None)
    pairs = choose_steps(plain, KEY, levels=("a4", "8"), mean_bitops=20, rollouts=ROLLOUTS)
    acts = choose_steps(plain, KEY, act_bits=(4, 8), mean_bits=5, rollouts=ROLLOUTS)
    assert pairs.over_time == acts.over_time
    assert pairs.over_time.weight_bits is None
    assert (pairs.mean_bits, pairs.mean_bitops) == (acts.mean_bits, acts.mean_bitops) == (5, 20)
    np.testing.assert_array_equal(pairs.errors, acts.errors)


def test_a_number_format_may_be_left_at_some_steps_but_not_changed(full):
    found = holding(full, {"0": "w16"}, weight_format="nf4")
    chosen = choose_steps(
        found, KEY, levels=("own", "w16"), mean_bitops=(3 * 32 + 128) / 4, rollouts=ROLLOUTS
    )
    assert chosen.over_time.weight_bits == (None, 16, None, None)
    with pytest.raises(
        ValueError, match=r"level w8: over_time gives weights 8 bits .* is held at 4"
    ):
        choose_steps(found, KEY, levels=("own", "w8"), mean_bitops=50, rollouts=ROLLOUTS)


def test_names_of_levels_are_read_as_they_are_written():
    for name, level in (
        ("w4a8", (4, 8)), ("w8", (8, None)), ("a16", (None, 16)), ("own", (None, None))
    ):  # fmt: skip
        assert level_named(name) == level
        assert level_text(level) == name
    assert level_named("16") == (None, 16)
    assert (level_text(16), level_text(None)) == ("16", "own")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"levels": ("w4a8", "w6a8")}, r"level w6a8: .* weights 6 bits .*\(--steps-at 0=w6\)"),
        ({"levels": ("w4a8", "w9a8")}, "weight_bits=9 is not supported"),
        ({"levels": ("w4a8", "4/8")}, "bits='4/8' is not known"),
        ({"levels": ("w4a8", (4, 9))}, "level w4a9: act_bits=9 is not supported"),
        ({"levels": ("w4a8", "w4a8")}, r"levels=\['w4a8'\] leave no choice"),
        ({"levels": ("w4a8", "own")}, "levels w4a8 and own are the same for this checkpoint"),
        ({"mean_bitops": 31}, "mean_bitops=31 is below the fewest bit operations, 32"),
        ({"mean_bits": 8}, "mean_bits=8 is the budget of act_bits; give mean_bitops for levels"),
        ({"mean_bitops": None}, "mean_bitops=None leaves the budget of levels open"),
        ({"act_bits": (4, 8)}, r"act_bits=\[4, 8\] have no effect beside levels"),
    ],
)  # fmt: skip
def test_what_cannot_be_chosen_is_refused_by_name(both, given, message):
    with pytest.raises(ValueError, match=message):
        choose_steps(
            both, KEY, **{"levels": LEVELS, "mean_bitops": 40, "rollouts": ROLLOUTS, **given}
        )


def test_a_level_of_what_is_not_quantized_is_refused():
    weights = holding(tiny_checkpoint(), {"0": "w8"}, "w4a16")
    with pytest.raises(ValueError, match=r"level w8a8: .* activations, but none is quantized"):
        choose_steps(weights, KEY, levels=("w4", "w8a8"), mean_bitops=99)
    error_fn = schedule_error(weights, KEY, levels=("own", "w8"), rollouts=Rollouts(num_steps=2))
    assert error_fn.costs == [64, 128]
    with pytest.raises(ValueError, match=r"level w8: .* no kernel is quantized"):
        choose_steps(tiny_checkpoint(), KEY, levels=("own", "w8"), mean_bitops=99)
