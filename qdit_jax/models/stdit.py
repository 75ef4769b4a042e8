"""STDiT of Open-Sora 1.0: text to video by blocks that attend over space, then time, then text.

Layer names follow the published checkpoints; a list index becomes `_i`.
Source: github.com/hpcaitech/Open-Sora, v1.0. Dimensions: B batch, F frames, H and W latent rows and
columns, C latent channels, S positions of a frame, D width, L rows of text, K channels of text.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float, Num

from qdit_jax.models.adaln_single import (
    CaptionEmbedder,
    CrossAttention,
    TableOutput,
    learned_null,
    table_rows,
)
from qdit_jax.models.condition_checks import Entry, check_entries
from qdit_jax.models.layers import (
    Attention,
    Mlp,
    PatchEmbed,
    TimestepEmbedder,
    line_positions,
    over_time,
    sincos_positions,
)
from qdit_jax.models.linear import Layers
from qdit_jax.models.network import NetworkModule
from qdit_jax.models.norms import added_by, modulated_norm
from qdit_jax.models.runs import BlockKind, apply_periods
from qdit_jax.types import AnyArray, Condition, Params


class STDiTBlock(nn.Module):
    """Returns one block's tokens `[B, F, S, D]`.

    The attention over time has no norm and no modulation of its own, and the gate of the spatial one.
    """

    num_heads: int
    mlp_ratio: float
    layers: Layers

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B F S D"],
        m: Float[Array, "B 1 1 M"],
        text: Float[Array, "B L D"],
        mask: Any,
        times: Float[AnyArray, "F 1 D"] | None,
    ) -> Float[Array, "B F S D"]:
        """`mask` is True for the rows of text that count; `times` is added before looking at time."""
        d = x.shape[-1]
        shift1, scale1, gate1, shift2, scale2, gate2 = table_rows(self, m)
        space = Attention(self.num_heads, self.layers, name="attn")
        x = x + gate1 * space(modulated_norm(x, shift1, scale1))
        time = Attention(self.num_heads, self.layers, name="attn_temp")
        x = x + gate1 * over_time(time, x if times is None else x + times)
        cross = CrossAttention(self.num_heads, self.layers, name="cross_attn")
        x = x + cross(x.reshape(x.shape[0], -1, d), text, mask).reshape(x.shape)
        mlp = Mlp(int(d * self.mlp_ratio), self.layers, name="mlp")
        return added_by(mlp, modulated_norm(x, shift2, scale2), x, gate2)


class STDiT(NetworkModule):
    """A text-to-video transformer; its fields are the configuration that a checkpoint stores.

    Attributes:
        sample_size: default frames, rows and columns of the latent; others may be given.
        caption_channels: K, of the text encoder.
        caption_length: rows of the null caption, and the most rows that a text may have.
        space_scale, time_scale: coordinates of positions are divided by these.
        learn_sigma: whether the output carries a variance fraction for each channel.
    """

    sample_size: tuple[int, int, int] = (16, 32, 32)
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    caption_channels: int = 4096
    caption_length: int = 120
    space_scale: float = 0.5
    time_scale: float = 1.0
    learn_sigma: bool = True

    scans_blocks = True
    prediction = "epsilon"
    has_null = True
    default_sampler = "ddpm"
    default_guidance = 7.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "B F H W C"], timestep: Num[Array, " B"], condition: Any
    ) -> Float[Array, "B F H W out"]:
        """Returns the prediction for noisy latents: the noise, then the variance fractions.

        `timestep` is 0 to 999. `condition` holds `text [B, L, K]` and `text_mask [B, L]`, without
        which all rows of text count.
        """
        condition = jax.tree.map(jnp.asarray, condition)
        frames, rows, columns = self.grid_size(x)
        d, p = self.hidden_size, self.patch_size
        tokens = PatchEmbed(d, p, self.layers, name="x_embedder")(x)  # [B, F, S, D]
        step = 1 / self.space_scale
        tokens = tokens + sincos_positions(d, (rows, columns), (step, step))
        times = line_positions(d, np.arange(frames) / self.time_scale)[:, None]
        t_emb = TimestepEmbedder(d, layers=self.layers, name="t_embedder")(timestep)
        t_emb = t_emb[:, None, None]
        m = self.layers.linear(6 * d, wide_output=True, name="t_block")(nn.silu(t_emb))
        captions = CaptionEmbedder(d, self.caption_length, self.layers, name="y_embedder")
        text, mask = captions(condition["text"]), condition.get("text_mask")
        make_fn = partial(STDiTBlock, self.num_heads, self.mlp_ratio, self.layers)
        tokens = make_fn(name="blocks_0")(tokens, m, text, mask, times)
        kind = BlockKind(make_fn, lambda block, x: block(x, m, text, mask, None))
        tokens = apply_periods(self, (kind,), self.block_periods(), tokens)
        channels = self.in_channels * (2 if self.learn_sigma else 1)
        out = TableOutput(p * p * channels, self.layers, name="final_layer")(tokens, t_emb)
        return rearrange(out, "b f (h w) (p q c) -> b f (h p) (w q) c", h=rows, p=p, q=p)

    def block_periods(self) -> list[tuple[str, ...]]:
        """Returns the blocks but for the first, in which positions in time are added."""
        return [(f"blocks_{i}",) for i in range(1, self.depth)]

    @property
    def learned_variance(self) -> bool:
        """Returns whether the output carries a variance in further channels."""
        return self.learn_sigma

    @property
    def guided_channels(self) -> int:
        """Returns 3, as published, or all channels where there are fewer."""
        return min(3, self.in_channels)

    def sample_shape(self) -> tuple[int, int, int, int]:
        """Returns frames, rows, columns and channels of the latents."""
        return (*self.sample_size, self.in_channels)

    def example_condition(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns abstract embeddings of prompts, and their masks."""
        shape = (batch, self.caption_length)
        return {
            "text": jax.ShapeDtypeStruct((*shape, self.caption_channels), jnp.float32),
            "text_mask": jax.ShapeDtypeStruct(shape, jnp.bool_),
        }

    def null_condition(self, condition: Condition, params: Params) -> Condition:
        """Returns the learned null caption in place of every text, with the mask of its prompt."""
        return learned_null(condition, params)

    def check_condition(self, condition: Condition) -> None:
        """Raises `ValueError` unless there are embeddings of prompts, with their masks."""
        check_entries(condition, text_entries(self.caption_length, self.caption_channels))

    def grid_size(self, x: Float[Array, "B F H W C"]) -> tuple[int, int, int]:
        """Returns frames, and rows and columns of tokens; raises `ValueError` if there are none."""
        check_width(self.hidden_size, self.num_heads)
        _, frames, height, width, channels = x.shape
        p = self.patch_size
        if channels != self.in_channels or height % p or width % p:
            raise ValueError(
                f"x has shape {x.shape}; this model takes [B, F, H, W, {self.in_channels}] with rows "
                f"and columns divisible by {p}."
            )
        return frames, height // p, width // p


def text_entries(length: int, channels: int) -> dict[str, Entry]:
    """Returns what a condition on text holds: at most `length` rows, and which of them count."""
    return {"text": Entry((-length, channels)), "text_mask": Entry((-length,), "bool")}


def check_width(width: int, num_heads: int) -> None:
    """Raises `ValueError` unless heads and the halves of positions divide the width."""
    if width % num_heads or width % 4:
        raise ValueError(
            f"hidden_size={width} must be divisible by num_heads={num_heads} and by 4."
        )
