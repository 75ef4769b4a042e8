"""Attention in plain XLA: the fallback on every platform, and the reference in tests.

XLA's CPU compiler multiplies operands whose heads lie before their positions faster than others at most sizes (heads of
64 channels gain most), so there they are turned first; GPUs and TPUs choose layouts by themselves, and turned operands
take more memory.

Dimensions: B batch, Q and T query and key positions, H heads, D channels of a head, E of its values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from qdit_jax.kernels.attention_call import AttentionImplementation, AttentionShapes, WeightsFn
from qdit_jax.kernels.matmul import default_platform
from qdit_jax.types import AnyArray

Product = Callable[[AnyArray, AnyArray], Array]


def xla_attention(
    q: Float[AnyArray, "B Q H D"],
    k: Float[AnyArray, "B T H D"],
    v: Float[AnyArray, "B T H E"],
    mask: Bool[AnyArray, "_ _ _ T"] | None,
    scale: float,
    weights_fn: WeightsFn | None,
) -> Float[Array, "B Q H E"]:
    """Returns the products as two einsums with all weights in memory; it supports every call."""
    logits = products(q, k) * scale
    if mask is None:
        weights = jax.nn.softmax(logits, axis=-1)
    else:
        lowest = jnp.finfo(logits.dtype).min
        weights = jax.nn.softmax(jnp.where(mask, logits, lowest), axis=-1)
        weights = jnp.where(mask, weights, 0)  # a row without any key is 0, not their mean
    weights = weights.astype(v.dtype)
    if weights_fn is not None:
        weights = weights_fn(weights)
    return weighted(weights, v)


def products(
    q: Float[AnyArray, "B Q H D"], k: Float[AnyArray, "B T H D"]
) -> Float[Array, "B H Q T"]:
    """Returns every query times every key, in float32 or wider."""
    wide = jnp.promote_types(q.dtype, jnp.float32)

    def turned(q: AnyArray, k: AnyArray) -> Array:
        q, k = jnp.swapaxes(q, 1, 2), jnp.swapaxes(k, 1, 2)
        return jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=wide)

    def as_given(q: AnyArray, k: AnyArray) -> Array:
        return jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=wide)

    return turned_on_cpus(turned, as_given)(q, k)


def weighted(
    weights: Float[Array, "B H Q T"], v: Float[AnyArray, "B T H E"]
) -> Float[Array, "B Q H E"]:
    """Returns the sums of values by weights."""

    def turned(weights: AnyArray, v: AnyArray) -> Array:
        found = jnp.einsum("bhqk,bhkd->bhqd", weights, jnp.swapaxes(v, 1, 2))
        return jnp.swapaxes(found, 1, 2)

    def as_given(weights: AnyArray, v: AnyArray) -> Array:
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v)

    return turned_on_cpus(turned, as_given)(weights, v)


def turned_on_cpus(turned: Product, as_given: Product) -> Product:
    """Returns `turned` for programs of CPUs and `as_given` for others.

    Where a GPU or TPU is the default there is no branch: XLA optimizes less across one.
    """
    if default_platform() != "cpu":
        return as_given
    return partial(jax.lax.platform_dependent, cpu=turned, default=as_given)


def anything(shapes: AttentionShapes) -> None:
    """Returns None: plain XLA supports every call."""
    return None


XLA = AttentionImplementation("xla", xla_attention, anything)
