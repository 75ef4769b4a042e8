"""A state folder is taken up by the very same search only: every setting, one at a time."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from search_models import small_model
from told import Told

import qdit_jax as qdit
from qdit_jax.allocation import EvolutionSettings, Evolve, Priced, Rollouts, search
from qdit_jax.errors import UserError

SETTINGS = EvolutionSettings(2, 1, 2, 1, 1)
ROLLOUTS = Rollouts(num_steps=1, num_batches=1, batch_size=1, guidance=None)


def spread(params, key):
    return params["blocks_0"]["mlp"]["fc1"]["kernel"].std()


def other_spread(params, key):
    return 2 * params["blocks_0"]["mlp"]["fc1"]["kernel"].std()


def cost(layer, spec):
    return float(spec.weight.group_size)


def dearer(layer, spec):
    return spec.weight.group_size + 1.0


def base():
    return {
        "checkpoint": qdit.Checkpoint(*small_model()),
        "key": jax.random.key(4),
        "budget": Priced("mine=50", {"mine": cost}),
        "objective": spread,
        "strategy": Evolve(SETTINGS),
        "space": {"group_sizes": (8, 16)},
        "rollouts": ROLLOUTS,
    }


def last_value_changed(checkpoint):
    params = jax.tree.map(lambda leaf: leaf, checkpoint.params)
    bias = np.array(params["final_layer"]["linear"]["bias"])
    bias[-1] += 1e-7 + abs(bias[-1]) * 1e-6
    params["final_layer"]["linear"]["bias"] = jnp.asarray(bias)
    return dataclasses.replace(checkpoint, params=params)


def with_rollouts(**changes):
    return lambda given: {"rollouts": dataclasses.replace(ROLLOUTS, **changes)}


CHANGES = {
    "one value of the weights": lambda g: {"checkpoint": last_value_changed(g["checkpoint"])},
    "the network": lambda g: {
        "checkpoint": dataclasses.replace(
            g["checkpoint"], model=g["checkpoint"].model.clone(mlp_norm_eps=1e-5)
        )
    },
    "the key": lambda g: {"key": jax.random.key(5)},
    "the budget": lambda g: {"budget": Priced("mine=51", {"mine": cost})},
    "what a cost counts": lambda g: {"budget": Priced("mine=50", {"mine": dearer})},
    "the objective": lambda g: {"objective": other_spread},
    "the objective's kind": lambda g: {"objective": "paired"},
    "the strategy's numbers": lambda g: {
        "strategy": Evolve(dataclasses.replace(SETTINGS, mutation_probability=0.2))
    },
    "the space": lambda g: {"space": {"group_sizes": (8, 16), "weight_bits": 3}},
    "zero points": lambda g: {"space": {"group_sizes": (8, 16), "weight_symmetric": True}},
    "steps": with_rollouts(num_steps=2),
    "the sampler": with_rollouts(sampler=qdit.ddim(1, eta=0.5)),
    "guidance": with_rollouts(guidance=2.0),
    "batches": with_rollouts(num_batches=2),
    "samples of a batch": with_rollouts(batch_size=2),
    "calibration": with_rollouts(num_calibration=1),
    "probes": with_rollouts(num_probes=3),
    "conditions": with_rollouts(conditions=np.array([1, 2])),
}


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    folder = tmp_path_factory.mktemp("state")
    run(folder)
    return folder


def run(folder, **changes):
    settings = {**base(), **changes}
    checkpoint, key = settings.pop("checkpoint"), settings.pop("key")
    rollouts = dataclasses.replace(settings.pop("rollouts"), state=folder)
    return search(checkpoint, key, rollouts=rollouts, **settings)


@pytest.mark.parametrize("name", CHANGES)
def test_another_search_is_refused(state, name):
    with pytest.raises(UserError, match="holds the state of another search"):
        run(state, **CHANGES[name](base()))


def test_the_same_search_and_another_number_of_devices_go_on(state):
    told = Told()
    again = run(state, rollouts=dataclasses.replace(ROLLOUTS, per_device=2), progress_fn=told.tell)
    assert not told.counts  # nothing was measured again
    assert again.history["measured"] == run(state).history["measured"]
