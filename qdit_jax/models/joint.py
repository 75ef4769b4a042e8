"""What networks with joint attention share: two streams, image and text, in one attention.

Source: MM-DiT, arXiv:2403.03206. Each stream has its own projections; queries, keys and values of both
stand in one sequence.

Dimensions: B batch, N tokens of one stream, h heads, d channels of a head, W width of a stream.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float

from qdit_jax.kernels import Modulated
from qdit_jax.models.layers import AttentionModule
from qdit_jax.models.linear import Layers
from qdit_jax.models.norms import layer_norm
from qdit_jax.models.rotary import rotated

# Queries, keys and values of a stream.
Heads = tuple[Float[Array, "B N h d"], Float[Array, "B N h d"], Float[Array, "B N h d"]]


class StreamAttention(AttentionModule):
    """The projections of one stream of a joint attention, by the published names `qkv` and `proj`.

    Attributes:
        width: channels of the stream.
        has_output: whether the stream goes on after the attention; else it only supplies keys and
            values (of its queries, `qkv` computes what nobody reads).
    """

    width: int
    num_heads: int
    layers: Layers
    has_output: bool = True

    def setup(self) -> None:
        self.qkv = self.layers.linear(3 * self.width, name=None)
        if self.has_output:
            self.proj = self.layers.linear(self.width, wide_output=True, name=None)

    def heads(self, x: Float[Array, "B N W"] | Modulated) -> Heads:
        """Returns queries, keys and values of the stream's tokens."""
        qkv = self.qkv.fused(x)
        q, k, v = rearrange(qkv, "b t (qkv h d) -> qkv b t h d", qkv=3, h=self.num_heads)
        q, k = (a.astype(v.dtype) for a in self.normed(q, k))
        return q, k, v

    def normed(
        self, q: Float[Array, "B N h d"], k: Float[Array, "B N h d"]
    ) -> tuple[Float[Array, "B N h d"], Float[Array, "B N h d"]]:
        """Returns queries and keys after their norms, if there are any."""
        return q, k

    def output(self, attended: Float[Array, "B N h d"]) -> Float[Array, "B N W"]:
        """Returns the output projection of the stream's rows of an attention."""
        return self.proj(rearrange(attended, "b t h d -> b t (h d)"))


def joined(*streams: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    """Returns the queries, keys and values `[B, N, h, d]` of streams in one sequence each."""
    q, k, v = (jnp.concatenate(parts, axis=1) for parts in zip(*streams, strict=True))
    return q, k, v


def joint_attention(
    attentions: Sequence[StreamAttention],
    inputs: Sequence[Float[Array, "B _ D"] | Modulated],
    angles: Float[Array, "... T half"],
) -> list[Array]:
    """Returns each stream's part of the attention over text and image, each with layers of its own.

    `angles` turn the queries and keys of the whole sequence, the text first.
    """
    q, k, v = joined(*(a.heads(x) for a, x in zip(attentions, inputs, strict=True)))
    # The image's module holds what quantizes the operands of the shared product.
    attended = attentions[1].attend(rotated(q, angles), rotated(k, angles), v)
    parts = jnp.split(attended, [inputs[0].shape[1]], axis=1)
    return [a.output(part) for a, part in zip(attentions, parts, strict=True)]


def chunks(modulation: Float[Array, "B K"], count: int) -> list[Float[Array, "B 1 W"]]:
    """Returns the vectors of a modulation, to be broadcast over tokens."""
    return jnp.split(modulation[:, None], count, axis=-1)


def modulated(
    x: Float[Array, "B N W"], shift: Float[Array, "B 1 W"], scale: Float[Array, "B 1 W"]
) -> Float[Array, "B N W"]:
    """Returns `x * (1 + scale) + shift`."""
    return x * (1 + scale) + shift


class ModulatedOutput(nn.Module):
    """Returns the values of patches, `[B, N, features]`, from modulated and normalized tokens.

    Layers: `adaLN_modulation` (rows of shift, then scale) and `linear`.
    """

    features: int
    layers: Layers
    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "B N W"], c: Float[Array, "B W"]) -> Float[Array, "B N F"]:
        zeros = nn.initializers.zeros_init()
        adaln = self.layers.linear(
            2 * x.shape[-1], zeros, wide_output=True, name="adaLN_modulation"
        )
        shift, scale = chunks(adaln(nn.silu(c)), 2)
        final = self.layers.linear(self.features, zeros, wide_output=True, name="linear")
        return final(modulated(layer_norm(x, self.eps), shift, scale))
