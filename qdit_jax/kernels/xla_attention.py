"""Attention in plain XLA: the fallback on every platform, and the reference in tests.

Dimensions: B batch, Q and T query and key positions, H heads, D channels of a head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from qdit_jax.kernels.attention_call import AttentionImplementation, AttentionShapes, WeightsFn
from qdit_jax.types import AnyArray


def xla_attention(
    q: Float[AnyArray, "B Q H D"],
    k: Float[AnyArray, "B T H D"],
    v: Float[AnyArray, "B T H E"],
    mask: Bool[AnyArray, "_ _ _ T"] | None,
    scale: float,
    weights_fn: WeightsFn | None,
) -> Float[Array, "B Q H E"]:
    """Returns the products as two einsums with all weights in memory; it supports every call."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=wide) * scale
    if mask is None:
        weights = jax.nn.softmax(logits, axis=-1)
    else:
        lowest = jnp.finfo(wide).min
        weights = jax.nn.softmax(jnp.where(mask, logits, lowest), axis=-1)
        weights = jnp.where(mask, weights, 0)  # a row without any key is 0, not their mean
    weights = weights.astype(v.dtype)
    if weights_fn is not None:
        weights = weights_fn(weights)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def anything(shapes: AttentionShapes) -> None:
    """Returns None: plain XLA supports every call."""
    return None


XLA = AttentionImplementation("xla", xla_attention, anything)
