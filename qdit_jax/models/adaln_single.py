"""The parts of networks with adaLN-single: one modulation for all blocks, and text by cross-attention.

PixArt-alpha (arXiv:2310.00426) computes shift, scale and gate once per call, by a linear layer `t_block`
of SiLU of the time embedding, and every block adds a `scale_shift_table` of its own. STDiT, Latte's
text-to-video network and Wan do the same.

Dimensions: B batch, T tokens, D width, L rows of text, C channels of text, R rows of a table, N tokens
or 1 where all tokens of a sample are modulated alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from qdit_jax.models.layers import AttentionModule, Mlp
from qdit_jax.models.linear import Layers, stored
from qdit_jax.models.norms import layer_norm
from qdit_jax.types import Condition, Params

TABLE_NAME = "scale_shift_table"  # as in the published files


def table_rows(
    module: nn.Module, m: Float[Array, "B *N_RD"], rows: int = 6, name: str = TABLE_NAME
) -> tuple[Float[Array, "B *N D"], ...]:
    """Returns the rows of the module's table, each with its share of `m` added: `rows` arrays.

    In the published order: shift, scale and gate of the attention, then those of the MLP. The table
    `[rows, D]` is a parameter of `module`, which calls this in its compact method.

    Args:
        m: `[B, R D]`, or `[B, N, R D]` where each token has its own; of a video's tokens
            `[B, F, S, D]`, `[B, F or 1, 1, R D]`.
    """
    width = m.shape[-1] // rows
    init = nn.initializers.normal(width**-0.5)
    table = stored(module, name, init, (rows, width))
    m = m[:, None] if m.ndim == 2 else m
    both = m.reshape(*m.shape[:-1], rows, width) + table
    return tuple(both[..., i, :] for i in range(rows))


def modulated(
    x: Float[Array, "B *T D"],
    shift: Float[Array, "B *N D"],
    scale: Float[Array, "B *N D"],
    eps: float = 1e-6,
) -> Float[Array, "B *T D"]:
    """Returns `norm(x) * (1 + scale) + shift`, the norm without parameters; float32 or wider."""
    return layer_norm(x, eps) * (1 + scale) + shift


class CrossAttention(AttentionModule):
    """Returns attention from tokens to the rows of a text that the mask keeps.

    The published names: `q_linear`, `kv_linear` (k, then v) and `proj`. Its input is the residual
    stream itself, without a norm. Without a mask all rows are kept.
    """

    num_heads: int
    layers: Layers = Layers()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        text: Float[Array, "B L D"],
        mask: Bool[Array, "B L"] | None = None,
    ) -> Float[Array, "B T D"]:
        d = x.shape[-1]
        q = self.layers.linear(d, name="q_linear")(x)
        kv = self.layers.linear(2 * d, name="kv_linear")(text)
        q = rearrange(q, "b t (h d) -> b t h d", h=self.num_heads)
        k, v = rearrange(kv, "b l (two h d) -> two b l h d", two=2, h=self.num_heads)
        joined = rearrange(self.attend(q, k, v, mask), "b t h d -> b t (h d)")
        return self.layers.linear(d, wide_output=True, name="proj")(joined)


class CaptionEmbedder(nn.Module):
    """Returns embeddings of a text at the network's width, `[B, L, D]`, through an MLP `y_proj`.

    With `null_rows`, it also holds `y_embedding [null_rows, C]`, the text that stands for none: see
    `null_text`. Give it the published name, `y_embedder`.
    """

    hidden_size: int
    null_rows: int = 0
    layers: Layers = Layers()

    @nn.compact
    def __call__(self, text: Float[Array, "B L C"]) -> Float[Array, "B L D"]:
        channels = text.shape[-1]
        if self.null_rows:
            init = nn.initializers.normal(channels**-0.5)
            stored(self, "y_embedding", init, (self.null_rows, channels))
        return Mlp(self.hidden_size, self.layers, self.hidden_size, name="y_proj")(text)


def null_text(
    y_embedding: Float[Array, "R C"], text: Float[Array, "B L C"]
) -> Float[Array, "B L C"]:
    """Returns the null caption in place of every text, which keeps the mask of its prompt.

    Raises:
        ValueError: if a text has more rows than the null caption.
    """
    rows, length = y_embedding.shape[0], text.shape[1]
    if length > rows:
        raise ValueError(
            f"text has {length} rows and the null caption of this network {rows}; give texts of at "
            f"most {rows}, padding left out."
        )
    return jnp.broadcast_to(jnp.asarray(y_embedding[:length], text.dtype), text.shape)


def learned_null(condition: Condition, params: Params) -> dict[str, Any]:
    """Returns the condition with the learned null caption, under the mask of its prompt.

    Raises:
        ValueError: if a text has more rows than the null caption.
    """
    assert isinstance(condition, Mapping)
    text = jnp.asarray(condition["text"])
    learned = jnp.asarray(params["y_embedder"]["y_embedding"])
    return {**condition, "text": null_text(learned, text)}


class TableOutput(nn.Module):
    """Returns the patches' values `[B, T, features]`: modulated by a table and the time embedding.

    `t_emb` is the time embedding itself, `[B, D]` (or `[B, N, D]`, of a video's tokens `[B, F, S, D]`
    one of `[B, 1, 1, D]`): no SiLU and no linear. Give it the published name, `final_layer`.
    """

    features: int
    layers: Layers = Layers()

    @nn.compact
    def __call__(
        self, x: Float[Array, "B *T D"], t_emb: Float[Array, "B *N_D"]
    ) -> Float[Array, "B *T P"]:
        shift, scale = table_rows(self, jnp.concatenate([t_emb, t_emb], axis=-1), rows=2)
        hidden = modulated(x, shift, scale)
        return self.layers.linear(self.features, wide_output=True, name="linear")(hidden)
