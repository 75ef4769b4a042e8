"""STDiT3 of Open-Sora 1.2: text to video by pairs of a spatial and a temporal block, both complete.

Layer names follow the published checkpoints; a list index becomes `_i`.
Source: github.com/hpcaitech/Open-Sora, v1.2. Dimensions: B batch, F frames, H and W latent rows and
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
from jaxtyping import Array, Bool, Float, Num

from qdit_jax.models.adaln_single import (
    CaptionEmbedder,
    CrossAttention,
    learned_null,
    modulated,
    table_rows,
)
from qdit_jax.models.condition_checks import Entry, check_entries
from qdit_jax.models.layers import AttentionModule, Mlp, PatchEmbed, TimestepEmbedder, over_time
from qdit_jax.models.linear import Layers, stored
from qdit_jax.models.network import NetworkModule
from qdit_jax.models.norms import RMSNorm
from qdit_jax.models.rotary import rotated
from qdit_jax.models.runs import BlockKind, apply_periods
from qdit_jax.models.stdit import check_width, text_entries
from qdit_jax.types import Condition, Params

ROPE_BASE = 10_000.0


class NormedAttention(AttentionModule):
    """Returns self-attention whose q and k are normed per head, and turned by `angles` if given."""

    num_heads: int
    qk_norm: bool
    layers: Layers

    @nn.compact
    def __call__(
        self, x: Float[Array, "B *G T D"], angles: Float[Array, "T half"] | None
    ) -> Float[Array, "B *G T D"]:
        d = x.shape[-1]
        qkv = self.layers.linear(3 * d, name="qkv")(x)
        q, k, v = rearrange(qkv, "... t (qkv h d) -> qkv ... t h d", qkv=3, h=self.num_heads)
        if self.qk_norm:
            q = RMSNorm(name="q_norm")(q).astype(v.dtype)
            k = RMSNorm(name="k_norm")(k).astype(v.dtype)
        if angles is not None:
            q, k = rotated(q, angles), rotated(k, angles)
        joined = rearrange(self.attend(q, k, v), "... h d -> ... (h d)")
        return self.layers.linear(d, name="proj")(joined)


class STDiT3Block(nn.Module):
    """Returns one block's tokens `[B, F, S, D]`: over time where there are `angles`, else in frames."""

    num_heads: int
    mlp_ratio: float
    qk_norm: bool
    layers: Layers

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B F S D"],
        m: Float[Array, "B N 1 M"],
        text: Float[Array, "B L D"],
        mask: Any,
        angles: Float[Array, "F half"] | None = None,
    ) -> Float[Array, "B F S D"]:
        """`mask` is True for the rows of text that count."""
        d = x.shape[-1]
        shift1, scale1, gate1, shift2, scale2, gate2 = table_rows(self, m)
        attention = NormedAttention(self.num_heads, self.qk_norm, self.layers, name="attn")
        normed = modulated(x, shift1, scale1)
        attended = (
            attention(normed, None) if angles is None else over_time(attention, normed, angles)
        )
        x = x + gate1 * attended
        cross = CrossAttention(self.num_heads, self.layers, name="cross_attn")
        x = x + cross(x.reshape(x.shape[0], -1, d), text, mask).reshape(x.shape)
        mlp = Mlp(int(d * self.mlp_ratio), self.layers, name="mlp")
        return x + gate2 * mlp(modulated(x, shift2, scale2))


class MaskedOutput(nn.Module):
    """Returns the patches' values `[B, F, S, features]`, modulated by a table and `t_emb`.

    As published, clean frames are normed and modulated with `t_emb` like all others, and then once
    more with that of timestep 0.
    """

    features: int
    layers: Layers

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B F S D"],
        t_emb: Float[Array, "B times D"],
        frame_mask: Bool[Array, "B F"] | None,
    ) -> Float[Array, "B F S P"]:
        """`t_emb` is that of the timestep, then, with a `frame_mask`, that of timestep 0."""
        both = jnp.concatenate([t_emb, t_emb], axis=-1)[:, :, None, None]  # [B, times, 1, 1, 2D]
        shift, scale = table_rows(self, both, rows=2)
        x = modulated(x, shift[:, 0], scale[:, 0])
        if frame_mask is not None:
            clean = modulated(x, shift[:, 1], scale[:, 1])
            x = jnp.where(frame_mask[..., None, None], x, clean)
        return self.layers.linear(self.features, wide_output=True, name="linear")(x)


