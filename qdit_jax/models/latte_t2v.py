"""Latte's text-to-video network (arXiv:2401.03048): pairs of a spatial and a temporal block.

The spatial block is PixArt's; the temporal block has no cross-attention.
Layer names: blocks as in the published checkpoints, their parts as in PixArt's; a list index becomes
`_i`. Dimensions: B batch, F frames, H and W latent rows and columns, C latent channels, S positions
of a frame, D width, L rows of text, K channels of text.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float, Num

from qdit_jax.kernels import Modulated, plain
from qdit_jax.models.adaln_single import (
    CaptionEmbedder,
    CrossAttention,
    TableOutput,
    modulated,
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
from qdit_jax.models.norms import modulated_norm
from qdit_jax.models.runs import BlockKind, apply_periods
from qdit_jax.models.stdit import check_width
from qdit_jax.types import Condition, Params

SPATIAL, TEMPORAL = "transformer_blocks_{}", "temporal_transformer_blocks_{}"
ACTIVATIONS = ("gelu-approximate", "gelu", "geglu")


class GatedMlp(nn.Module):
    """Returns `fc2(a * gelu(b))` of the halves a, b of `fc1(x)`, with the exact GELU."""

    hidden_size: int
    layers: Layers

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        a, b = jnp.split(self.layers.linear(2 * self.hidden_size, name="fc1")(x), 2, axis=-1)
        hidden = a * nn.gelu(b, approximate=False)
        return self.layers.linear(x.shape[-1], name="fc2")(hidden)


@dataclasses.dataclass(frozen=True)
class BlockSettings:
    """What all blocks have in common; `activation` is one of `ACTIVATIONS`."""

    num_heads: int
    mlp_width: int
    activation: str
    norm_eps: float


class LatteBlock(nn.Module):
    """Returns one block's tokens `[B, F, S, D]`, looking at a text if there is one."""

    settings: BlockSettings
    layers: Layers
    is_temporal: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B F S D"],
        m: Float[Array, "B 1 1 M"],
        text: Float[Array, "B L D"] | None = None,
        mask: Any = None,
    ) -> Float[Array, "B F S D"]:
        """`mask` is True for the rows of text that count."""
        settings = self.settings
        shift1, scale1, gate1, shift2, scale2, gate2 = table_rows(self, m)
        attention = Attention(settings.num_heads, self.layers, name="attn")
        normed = modulated(x, shift1, scale1, settings.norm_eps)
        attended = over_time(attention, normed) if self.is_temporal else attention(normed)
        x = x + gate1 * attended
        if text is not None:
            cross = CrossAttention(settings.num_heads, self.layers, name="cross_attn")
            flat = x.reshape(x.shape[0], -1, x.shape[-1])
            x = x + cross(flat, text, mask).reshape(x.shape)
        return x + gate2 * self.mlp(modulated_norm(x, shift2, scale2, settings.norm_eps))

    def mlp(self, x: Float[Array, "B F S D"] | Modulated) -> Float[Array, "B F S D"]:
        """Returns the MLP; a gated one has another name, since its `fc2` reads no GELU's output."""
        width = self.settings.mlp_width
        if self.settings.activation == "geglu":
            return GatedMlp(width, self.layers, name="glu")(plain(x))
        exact = self.settings.activation == "gelu"
        return Mlp(width, self.layers, exact=exact, name="mlp")(x)


