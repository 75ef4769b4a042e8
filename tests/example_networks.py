"""Small networks of every family in the table and of two toy families, with inputs that differ by sample."""

from __future__ import annotations

import json
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_family
import toy_painter
from tiny_models import random_params

from qdit_jax.models import FAMILIES, build_model

ROWS = (*FAMILIES.values(), toy_family.ROW, toy_painter.ROW)
EXAMPLES = [
    pytest.param(row, config, id=f"{row.name}-{i}")
    for row in ROWS
    for i, config in enumerate(row.examples)
]
DENOISING = [example for example in EXAMPLES if example.values[0].is_diffusion]


@cache
def params_of(model):
    return random_params(model)


def network(row, config):
    """Returns an example's network, as a checkpoint's configuration is read."""
    return build_model(row.name, json.loads(json.dumps(config)))


def conditions(model, batch):
    """Returns conditions that differ between samples, made of the example's shapes and dtypes."""
    every = model.all_conditions()
    if every is not None:
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[:batch], every)
    rng = np.random.default_rng(1)

    def drawn(path, leaf):
        name = path[-1].key if path else ""
        if leaf.dtype == bool:
            return jnp.asarray(np.arange(leaf.shape[-1]) < 2 + np.arange(batch)[:, None])
        if name in ("height", "width"):  # one size for all: latents of a batch have one shape
            return jnp.full(leaf.shape, {"height": 24.0, "width": 32.0}[name], leaf.dtype)
        values = rng.standard_normal(leaf.shape)
        return jnp.asarray(24 * np.exp(values) if name == "fps" else values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(drawn, model.example_condition(batch))


def inputs_of(model, batch=3):
    x = np.random.default_rng(0).standard_normal((batch, *model.sample_shape()))
    times = (10, 900)
    if model.prediction == "velocity":
        noise, data = model.flow_times
        # So near to both ends that both experts of a Wan A14B run.
        times = tuple(noise + share * (data - noise) for share in (0.03, 0.97))
    return jnp.asarray(x, jnp.float32), jnp.linspace(*times, batch), conditions(model, batch)
