"""The blocks and the output layer of Wan's networks.

Dimensions: B batch, N tokens, D width, L rows of text, M moments of time: 1, or N where every token has
its own; P values of a patch.
"""

from __future__ import annotations

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float

from qdit_jax.kernels import GELU
from qdit_jax.models.layers import AttentionModule
from qdit_jax.models.linear import Layers, stored
from qdit_jax.models.norms import LayerNorm, RMSNorm, added_by, layer_norm, modulated_norm
from qdit_jax.models.rotary import rotated

NORMAL = nn.initializers.normal(0.02)


class SelfAttention(AttentionModule):
    """Returns attention among tokens: q and k are normed over all heads, then turned by position."""

    num_heads: int
    eps: float
    layers: Layers

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], angles: Float[Array, "N half"]
    ) -> Float[Array, "B N D"]:
        d = x.shape[-1]
        q, k, v = jnp.split(self.layers.linear(3 * d, name="qkv")(x), 3, axis=-1)
        q, k = (RMSNorm(self.eps, name=f"norm_{name}")(a) for name, a in (("q", q), ("k", k)))
        q, k, v = (a.reshape(*a.shape[:2], self.num_heads, -1) for a in (q, k, v))
        q, k = (rotated(a, angles).astype(v.dtype) for a in (q, k))
        joined = rearrange(self.attend(q, k, v), "b n h d -> b n (h d)")
        return self.layers.linear(d, wide_output=True, name="o")(joined)


class CrossAttention(AttentionModule):
    """Returns attention from tokens to all rows of a text; q and k are normed over all heads."""

    num_heads: int
    eps: float
    layers: Layers

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], text: Float[Array, "B L D"]
    ) -> Float[Array, "B N D"]:
        d = x.shape[-1]
        q = self.layers.linear(d, name="q")(x)
        k, v = jnp.split(self.layers.linear(2 * d, name="kv")(text), 2, axis=-1)
        q, k = (RMSNorm(self.eps, name=f"norm_{name}")(a) for name, a in (("q", q), ("k", k)))
        q, k, v = (a.reshape(*a.shape[:2], self.num_heads, -1) for a in (q, k, v))
        joined = rearrange(
            self.attend(q.astype(v.dtype), k.astype(v.dtype), v), "b n h d -> b n (h d)"
        )
        return self.layers.linear(d, wide_output=True, name="o")(joined)


class Block(nn.Module):
    """Returns one block's tokens; its modulation is the shared one plus a table of its own."""

    num_heads: int
    ffn_width: int
    eps: float
    layers: Layers

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        time: Float[Array, "B M 6 D"],
        text: Float[Array, "B L D"],
        angles: Float[Array, "N half"],
    ) -> Float[Array, "B N D"]:
        d = x.shape[-1]
        modulation = time + stored(self, "modulation", NORMAL, (1, 6, d))
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.moveaxis(modulation, 2, 0)  # [B, M, D]
        settings = (self.num_heads, self.eps, self.layers)
        hidden = layer_norm(x, self.eps) * (1 + scale1) + shift1
        x = x + gate1 * SelfAttention(*settings, name="self_attn")(hidden, angles)
        hidden = LayerNorm(self.eps, name="norm3")(x)
        x = x + CrossAttention(*settings, name="cross_attn")(hidden, text)
        hidden = modulated_norm(x, shift2, scale2, self.eps)
        hidden = self.layers.linear(self.ffn_width, name="ffn_0").fused(hidden, GELU)
        ffn_2 = self.layers.linear(d, wide_output=True, name="ffn_2")
        return added_by(ffn_2.fused, hidden, x, gate2)


class Head(nn.Module):
    """Returns the patches' values; the time embedding itself is added to the table."""

    features: int
    eps: float
    layers: Layers

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], time: Float[Array, "B M D"]
    ) -> Float[Array, "B N P"]:
        table = stored(self, "modulation", NORMAL, (1, 2, x.shape[-1]))
        shift, scale = jnp.moveaxis(time[:, :, None] + table, 2, 0)  # [B, M, D]
        hidden = layer_norm(x, self.eps) * (1 + scale) + shift
        return self.layers.linear(self.features, wide_output=True, name="head")(hidden)