class Rope(nn.Module):
    """Returns the angles `[F, half]` of frames 0 to F - 1, from the frequencies of the file."""

    half: int

    @nn.compact
    def __call__(self, num_frames: int) -> Float[Array, "F half"]:
        def init(key: Array, shape: tuple[int, ...]) -> Array:
            return jnp.asarray(ROPE_BASE ** (-np.arange(shape[0]) / shape[0]), jnp.float32)

        freqs = jax.lax.stop_gradient(jnp.asarray(stored(self, "freqs", init, (self.half,))))
        return jnp.arange(num_frames)[:, None] * freqs.astype(jnp.float32)


class STDiT3(NetworkModule):
    """A text-to-video transformer; its fields are the configuration that a checkpoint stores.

    Attributes:
        sample_size: default frames, rows and columns of the latent; others may be given.
        input_sq_size: side in pixels of the square picture whose positions are whole numbers.
        caption_channels: K, of the text encoder.
        caption_length: rows of the null caption, and the most rows that a text may have.
        qk_norm: whether q and k are normed.
        learn_sigma: whether the output layer has further channels, which are not used.
    """

    sample_size: tuple[int, int, int] = (15, 64, 64)
    input_sq_size: int = 512
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    caption_channels: int = 4096
    caption_length: int = 300
    qk_norm: bool = True
    learn_sigma: bool = True

    scans_blocks = True
    prediction = "velocity"
    flow_times = (1000.0, 0.0)  # at the noise, at the data
    velocity_to = "data"
    flow_shift = "resolution"
    learned_variance = False
    has_null = True
    default_sampler = "flow-euler"
    default_guidance = 7.0
    latents_only = (
        "Open-Sora 1.2's video autoencoder is not supported, and no other decodes its latents"
    )

    @nn.compact
    def __call__(
        self, x: Float[Array, "B F H W C"], timestep: Num[Array, " B"], condition: Any
    ) -> Float[Array, "B F H W C"]:
        """Returns the velocity, which points to the data.

        `timestep` is 1000 at the noise and 0 at the data. `condition` holds `text [B, L, K]`,
        `text_mask [B, L]` (absent: all rows of text count), `fps [B]`, and the video's `height [B]`
        and `width [B]` in pixels, of which the first sample's count, as published. `frame_mask
        [B, F]`, where given, is False for frames that are clean already: they see timestep 0.
        """
        condition = jax.tree.map(jnp.asarray, condition)
        _, frames, height, width, _ = self.checked_shape(x)
        d, p = self.hidden_size, self.patch_size
        odd = [(0, 0), (0, 0), (0, -height % p), (0, -width % p), (0, 0)]
        x = jnp.pad(x, odd)
        grid = (x.shape[2] // p, x.shape[3] // p)
        tokens = PatchEmbed(d, p, self.layers, name="x_embedder")(x)  # [B, F, S, D]
        tokens = tokens + self.positions(grid, condition["height"][0], condition["width"][0])
        frame_mask = condition.get("frame_mask")
        t_emb, m = self.modulation(timestep, condition["fps"], frame_mask)
        captions = CaptionEmbedder(d, self.caption_length, self.layers, name="y_embedder")
        text, mask = captions(condition["text"]), condition.get("text_mask")
        angles = Rope(d // self.num_heads // 2, name="rope")(frames)
        make_fn = partial(STDiT3Block, self.num_heads, self.mlp_ratio, self.qk_norm, self.layers)
        spatial = BlockKind(make_fn, lambda block, x: block(x, m, text, mask))
        temporal = BlockKind(make_fn, lambda block, x: block(x, m, text, mask, angles))
        tokens = apply_periods(self, (spatial, temporal), self.block_periods(), tokens)
        channels = self.in_channels * (2 if self.learn_sigma else 1)
        final = MaskedOutput(p * p * channels, self.layers, name="final_layer")
        out = final(tokens, t_emb, frame_mask)
        out = rearrange(out, "b f (h w) (p q c) -> b f (h p) (w q) c", h=grid[0], p=p, q=p)
        return out[:, :, :height, :width, : self.in_channels]

    def block_periods(self) -> list[tuple[str, ...]]:
        """Returns the pairs of blocks."""
        return [(f"spatial_blocks_{i}", f"temporal_blocks_{i}") for i in range(self.depth)]

    def modulation(
        self,
        timestep: Num[Array, " B"],
        fps: Float[Array, " B"],
        frame_mask: Bool[Array, "B F"] | None,
    ) -> tuple[Float[Array, "B times D"], Float[Array, "B N 1 M"]]:
        """Returns the embedding of the timestep (and of 0), and what all blocks add to their tables."""
        d = self.hidden_size
        times = [timestep] if frame_mask is None else [timestep, jnp.zeros_like(timestep)]
        t_emb = TimestepEmbedder(d, layers=self.layers, name="t_embedder")(jnp.stack(times, 1))
        rate = TimestepEmbedder(d, layers=self.layers, name="fps_embedder")(fps)
        t_emb = t_emb + rate[:, None]
        m = self.layers.linear(6 * d, wide_output=True, name="t_block")(nn.silu(t_emb))
        if frame_mask is not None:
            m = jnp.where(frame_mask[..., None], m[:, :1], m[:, 1:])
        return t_emb, m[:, :, None]

    def positions(
        self, grid: tuple[int, int], height: Float[Array, ""], width: Float[Array, ""]
    ) -> Float[Array, "S D"]:
        """Returns the 2-D sin-cos table of a grid, its steps by the picture's size in pixels."""
        base = round((grid[0] * grid[1]) ** 0.5)
        scale = jnp.sqrt(jnp.asarray(height * width, jnp.float32)) / self.input_sq_size
        axes = [jnp.arange(n, dtype=jnp.float32) / scale * base / n for n in grid]
        rows, columns = jnp.meshgrid(*axes, indexing="ij")
        quarter = self.hidden_size // 4
        frequencies = (10_000 ** -(np.arange(quarter) / quarter)).astype(np.float32)
        halves = []
        for position in (columns, rows):
            angles = position.reshape(-1, 1) * frequencies
            halves += [jnp.sin(angles), jnp.cos(angles)]
        return jnp.concatenate(halves, axis=1)

    def seen_frames(
        self, x: Array, timestep: Array, condition: Any, mask: Bool[Array, "B F"]
    ) -> tuple[Array, Any]:
        """Returns the timestep and the condition that say which frames are clean (`mask` False)."""
        return timestep, {**condition, "frame_mask": mask}

    @property
    def guided_channels(self) -> int:
        """Returns the channels that the published sampler guides: all, of 4."""
        return self.in_channels

    def sample_shape(self) -> tuple[int, int, int, int]:
        """Returns frames, rows, columns and channels of the latents."""
        return (*self.sample_size, self.in_channels)

    def resolution_of(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Returns rows, columns and frames in pixels that the published VAE makes of latents.

        It makes 8 x 8 pixels of each, 17 frames of 5 and 4 of each of a rest; 1 frame of 1.
        """
        frames, height, width, _ = shape
        decoded = 1 if frames == 1 else frames // 5 * 17 + frames % 5 * 4
        return 8 * height, 8 * width, decoded

    def example_condition(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns abstract embeddings of prompts, their masks, and the video's rate and size."""
        shape = (batch, self.caption_length)
        numbers = dict.fromkeys(
            ("fps", "height", "width"), jax.ShapeDtypeStruct((batch,), jnp.float32)
        )
        return {
            "text": jax.ShapeDtypeStruct((*shape, self.caption_channels), jnp.float32),
            "text_mask": jax.ShapeDtypeStruct(shape, jnp.bool_),
            **numbers,
        }

    def null_condition(self, condition: Condition, params: Params) -> Condition:
        """Returns the learned null caption in place of every text, with the mask of its prompt."""
        return learned_null(condition, params)

    def check_condition(self, condition: Condition) -> None:
        """Raises `ValueError` unless prompts, rate and size are there, the size of all samples one."""
        one = Entry((), "positive")
        entries = text_entries(self.caption_length, self.caption_channels)
        entries |= {"fps": one, "height": one, "width": one}
        check_entries(condition, {**entries, "frame_mask": Entry((None,), "bool", required=False)})
        for name in ("height", "width"):
            values = np.unique(np.asarray(condition[name]))  # type: ignore[call-overload, index]
            if len(values) > 1:
                raise ValueError(
                    f"{name}={values}: the network goes by the first sample's; give one size per call."
                )

    def checked_shape(self, x: Float[Array, "B F H W C"]) -> tuple[int, ...]:
        """Returns the shape of `x`; raises `ValueError` if its channels or the fields do not fit."""
        check_width(self.hidden_size, self.num_heads)
        if self.hidden_size // self.num_heads % 2:
            raise ValueError(
                f"num_heads={self.num_heads} of hidden_size={self.hidden_size} are of an odd width, "
                "which rotary positions cannot pair."
            )
        if x.shape[-1] != self.in_channels:
            raise ValueError(
                f"x has shape {x.shape}; this model takes {self.in_channels} channels."
            )
        return x.shape
