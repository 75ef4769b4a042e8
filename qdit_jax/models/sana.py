"""Sana (arXiv:2410.10629): text to images by linear attention and gated convolutions.

Layer names follow the authors' checkpoints; a list index becomes `_i`.

Dimensions: B batch, H and W latent rows and columns, C latent channels, T tokens, D width, F channels
of a gated convolution, L rows of text, E channels of text, h heads, d channels of a head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Num

from qdit_jax.models.adaln_single import CaptionEmbedder, TableOutput, modulated, table_rows
from qdit_jax.models.condition_checks import Entry, check_entries, check_text_mask
from qdit_jax.models.layers import (
    AttentionModule,
    PatchEmbed,
    TimestepEmbedder,
    sincos_positions,
)
from qdit_jax.models.linear import Layers, stored
from qdit_jax.models.network import NetworkModule
from qdit_jax.models.norms import RMSNorm
from qdit_jax.models.runs import apply_blocks
from qdit_jax.types import Condition, Params

RMS_EPS = 1e-5  # of the text's norm and of those of q and k, as published
LEAST = 1e-15  # added to a sum of weights that may be 0


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a block is made of: the fields of `Sana` of the same names."""

    num_heads: int
    num_cross_heads: int
    cross_width: int
    mlp_width: int
    qk_norm: bool
    norm_eps: float


class LinearAttention(nn.Module):
    """Returns attention among tokens whose weights are products of ReLU(q) and ReLU(k).

    The weights of a query are divided by their sum, without a softmax, so that keys and values are
    summed once for all queries: the cost grows with the tokens, not with their square.

    Sums and quotient are float32 in 16 bits too, as published; q, k and v are what 16-bit products round.
    The published form jumps where no channel of a query is positive: just beside, the output is an average
    of values, there it is 0. Of random queries of d channels that is one in 2**d. In heads of 8 channels
    16 bits therefore move a few tokens by tenths, here and in diffusers alike; in the published heads of
    32 by no more than in other networks (`tests/models/test_dtype.py`).
    """

    num_heads: int
    qk_norm: bool
    layers: Layers

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        d = x.shape[-1]
        q, k, v = jnp.split(self.layers.linear(3 * d, name="qkv")(x), 3, axis=-1)
        q, k = normed_qk(q, k) if self.qk_norm else (q, k)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        q, k, v = (
            rearrange(a.astype(wide), "b t (h d) -> b t h d", h=self.num_heads) for a in (q, k, v)
        )
        q, k = nn.relu(q), nn.relu(k)
        exact = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
        sums = exact("bthd,bthe->bhde", k, v)
        weights = exact("bthd,bhd->bth", q, k.sum(1))[..., None]
        joined = exact("bthd,bhde->bthe", q, sums) / (weights + LEAST)
        joined = rearrange(joined, "b t h d -> b t (h d)").astype(x.dtype)
        return self.layers.linear(d, wide_output=True, name="proj")(joined)


class CrossAttention(AttentionModule):
    """Returns attention from tokens to the rows of a text that the mask keeps.

    Its input is the residual stream itself, without a norm; its heads are not the linear attention's.
    """

    kind: Kind
    layers: Layers

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        text: Float[Array, "B L D"],
        mask: Bool[Array, "B L"] | None,
    ) -> Float[Array, "B T D"]:
        width = self.kind.cross_width
        q = self.layers.linear(width, name="q_linear")(x)
        k, v = jnp.split(self.layers.linear(2 * width, name="kv_linear")(text), 2, axis=-1)
        q, k = normed_qk(q, k) if self.kind.qk_norm else (q, k)
        heads = partial(rearrange, pattern="b t (h d) -> b t h d", h=self.kind.num_cross_heads)
        attended = self.attend(heads(q).astype(v.dtype), heads(k).astype(v.dtype), heads(v), mask)
        joined = rearrange(attended, "b t h d -> b t (h d)")
        return self.layers.linear(x.shape[-1], wide_output=True, name="proj")(joined)


def normed_qk(
    q: Float[Array, "B T W"], k: Float[Array, "B L W"]
) -> tuple[Float[Array, "B T W"], Float[Array, "B L W"]]:
    """Returns q and k, each normed over all heads; the norms belong to the module that calls."""
    return RMSNorm(RMS_EPS, name="q_norm")(q), RMSNorm(RMS_EPS, name="k_norm")(k)


