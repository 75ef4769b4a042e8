"""`attention`: the two products of attention and the softmax between them.

Dimensions: B batch, Q and T query and key positions, H heads, D channels of a head.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from qdit_jax.kernels.attention_call import AttentionImplementation, AttentionShapes, WeightsFn
from qdit_jax.kernels.cudnn_attention import CUDNN
from qdit_jax.kernels.matmul import default_platform
from qdit_jax.kernels.product import PLATFORMS
from qdit_jax.kernels.splash_attention import SPLASH
from qdit_jax.kernels.xla_attention import XLA
from qdit_jax.types import AnyArray


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
        implementation: a name in `ATTENTION_IMPLEMENTATIONS`; None takes the first that fits, for
            each platform that the program is compiled for.

    Raises:
        ValueError: if shapes do not fit, or the implementation does not.
        TypeError: if the mask is not boolean.
    """
    check_shapes(q.shape, k.shape, v.shape)
    wide_mask = None if mask is None else checked_mask(mask, q.shape, k.shape)
    dtype = jnp.result_type(q, k, v).name
    shapes = call_shapes(q.shape, k.shape, v.shape, wide_mask, weights_fn is not None, dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def run(entry: AttentionImplementation) -> Callable[..., Array]:
        return lambda q, k, v, mask: entry.run(q, k, v, mask, scale, weights_fn)

    if implementation is not None:
        return run(named(shapes, implementation))(q, k, v, wide_mask)
    by_platform = {
        platform: first_that_fits(dataclasses.replace(shapes, platform=platform))
        for platform in PLATFORMS
    }
    if all(entry is XLA for entry in by_platform.values()):
        return XLA.run(q, k, v, wide_mask, scale, weights_fn)
    branches = {name: run(entry) for name, entry in by_platform.items() if entry is not XLA}
    return jax.lax.platform_dependent(q, k, v, wide_mask, default=run(XLA), **branches)


def call_shapes(
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...],
    mask: Bool[AnyArray, "_ _ _ T"] | None,
    sees_weights: bool,
    dtype: str,
) -> AttentionShapes:
    """Returns a call of operands of these shapes on JAX's platform, as the table takes it."""
    mask_shape = None if mask is None else mask.shape
    return AttentionShapes(q, k, mask_shape, sees_weights, dtype, default_platform(), v[-1])


def attentions_used(calls: Iterable[AttentionShapes]) -> dict[str, int]:
    """Returns how many calls each implementation computes, by name, for reports."""
    return dict(Counter(first_that_fits(call).name for call in calls))


def first_that_fits(shapes: AttentionShapes) -> AttentionImplementation:
    """Returns the first row of the table that computes a call."""
    table = ATTENTION_IMPLEMENTATIONS
    return next(entry for entry in table.values() if entry.unsupported_reason(shapes) is None)


def named(shapes: AttentionShapes, implementation: str) -> AttentionImplementation:
    """Returns the named row of the table; raises `ValueError` if it does not fit."""
    table = ATTENTION_IMPLEMENTATIONS
    if implementation not in table:
        raise ValueError(
            f"implementation={implementation!r} of attention is not known; use one of "
            f"{', '.join(table)}."
        )
    reason = table[implementation].unsupported_reason(shapes)
    if reason is not None:
        raise ValueError(f"implementation={implementation!r} of attention: {reason}")
    return table[implementation]


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


# In order of preference; the last one supports every call.
ATTENTION_IMPLEMENTATIONS: dict[str, AttentionImplementation] = {
    entry.name: entry for entry in (CUDNN, SPLASH, XLA)
}