class LatteT2V(NetworkModule):
    """A text-to-video transformer; its fields are the configuration that a checkpoint stores.

    Attributes:
        sample_size: rows and columns of the square latent whose positions are whole numbers, and the
            default size; others may be given.
        video_length: frames of a video; the other number that it takes is 1.
        depth: pairs of blocks.
        out_channels: `in_channels`, or twice as many with variance fractions.
        caption_channels: K, of the text encoder.
        caption_length: rows of text in examples; a text may have any number.
        activation: of the MLPs, one of `ACTIVATIONS`.
        norm_eps: epsilon of the blocks' norms.
    """

    sample_size: int = 64
    video_length: int = 16
    patch_size: int = 2
    in_channels: int = 4
    out_channels: int = 8
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    caption_channels: int = 4096
    caption_length: int = 120
    activation: str = "gelu-approximate"
    norm_eps: float = 1e-6

    scans_blocks = True
    prediction = "epsilon"
    has_null = True  # the caller's: the pipeline embeds an empty prompt
    default_sampler = "ddim"
    default_guidance = 7.5

    @nn.compact
    def __call__(
        self, x: Float[Array, "B F H W C"], timestep: Num[Array, " B"], condition: Any
    ) -> Float[Array, "B F H W out"]:
        """Returns the prediction for noisy latents: the noise, then the variance fractions if any.

        `timestep` is 0 to 999. `condition` holds `text [B, L, K]` and, where texts differ in length,
        `text_mask [B, L]`, without which all rows count. A single frame has no position in time.
        """
        condition = jax.tree.map(jnp.asarray, condition)
        frames, rows, columns = self.grid_size(x)
        d, p = self.hidden_size, self.patch_size
        tokens = PatchEmbed(d, p, self.layers, name="x_embedder")(x)  # [B, F, S, D]
        scale = max(self.sample_size // 64, 1)
        steps = tuple(self.sample_size // p / n / scale for n in (rows, columns))
        tokens = tokens + sincos_positions(d, (rows, columns), (steps[0], steps[1]))
        t_emb = TimestepEmbedder(d, layers=self.layers, name="t_embedder")(timestep)
        t_emb = t_emb[:, None, None]
        m = self.layers.linear(6 * d, wide_output=True, name="t_block")(nn.silu(t_emb))
        text = CaptionEmbedder(d, 0, self.layers, name="y_embedder")(condition["text"])
        mask = condition.get("text_mask")
        settings = BlockSettings(
            self.num_heads, int(d * self.mlp_ratio), self.activation, self.norm_eps
        )
        make_fn = partial(LatteBlock, settings, self.layers)
        spatial = BlockKind(make_fn, lambda block, x: block(x, m, text, mask))
        temporal = BlockKind(partial(make_fn, is_temporal=True), lambda block, x: block(x, m))
        tokens = make_fn(name=SPATIAL.format(0))(tokens, m, text, mask)
        if frames > 1:
            tokens = tokens + line_positions(d, np.arange(frames))[:, None]
        tokens = make_fn(is_temporal=True, name=TEMPORAL.format(0))(tokens, m)
        tokens = apply_periods(self, (spatial, temporal), self.block_periods(), tokens)
        features = p * p * self.out_channels
        out = TableOutput(features, self.layers, name="final_layer")(tokens, t_emb)
        return rearrange(out, "b f (h w) (p q c) -> b f (h p) (w q) c", h=rows, p=p, q=p)

    def block_periods(self) -> list[tuple[str, ...]]:
        """Returns the pairs of blocks but for the first, between which positions in time are added."""
        return [(SPATIAL.format(i), TEMPORAL.format(i)) for i in range(1, self.depth)]

    @property
    def learned_variance(self) -> bool:
        """Returns whether the output carries a variance in further channels."""
        return self.out_channels == 2 * self.in_channels

    @property
    def guided_channels(self) -> int:
        """Returns the channels that the published pipeline guides: all, of 4."""
        return self.in_channels

    def sample_shape(self) -> tuple[int, int, int, int]:
        """Returns frames, rows, columns and channels of the latents."""
        return self.video_length, self.sample_size, self.sample_size, self.in_channels

    def example_condition(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns abstract embeddings of prompts."""
        shape = (batch, self.caption_length, self.caption_channels)
        return {"text": jax.ShapeDtypeStruct(shape, jnp.float32)}

    def null_condition(self, condition: Condition, params: Params) -> None:
        """Returns None: the files hold no null caption, the caller gives the embedding of one."""

    def check_condition(self, condition: Condition) -> None:
        """Raises `ValueError` unless there are embeddings of prompts."""
        mask = Entry((None,), "bool", required=False)
        check_entries(condition, {"text": Entry((None, self.caption_channels)), "text_mask": mask})

    def grid_size(self, x: Float[Array, "B F H W C"]) -> tuple[int, int, int]:
        """Returns frames, and rows and columns of tokens; raises `ValueError` if there are none."""
        check_width(self.hidden_size, self.num_heads)
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation={self.activation!r} is not supported; use one of {', '.join(ACTIVATIONS)}."
            )
        if self.out_channels not in (self.in_channels, 2 * self.in_channels):
            raise ValueError(
                f"out_channels={self.out_channels} of in_channels={self.in_channels}: use as many, or "
                "twice as many."
            )
        _, frames, height, width, channels = x.shape
        p = self.patch_size
        if channels != self.in_channels or height % p or width % p:
            raise ValueError(
                f"x has shape {x.shape}; this model takes [B, F, H, W, {self.in_channels}] with rows "
                f"and columns divisible by {p}."
            )
        if frames not in (1, self.video_length):
            raise ValueError(
                f"x has {frames} frames; the published network takes 1 or video_length="
                f"{self.video_length}."
            )
        return frames, height // p, width // p