class Depthwise(nn.Module):
    """Returns a 3x3 convolution of every channel alone, zeros around: `filter [3, 3, 1, F]`, `bias`."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W F"]) -> Float[Array, "B H W F"]:
        channels, (rows, columns) = x.shape[-1], x.shape[1:3]
        mean = nn.initializers.constant(1 / 9)
        taps = stored(self, "filter", mean, (3, 3, 1, channels))
        bias = stored(self, "bias", nn.initializers.zeros_init(), (channels,))
        around = jnp.pad(
            x.astype(jnp.promote_types(x.dtype, jnp.float32)), ((0, 0), (1, 1), (1, 1), (0, 0))
        )
        places = ((i, j) for i in range(3) for j in range(3))
        return bias + sum(
            taps[i, j, 0] * around[:, i : i + rows, j : j + columns] for i, j in places
        )


class GatedConvolution(nn.Module):
    """Returns a block's feed-forward part: wider, over neighbors, half of it a gate, back."""

    width: int
    grid: tuple[int, int]
    layers: Layers

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        hidden = nn.silu(self.layers.linear(2 * self.width, name="inverted_conv")(x))
        image = rearrange(hidden, "b (h w) f -> b h w f", h=self.grid[0])
        image = Depthwise(name="depth_conv")(image).astype(hidden.dtype)
        value, gate = jnp.split(rearrange(image, "b h w f -> b (h w) f"), 2, axis=-1)
        back = self.layers.linear(x.shape[-1], wide_output=True, name="point_conv")
        return back(value * nn.silu(gate))


class Block(nn.Module):
    """Returns a block's tokens: gated linear attention, attention on the text, gated convolution."""

    kind: Kind
    grid: tuple[int, int]
    layers: Layers

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        m: Float[Array, "B M"],
        text: Float[Array, "B L D"],
        mask: Bool[Array, "B L"] | None,
    ) -> Float[Array, "B T D"]:
        kind, eps = self.kind, self.kind.norm_eps
        shift1, scale1, gate1, shift2, scale2, gate2 = table_rows(self, m)
        attention = LinearAttention(kind.num_heads, kind.qk_norm, self.layers, name="attn")
        x = x + gate1 * attention(modulated(x, shift1, scale1, eps))
        x = x + CrossAttention(kind, self.layers, name="cross_attn")(x, text, mask)
        mlp = GatedConvolution(kind.mlp_width, self.grid, self.layers, name="mlp")
        return x + gate2 * mlp(modulated(x, shift2, scale2, eps))


