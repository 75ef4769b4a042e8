"""Normalizations: with parameters, `scale` and `bias` where there is one, and modulated.

Dimensions: B samples, T tokens, D channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from qdit_jax.kernels import Gated, Modulated, normalized


class RMSNorm(nn.Module):
    """Returns `x / sqrt(mean(x^2) + eps) * scale` over the last axis; float32 or wider."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps) * scale


class LayerNorm(nn.Module):
    """Returns `x` normalized over its last axis, times `scale` plus `bias`; float32 or wider."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros_init(), (x.shape[-1],))
        return layer_norm(x, self.eps) * scale + bias


def layer_norm(x: Float[Array, "*batch D"], eps: float = 1e-6) -> Float[Array, "*batch D"]:
    """Returns `x` normalized over its last axis, without affine parameters; float32 or wider."""
    return normalized(x.astype(jnp.promote_types(x.dtype, jnp.float32)), eps)


def modulated_norm(
    x: Float[Array, "B *T D"],
    shift: Float[Array, "B *N D"],
    scale: Float[Array, "B *N D"],
    eps: float = 1e-6,
) -> Float[Array, "B *T D"] | Modulated:
    """Returns `layer_norm(x) * (1 + scale) + shift`, for the `fused` of one layer.

    Not yet computed where all tokens of a sample have the same shift and scale.
    """
    if math.prod(shift.shape[1:-1]) != 1 or shift.shape != scale.shape:
        return layer_norm(x, eps) * (1 + scale) + shift
    both = jnp.concatenate([shift, scale], axis=-1)
    return Modulated(x, both.reshape(len(shift), -1), 0, 1, eps)


def added_by(
    fused_fn: Callable[..., Array],
    hidden: Float[Array, "B *T K"] | Modulated,
    x: Float[Array, "B *T D"],
    gate: Float[Array, "B *N D"],
) -> Float[Array, "B *T D"]:
    """Returns `x + gate * y` of what a layer's `fused` makes of `hidden`."""
    if math.prod(gate.shape[1:-1]) != 1:
        return x + gate * fused_fn(hidden)
    return fused_fn(hidden, gated=Gated(x, gate.reshape(len(gate), -1), 0))
