"""A call of attention before it runs, and the implementations that compute one.

Dimensions: B batch, Q and T query and key positions, H heads, D channels of a head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jaxtyping import Array

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
        dtype: name of the dtype of all three operands, the widest if they differ.
        platform: what the program is compiled for, one of `PLATFORMS`.
        v_width: channels of a value's head, where they differ from the key's.
    """

    q_shape: tuple[int, ...]
    k_shape: tuple[int, ...]
    mask_shape: tuple[int, ...] | None
    sees_weights: bool
    dtype: str
    platform: str = "cpu"
    v_width: int | None = None


@dataclasses.dataclass(frozen=True)
class AttentionImplementation:
    """One row of the table; `run` takes `(q, k, v, mask, scale, weights_fn)`."""

    name: str
    run: Callable[[AnyArray, AnyArray, AnyArray, AnyArray | None, float, WeightsFn | None], Array]
    unsupported_reason: Callable[[AttentionShapes], str | None]