class Sana(NetworkModule):
    """A text-to-image transformer that predicts the velocity from the data to the noise.

    Attributes:
        sample_size: rows and columns of the latents that it was trained for; a call may have others.
        interpolation_scale: divides the positions that are added to tokens; None adds none, as all
            published networks but that for 4096 pixels.
        num_heads: of the linear attention.
        num_cross_heads, cross_width: heads of the attention on the text, and channels of all of them.
        mlp_width: F, of the value and of the gate of a block's convolution.
        norm_eps: of the blocks' norms.
        qk_norm: whether q and k are normed over all heads (Sana 1.5).
        guidance_embed: whether the strength of guidance is an entry of the condition (Sana Sprint).
        guidance_unit: that strength for a scale of 1, as the published pipeline multiplies it.
        timestep_scale: multiplies times 0 to 1000 before the network is called, as the published pipeline.
        learn_sigma: whether the stored output has further channels, which are left out.
        text_width, text_length: E, and the rows of text in examples; a call may have others.
    """

    sample_size: int = 32
    interpolation_scale: float | None = None
    patch_size: int = 1
    in_channels: int = 32
    hidden_size: int = 2240
    depth: int = 20
    num_heads: int = 70
    num_cross_heads: int = 20
    cross_width: int = 2240
    mlp_width: int = 5600
    norm_eps: float = 1e-6
    qk_norm: bool = False
    guidance_embed: bool = False
    guidance_unit: float = 1.0
    timestep_scale: float = 1.0
    learn_sigma: bool = False
    text_width: int = 2304
    text_length: int = 300

    scans_blocks = True
    prediction = "velocity"
    velocity_to = "noise"
    flow_shift = 3.0
    learned_variance = False
    guided_channels = None
    default_sampler = "flow-dpm-solver++"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], timestep: Num[Array, " B"], condition: Mapping[str, Any]
    ) -> Float[Array, "B H W C"]:
        """Returns the velocity, noise less data, of noisy latents.

        `timestep` is 1000 at noise and 0 at the data, times `timestep_scale`. `condition` holds `text
        [B, L, E]`, where rows of it are padding `text_mask [B, L]`, and with `guidance_embed` also
        `guidance [B]`, `guidance_unit` times the scale.

        Raises:
            ValueError: if the latents do not fit.
        """
        grid = self.grid_size(x)
        d, p, layers = self.hidden_size, self.patch_size, self.layers
        tokens = PatchEmbed(d, p, layers, name="x_embedder")(x)
        if self.interpolation_scale is not None:
            tokens = tokens + self.positions(grid)
        t_emb = TimestepEmbedder(d, layers=layers, name="t_embedder")(timestep)
        if self.guidance_embed:
            embed = TimestepEmbedder(d, layers=layers, name="guidance_embedder")
            t_emb = t_emb + embed(condition["guidance"])
        m = layers.linear(6 * d, wide_output=True, name="t_block")(nn.silu(t_emb))
        text = CaptionEmbedder(d, 0, layers, name="y_embedder")(condition["text"])
        text = RMSNorm(RMS_EPS, name="attention_y_norm")(text)
        names = [field.name for field in dataclasses.fields(Kind)]
        make_fn = partial(Block, Kind(**{n: getattr(self, n) for n in names}), grid, layers)
        mask = condition.get("text_mask")
        tokens = apply_blocks(self, make_fn, "blocks", self.depth, tokens, m, text, mask)
        features = p * p * self.in_channels * (1 + self.learn_sigma)
        out = TableOutput(features, layers, name="final_layer")(tokens, t_emb)
        out = rearrange(out, "b (h w) (p q c) -> b (h p) (w q) c", h=grid[0], p=p, q=p)
        return out[..., : self.in_channels]

    @property
    def flow_times(self) -> tuple[float, float]:  # type: ignore[override]
        """Returns the timestep at noise, and at the data."""
        return 1000.0 * self.timestep_scale, 0.0

    @property
    def has_null(self) -> bool:
        """Returns whether a second call guides: not where the strength is embedded."""
        return not self.guidance_embed

    def grid_size(self, x: Float[Array, "B H W C"]) -> tuple[int, int]:
        """Returns the rows and columns of tokens; raises `ValueError` for what does not fit."""
        d, p, cross = self.hidden_size, self.patch_size, self.cross_width
        if d % self.num_heads or cross % self.num_cross_heads:
            raise ValueError(
                f"hidden_size={d} must be divisible by num_heads={self.num_heads}, and cross_width="
                f"{cross} by num_cross_heads={self.num_cross_heads}."
            )
        if self.interpolation_scale is not None and d % 4:
            raise ValueError(f"hidden_size={d} must be divisible by 4 for the positions.")
        if x.ndim != 4 or x.shape[3] != self.in_channels or x.shape[1] % p or x.shape[2] % p:
            raise ValueError(
                f"x has shape {x.shape}; this model takes [B, H, W, {self.in_channels}] with H and W "
                f"divisible by {p}."
            )
        return x.shape[1] // p, x.shape[2] // p

    def positions(self, grid: tuple[int, int]) -> Float[Array, "1 T D"]:
        """Returns the table of positions of a grid, stretched to the range of the trained size."""
        assert self.interpolation_scale is not None
        base = self.sample_size // self.patch_size
        steps = tuple(base / n / self.interpolation_scale for n in grid)
        return jnp.asarray(sincos_positions(self.hidden_size, grid, (steps[0], steps[1])))[None]

    def sample_shape(self) -> tuple[int, int, int]:
        """Returns rows, columns and channels of the latents that it was trained for."""
        return self.sample_size, self.sample_size, self.in_channels

    def example_condition(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns abstract embeddings of prompts, and guidance where it is embedded."""
        shapes: dict[str, tuple[int, ...]] = {"text": (batch, self.text_length, self.text_width)}
        if self.guidance_embed:
            shapes["guidance"] = (batch,)
        return {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}

    def null_condition(self, condition: Condition, params: Params) -> None:
        """Returns None: the published null is the embedding of an empty prompt, which the caller brings."""

    def check_condition(self, condition: Condition) -> None:
        """Raises `ValueError` unless the entries fit, `guidance` where it is embedded and only there."""
        entries = {
            "text": Entry((None, self.text_width)),
            "text_mask": Entry((None,), "bool", required=False),
        }
        if self.guidance_embed:
            entries["guidance"] = Entry(())
        check_entries(condition, entries)
        check_text_mask(condition)
