"""Networks of several experts, of which the timestep chooses one: each is watched and fitted alone.

Such a network has `experts`, the names of the entries of its parameter tree, and
`expert_of(timestep [B]) -> [B]`, which of them runs; its field `expert` has one run at all timesteps.

Dimensions: B batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Int

from qdit_jax.types import AnyArray, Numbers, Params


def experts_of(model: nn.Module) -> tuple[str, ...]:
    """Returns the names of the experts between which the timestep chooses; empty for one network."""
    names = getattr(model, "experts", ())
    return tuple(names) if len(names) > 1 else ()


def expert_numbers(model: Any, timesteps: Numbers) -> Int[np.ndarray, " B"]:
    """Returns which of `experts_of(model)` runs at each timestep."""
    return np.asarray(model.expert_of(jnp.asarray(timesteps, jnp.float32)))


def expert_alone(model: Any, params: Params, name: str) -> tuple[Any, Params]:
    """Returns the network that runs one expert at all timesteps, and its parameters.

    Layers keep their paths. Entries that are no expert's stay.
    """
    others = set(experts_of(model)) - {name}
    return model.clone(expert=name), {k: v for k, v in params.items() if k not in others}


def at_timestep(model: Any, params: Params, timestep: float) -> tuple[Any, Params]:
    """Returns the network and the parameters that run at one timestep."""
    names = experts_of(model)
    if not names:
        return model, params
    return expert_alone(model, params, names[expert_numbers(model, [timestep])[0]])


def runs_layer(model: Any, path: str, timestep: AnyArray) -> Bool[Array, " B"]:
    """Returns whether the layer `path` runs for each of the samples at these timesteps."""
    names, first = experts_of(model), path.split("/")[0]
    if first not in names:
        return jnp.ones(timestep.shape[:1], bool)
    return model.expert_of(timestep) == names.index(first)


def step_shares(model: Any, paths: Iterable[str], timesteps: Numbers) -> dict[str, float]:
    """Returns at which share of the timesteps each layer of an expert runs; others are left out."""
    names = experts_of(model)
    if not names:
        return {}
    numbers = expert_numbers(model, timesteps)
    shares = {name: float(np.mean(numbers == i)) for i, name in enumerate(names)}
    firsts = {path: path.split("/")[0] for path in paths}
    return {path: shares[first] for path, first in firsts.items() if first in shares}


def check_all_run(model: Any, timesteps: Numbers, what: str) -> None:
    """Raises `ValueError` if an expert runs at none of the timesteps of `what`."""
    names, given = experts_of(model), np.asarray(timesteps, np.float32)
    if not names:
        return
    seen = set(expert_numbers(model, given).tolist())
    for number, name in enumerate(names):
        if number not in seen:
            raise ValueError(
                f"the expert {name!r} runs at none of the {len(given)} timesteps of {what}; use more "
                "steps (--steps), so that both are seen."
            )


def merged(parts: Iterable[Mapping[str, Any]]) -> Params:
    """Returns one tree of those of experts alone."""
    return {name: entry for part in parts for name, entry in part.items()}
