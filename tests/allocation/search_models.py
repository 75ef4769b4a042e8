"""Small networks with outlier channels, and rollouts of them, for the tests of the search."""

from __future__ import annotations

import importlib
from typing import Any

import jax
import numpy as np

from qdit_jax import ddim
from qdit_jax.allocation import Rollout
from qdit_jax.recipes import layer_paths
from qdit_jax.sampling import initial_noise
from qdit_jax.testing import realistic_dit

# As an attribute of the package, `search` is the function.
search = importlib.import_module("qdit_jax.allocation")

SIZES = (8, 16, 32, 64)


def small_model(depth: int = 1) -> tuple[Any, Any]:
    model, params = realistic_dit(0, hidden_size=64, depth=depth, num_heads=2, in_channels=2)
    return model, jax.tree.map(jax.numpy.asarray, params)


def small_space(params: Any, **settings: Any) -> Any:
    rows = dict.fromkeys(layer_paths(params), 16)  # tokens of 8x8 latents in patches of 2
    return search.search_space(params, **{"group_sizes": SIZES, "rows": rows, **settings})


def small_rollout(model: Any, num_steps: int = 3, guidance: float | None = 1.5) -> Rollout:
    return Rollout.of(model, ddim(steps=num_steps), guidance)


def batches_of_noise(model: Any, num_batches: int = 2, size: int = 3) -> tuple[Any, Any, Any]:
    index = np.arange(num_batches * size)
    noise, keys = initial_noise(jax.random.key(5), jax.numpy.asarray(index), model.sample_shape())
    label = jax.numpy.asarray(index % model.num_classes, np.int32)
    return (
        noise.reshape(num_batches, size, *noise.shape[1:]),
        label.reshape(num_batches, size),
        keys.reshape(num_batches, size),
    )


def names_of_choices(params: Any, **settings: Any) -> list[str]:
    """Returns what the choices of the first layer are called."""
    return [search.describe(spec) for spec in small_space(params, **settings).layers[0].choices]
