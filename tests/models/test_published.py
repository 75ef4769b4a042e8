"""The table of published networks: every family has one, and sizes are the published ones."""

from __future__ import annotations

import math

import jax
import pytest

from qdit_jax.models import FAMILIES, published_named
from qdit_jax.models.published import PUBLISHED_NETWORKS

# Millions of parameters, of published files.
MILLIONS = {
    "SD3.5-medium": 2469.7,
    "FLUX.1-dev": 11901.4,
    "Sana-0.6B": 592,
    "Sana-1.6B": 1604,
    "Z-Image-Turbo": 6155,
    "FLUX.2-klein-4B": 3876,
    "FLUX.2-klein-9B": 9079,
    "FLUX.2-dev": 32220,
}


def test_every_family_has_a_published_network():
    families = {name for name, row in FAMILIES.items() if row.is_diffusion}
    assert {row.family for row in PUBLISHED_NETWORKS} == families - {"sit"} | {"dit"}


@pytest.mark.parametrize("name", MILLIONS)
def test_a_published_network_has_its_size(name):
    model = published_named(name).build()
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs())["params"]
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert count / 1e6 == pytest.approx(MILLIONS[name], rel=2e-3)
