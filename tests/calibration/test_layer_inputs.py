"""Inputs of layers on single items: their extremes, their means, some rows; statistics of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import tiny_checkpoint
from told import Told

from qdit_jax.calibration import collect_items, item_statistics, layer_inputs
from qdit_jax.diffusion import ddim
from qdit_jax.models import seen_inputs

PATHS = ["blocks_0/attn/qkv", "blocks_0/mlp/fc2", "final_layer/linear"]


@pytest.fixture(scope="module")
def checkpoint():
    return tiny_checkpoint()


@pytest.fixture(scope="module")
def items(checkpoint):
    return collect_items(checkpoint, jax.random.key(0), 6, sampler=ddim(steps=3), batch_size=6)


def direct(checkpoint, items, path):
    """Returns all rows of a layer's input, `[items, tokens, K]`."""
    seen = []

    def look(name, x):
        if name == path:
            seen.append(np.asarray(x))

    with seen_inputs(look):
        checkpoint.model.apply(
            {"params": checkpoint.params},
            jnp.asarray(items.x),
            jnp.asarray(items.timestep),
            jnp.asarray(items.condition),
        )
    return seen[0]


def test_extremes_and_means_are_those_of_all_rows_and_rows_are_some_of_them(checkpoint, items):
    chosen = np.arange(len(items.x))[1::2]
    found = layer_inputs(
        checkpoint.model, checkpoint.params, items, chosen, PATHS, num_rows=12, batch_size=5
    )
    assert list(found) == PATHS
    for path in PATHS:
        rows = direct(checkpoint, items, path)[chosen].reshape(-1, found[path].rows.shape[1])
        np.testing.assert_allclose(found[path].low, rows.min(0), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found[path].high, rows.max(0), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found[path].absmax, np.abs(rows).max(0), rtol=1e-4, atol=1e-4)
        assert 12 <= len(found[path].rows) <= 12 + len(range(0, len(chosen), 5))
        apart = np.abs(found[path].rows[:, None] - rows[None]).max(-1).min(1)
        assert apart.max() < 1e-4


def test_what_is_not_finite_is_refused_by_the_layer_s_name(checkpoint, items):
    broken = items._replace(x=np.where(items.x == items.x[0, 0, 0, 0], np.nan, items.x))
    with pytest.raises(ValueError, match=r"the input of blocks_0/attn/qkv .*"):
        layer_inputs(checkpoint.model, checkpoint.params, broken, np.arange(4), PATHS)


@pytest.mark.parametrize("per_timestep", [False, True])
def test_statistics_of_items_are_ranges_of_their_rows(checkpoint, items, per_timestep):
    told = Told()
    stats = item_statistics(
        checkpoint.model,
        checkpoint.params,
        items,
        per_timestep=per_timestep,
        num_tokens=2,
        batch_size=4,
        progress_fn=told.tell,
    )
    steps = np.unique(items.timestep)[::-1] if per_timestep else [items.timestep.mean()]
    np.testing.assert_allclose(stats.timesteps, steps, rtol=1e-6)
    for path in PATHS:
        rows = direct(checkpoint, items, path)
        for number, step in enumerate(steps):
            own = rows[items.timestep == step] if per_timestep else rows
            own = own.reshape(-1, rows.shape[-1])
            np.testing.assert_allclose(stats.low[path][number], own.min(0), rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(stats.high[path][number], own.max(0), rtol=1e-4, atol=1e-4)
        assert stats.tokens[path].shape[0] == len(steps)
    counts = [int((items.timestep == s).sum()) for s in steps] if per_timestep else [len(items.x)]
    assert sum(told.counts) == sum(-(-n // 4) for n in counts)
