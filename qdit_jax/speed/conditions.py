"""What a timed step is conditioned on: classes, given prompts, or random ones.

Dimensions: B samples.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from qdit_jax.checkpoint import Checkpoint
from qdit_jax.models import NULL, OF_PROMPT, null_condition_of
from qdit_jax.sampling import cyclic_conditions
from qdit_jax.types import Condition


def conditions_of(
    checkpoint: Checkpoint, batch: int, seed: int, conditions: Condition = None
) -> Condition:
    """Returns given conditions or the network's classes in turn, else random prompts, B of them."""
    model = checkpoint.model
    if conditions is None and model.all_conditions() is None:
        random = random_condition(model.example_condition(batch), seed)
        return with_null(checkpoint, random)
    return cyclic_conditions(model, conditions, np.arange(batch, dtype=np.int32))


def random_condition(example: Condition, seed: int) -> Condition:
    """Returns a condition of an example's shapes: normal numbers, zeros of whole ones, all True."""
    rng = np.random.default_rng(seed)

    def values(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return rng.normal(size=leaf.shape).astype(leaf.dtype)
        return np.full(leaf.shape, leaf.dtype == bool, leaf.dtype)

    return jax.tree.map(values, example)


def with_null(checkpoint: Checkpoint, condition: Condition) -> Condition:
    """Returns random conditions with themselves as null, where the network has none of its own."""
    model = checkpoint.model
    if not model.has_null or not isinstance(condition, Mapping):
        return condition
    try:
        jax.eval_shape(
            lambda params: null_condition_of(model, params, condition), checkpoint.params
        )
    except ValueError:  # it says that the null must be given
        null = {f"{NULL}{name}": condition[name] for name in OF_PROMPT if name in condition}
        return {**condition, **null}
    return condition
