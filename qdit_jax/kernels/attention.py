"""`attention`: the two products of attention and the softmax between them.

Dimensions: B batch, Q and T query and key positions, H heads, D channels of a head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from qdit_jax.types import AnyArray

# Rounds or records the softmax `[B, H, Q, T]`, which a fused kernel never holds as an array.
WeightsFn = Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class AttentionShapes:
    """A call before it runs: shapes and static settings, no values.

    Attributes:
        q_shape, k_shape: `[B, Q, H, D]` and `[B, T, H, D]`.
        mask_shape: None without a mask.
        sees_weights: whether there is a `weights_fn`, which rounds or records the softmax.
        dtype: name of the queries' dtype.
    """

    q_shape: tuple[int, ...]
    k_shape: tuple[int, ...]
    mask_shape: tuple[int, ...] | None
    sees_weights: bool
    dtype: str


@dataclasses.dataclass(frozen=True)
class AttentionImplementation:
    """One row of the table; `run` takes `(q, k, v, mask, scale, weights_fn)`."""

    name: str
    run: Callable[[AnyArray, AnyArray, AnyArray, AnyArray | None, float, WeightsFn | None], Array]
    unsupported_reason: Callable[[AttentionShapes], str | None]


def attention(
    q: Float[AnyArray, "B Q H D"],
    k: Float[AnyArray, "..."],  # [B, T, H, D], as is v; see `check_shapes`
    v: Float[AnyArray, "..."],
    mask: Shaped[AnyArray, "..."] | None = None,
    *,
    scale: float | None = None,
    weights_fn: WeightsFn | None = None,
    implementation: str | None = None,
) -> Float[Array, "B Q H D"]:
    """Returns `softmax(scale q k^T) v`, for each head, in the dtype of `v`.

    The softmax is computed in float32 or wider. Quantized operands are given already rounded.

    Args:
        mask: True where a query may look: `[B, T]`, or `[1 or B, 1 or H, 1 or Q, T]`. A query that may
            look nowhere gets 0.
        scale: `D ** -0.5` by default.
        weights_fn: applied to the softmax `[B, H, Q, T]`, for example to round it.
        implementation: a name in `ATTENTION_IMPLEMENTATIONS`; None takes the first that fits.

    Raises:
        ValueError: if shapes do not fit, or the implementation does not.
        TypeError: if the mask is not boolean.
    """
    check_shapes(q.shape, k.shape, v.shape)
    wide_mask = None if mask is None else checked_mask(mask, q.shape, k.shape)
    shapes = AttentionShapes(
        q.shape,
        k.shape,
        None if wide_mask is None else wide_mask.shape,
        weights_fn is not None,
        jnp.dtype(q.dtype).name,
    )
    entry = chosen(shapes, implementation)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return entry.run(q, k, v, wide_mask, scale, weights_fn)


def chosen(shapes: AttentionShapes, implementation: str | None) -> AttentionImplementation:
    """Returns the named row of the table, or the first that fits; raises `ValueError`."""
    table = ATTENTION_IMPLEMENTATIONS
    if implementation is None:
        return next(e for e in table.values() if e.unsupported_reason(shapes) is None)
    if implementation not in table:
        raise ValueError(
            f"implementation={implementation!r} of attention is not known; use one of "
            f"{', '.join(table)}."
        )
    reason = table[implementation].unsupported_reason(shapes)
    if reason is not None:
        raise ValueError(f"implementation={implementation!r} of attention: {reason}")
    return table[implementation]


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


def check_shapes(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> None:
    """Raises `ValueError` unless these are `[B, Q, H, D]` and twice `[B, T, H, D]`."""
    if len(q) != 4 or len(k) != 4 or k[:3] != v[:3] or (q[0], *q[2:]) != (k[0], *k[2:]):
        raise ValueError(
            f"q {q}, k {k} and v {v} do not fit; use [B, Q, H, D] and, for k and v, [B, T, H, D]."
        )


def checked_mask(
    mask: Shaped[AnyArray, "..."], q: tuple[int, ...], k: tuple[int, ...]
) -> Bool[AnyArray, "_ _ _ T"]:
    """Returns the mask with four axes; raises where it is not boolean or does not fit."""
    if mask.dtype != jnp.bool_:
        raise TypeError(f"mask has dtype {mask.dtype}; use booleans, True where a query may look.")
    (batch, queries, heads, _), keys = q, k[1]
    if mask.shape == (batch, keys):
        return mask[:, None, None, :]
    wanted = ((1, batch), (1, heads), (1, queries), (keys,))
    if mask.ndim != 4 or any(n not in sizes for n, sizes in zip(mask.shape, wanted, strict=True)):
        raise ValueError(
            f"mask has shape {mask.shape}; use [{batch}, {keys}] or [1 or {batch}, 1 or {heads}, "
            f"1 or {queries}, {keys}]."
        )
    return mask


# In order of preference.
ATTENTION_IMPLEMENTATIONS: dict[str, AttentionImplementation] = {
    entry.name: entry for entry in (AttentionImplementation("xla", xla_attention, anything),)
}
