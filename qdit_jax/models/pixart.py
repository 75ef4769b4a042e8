"""PixArt-alpha (arXiv:2310.00426) and PixArt-Sigma (arXiv:2403.04692): text to images.

Layer names follow the authors' checkpoints; a list index becomes `_i`. One is added: the self-attention
of a block with key-value compression is `attn_sr`, because no scale passes through its v.

Dimensions: B batch, H and W latent rows and columns, C latent channels, T tokens, D width, L rows of
text, E channels of text, k a compression's rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import groupby
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
    TableOutput,
    learned_null,
    modulated,
    table_rows,
)
from qdit_jax.models.layers import (
    AttentionModule,
    Mlp,
    PatchEmbed,
    TimestepEmbedder,
    sincos_positions,
)
from qdit_jax.models.linear import Layers, stored
from qdit_jax.models.network import NetworkModule
from qdit_jax.models.norms import LayerNorm, added_by, modulated_norm
from qdit_jax.models.runs import apply_blocks
from qdit_jax.types import Condition, Params

QK_NORM_EPS = 1e-5  # torch's default, which the authors leave
# What a condition holds, with the shape of one sample's entry.
TEXT = {"text": "[B, L, {width}]", "text_mask": "[B, L] booleans"}
SIZES = {"size": "[B, 2], rows and columns in pixels", "aspect_ratio": "[B, 1], rows by columns"}


class Compression(nn.Module):
    """Returns one token for each `factor x factor` of a grid: a weighted mean per channel, normalized.

    The parameters `sr/filter [k, k, 1, D]`, `sr/bias` and `norm` are those of the authors' depthwise
    convolution and norm. Rows and columns that fill no window are left out, as there.
    """

    factor: int
    grid: tuple[int, int]

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B t D"]:
        k, (rows, columns) = self.factor, self.grid
        mean = nn.initializers.constant(1 / k**2)
        weights = stored(self, "filter", mean, (k, k, 1, x.shape[-1]))
        bias = stored(self, "bias", nn.initializers.zeros_init(), (x.shape[-1],))
        image = x.astype(jnp.float32).reshape(len(x), rows, columns, -1)
        image = image[:, : rows // k * k, : columns // k * k]
        windows = rearrange(image, "b (h p) (w q) d -> b (h w) p q d", p=k, q=k)
        return (windows * weights[:, :, 0]).sum((2, 3)) + bias


class SelfAttention(AttentionModule):
    """Returns self-attention, with norms of q and k and fewer keys and values where it has them.

    Attributes:
        qk_norm: whether q and k are normalized over all channels before they are split into heads.
        compression: rows and columns of the grid that become one key and value; 1 is none.
        grid: rows and columns of tokens.
    """

    num_heads: int
    qk_norm: bool
    compression: int
    grid: tuple[int, int]
    layers: Layers

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        d = x.shape[-1]
        qkv = self.layers.linear(3 * d, name="qkv")(x)
        q, k, v = jnp.split(qkv, 3, axis=-1)
        if self.qk_norm:
            q = LayerNorm(QK_NORM_EPS, name="q_norm")(q).astype(v.dtype)
            k = LayerNorm(QK_NORM_EPS, name="k_norm")(k).astype(v.dtype)
        if self.compression > 1:
            fewer = Compression(self.compression, self.grid, name="sr")
            norm = LayerNorm(QK_NORM_EPS, name="norm")
            k, v = (norm(fewer(a)).astype(v.dtype) for a in (k, v))
        heads = partial(rearrange, pattern="b t (h d) -> b t h d", h=self.num_heads)
        joined = rearrange(self.attend(heads(q), heads(k), heads(v)), "b t h d -> b t (h d)")
        return self.layers.linear(d, name="proj")(joined)


class Block(nn.Module):
    """Returns a block's tokens: gated self-attention, attention on the text, gated MLP."""

    num_heads: int
    mlp_width: int
    qk_norm: bool
    compression: int
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
        shift1, scale1, gate1, shift2, scale2, gate2 = table_rows(self, m)
        attention = SelfAttention(
            self.num_heads,
            self.qk_norm,
            self.compression,
            self.grid,
            self.layers,
            name="attn_sr" if self.compression > 1 else "attn",
        )
        x = x + gate1 * attention(modulated(x, shift1, scale1))
        x = x + CrossAttention(self.num_heads, self.layers, name="cross_attn")(x, text, mask)
        mlp = Mlp(self.mlp_width, self.layers, name="mlp")
        return added_by(mlp, modulated_norm(x, shift2, scale2), x, gate2)


class PixArt(NetworkModule):
    """A text-to-image transformer; its fields are the configuration that a checkpoint stores.

    Attributes:
        sample_size: rows and columns of the latents that it was trained for; a call may have others.
        interpolation_scale: divides the positions: 0.5, 1, 2 or 4 for 256 to 2048 pixels.
        stored_positions: whether the table of positions of `sample_size` is a parameter. Those of
            other sizes are computed, stretched to the same range.
        size_conditions: whether the picture's size and aspect ratio are conditions (alpha, 1024 px).
        text_length: rows of the null caption, and of texts that are made as examples; a call may
            have others.
        null_caption: whether a learned caption that stands for none is a parameter.
        learn_sigma: whether the output has a variance fraction for each channel, as published.
        qk_norm: whether q and k of self-attention are normalized (some of Sigma).
        kv_compression: for each block, how many rows and columns of the grid become one key and
            value; 1 is none, and so is an empty tuple (all but some of Sigma).
    """

    sample_size: int = 64
    interpolation_scale: float = 1.0
    stored_positions: bool = False
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_width: int = 4608
    text_length: int = 120
    text_width: int = 4096
    null_caption: bool = True
    size_conditions: bool = False
    learn_sigma: bool = True
    qk_norm: bool = False
    kv_compression: tuple[int, ...] = ()

    scans_blocks = True
    prediction = "epsilon"
    # Whether a learned null caption, or the caller's `null_text`: guidance needs one of them.
    has_null = True
    guided_channels = None
    default_sampler = "dpm-solver++"
    default_guidance = 4.5

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], timestep: Num[Array, " B"], condition: Mapping[str, Any]
    ) -> Float[Array, "B H W out"]:
        """Returns the noise in `x`, then (with `learn_sigma`) the variance fraction in [-1, 1].

        `timestep` is 0 to 999, not necessarily whole. `condition` holds `text [B, L, E]` (of T5), and
        as published `text_mask [B, L]`, True where it has a token; with `size_conditions` also
        `size [B, 2]` and `aspect_ratio [B, 1]`.
        """
        self.check_fields()
        grid = self.grid_size(x)
        d, p = self.hidden_size, self.patch_size
        tokens = PatchEmbed(d, p, self.layers, name="x_embedder")(x)
        tokens = tokens + self.positions(grid).astype(tokens.dtype)
        t_emb = TimestepEmbedder(d, layers=self.layers, name="t_embedder")(timestep)
        if self.size_conditions:
            t_emb = t_emb + self.embedded_sizes(condition)
        m = self.layers.linear(6 * d, wide_output=True, name="t_block")(nn.silu(t_emb))
        null_rows = self.text_length if self.null_caption else 0
        embed = CaptionEmbedder(d, null_rows, self.layers, name="y_embedder")
        text = embed(required(condition, "text"))
        args = (m, text, condition.get("text_mask"))
        for first, count, factor in self.equal_blocks():
            make_fn = partial(
                Block, self.num_heads, self.mlp_width, self.qk_norm, factor, grid, self.layers
            )
            tokens = apply_blocks(self, make_fn, "blocks", count, tokens, *args, first=first)
        features = p * p * self.in_channels * (1 + self.learn_sigma)
        out = TableOutput(features, self.layers, name="final_layer")(tokens, t_emb)
        return rearrange(out, "b (h w) (p q c) -> b (h p) (w q) c", h=grid[0], p=p, q=p)

    @property
    def learned_variance(self) -> bool:
        """Returns whether the output carries a variance in further channels.

        The authors' ancestral sampler uses it; DDIM and DPM-Solver leave it out.
        """
        return self.learn_sigma

    def check_fields(self) -> None:
        """Raises `ValueError` unless the fields make a network."""
        d, heads = self.hidden_size, self.num_heads
        if d % heads or d % 4 or (self.size_conditions and d % 3):
            and_3 = ", by 3 for the sizes" if self.size_conditions else ""
            raise ValueError(
                f"hidden_size={d} must be divisible by num_heads={heads}, by 4 for the positions{and_3}."
            )
        if (
            len(self.kv_compression) not in (0, self.depth)
            or min(self.kv_compression, default=1) < 1
        ):
            raise ValueError(
                f"kv_compression={self.kv_compression}: give one number, 1 or more, for each of the "
                f"{self.depth} blocks, or none."
            )

    def grid_size(self, x: Float[Array, "B H W C"]) -> tuple[int, int]:
        """Returns the rows and columns of tokens; raises `ValueError` for latents that do not fit."""
        p, most = self.patch_size, max(self.kv_compression, default=1)
        rows, columns, channels = x.shape[1:]
        if channels != self.in_channels or rows % p or columns % p or min(rows, columns) < p * most:
            raise ValueError(
                f"x has shape {x.shape}; this model takes [B, H, W, {self.in_channels}] with H and W "
                f"divisible by {p}, at least {p * most}."
            )
        return rows // p, columns // p

    def positions(self, grid: tuple[int, int]) -> Float[Array, "1 T D"]:
        """Returns the table of positions of a grid: the stored one, or one computed for its size."""
        base = self.sample_size // self.patch_size

        def table(size: tuple[int, int]) -> Array:
            steps = tuple(base / n / self.interpolation_scale for n in size)
            return jnp.asarray(sincos_positions(self.hidden_size, size, (steps[0], steps[1])))[None]

        if not self.stored_positions:
            return table(grid)
        shape = (1, base * base, self.hidden_size)
        own = stored(self, "pos_embed", lambda key, shape: table((base, base)), shape)
        return jax.lax.stop_gradient(own) if grid == (base, base) else table(grid)

    def embedded_sizes(self, condition: Mapping[str, Any]) -> Float[Array, "B D"]:
        """Returns the embeddings of rows, columns and aspect ratio, side by side."""
        found = []
        for name, entry in (("csize_embedder", "size"), ("ar_embedder", "aspect_ratio")):
            embed = TimestepEmbedder(self.hidden_size // 3, layers=self.layers, name=name)
            found.append(rearrange(embed(required(condition, entry)), "b n d -> b (n d)"))
        return jnp.concatenate(found, axis=-1)

    def equal_blocks(self) -> Iterator[tuple[int, int, int]]:
        """Yields the first block, the number and the compression of neighbors that have the same."""
        factors = self.kv_compression or (1,) * self.depth
        first = 0
        for factor, group in groupby(factors):
            count = len(list(group))
            yield first, count, factor
            first += count

    def sample_shape(self) -> tuple[int, int, int]:
        """Returns rows, columns and channels of the latents that it was trained for."""
        return self.sample_size, self.sample_size, self.in_channels

    def example_condition(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the abstract condition of `batch` samples."""
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            "text": ((self.text_length, self.text_width), jnp.float32),
            "text_mask": ((self.text_length,), jnp.bool_),
        }
        if self.size_conditions:
            shapes |= {"size": ((2,), jnp.float32), "aspect_ratio": ((1,), jnp.float32)}
        return {
            name: jax.ShapeDtypeStruct((batch, *shape), dtype)
            for name, (shape, dtype) in shapes.items()
        }

    def null_condition(self, condition: Condition, params: Params) -> Condition | None:
        """Returns the condition with the learned null caption, under the mask of its prompt.

        None for checkpoints without one, as those of diffusers: the caller brings `null_text`.

        Raises:
            ValueError: if a text has more rows than the null caption.
        """
        return learned_null(condition, params) if self.null_caption else None

    def check_condition(self, condition: Condition) -> None:
        """Raises `ValueError` for a missing or further entry, or one of a wrong shape or dtype."""
        wanted = {**TEXT, **(SIZES if self.size_conditions else {})}
        if not isinstance(condition, Mapping) or set(condition) != set(wanted):
            found = (
                sorted(condition) if isinstance(condition, Mapping) else type(condition).__name__
            )
            needs = "; ".join(f"{name} {shape}" for name, shape in wanted.items())
            raise ValueError(f"condition has {found}; give {needs.format(width=self.text_width)}.")
        arrays = {name: np.asarray(entry) for name, entry in condition.items()}
        text, mask = arrays["text"], arrays["text_mask"]
        if text.ndim != 3 or text.shape[-1] != self.text_width or 0 in text.shape:
            raise ValueError(f"text has shape {text.shape}; give [B, L, {self.text_width}].")
        if mask.dtype != bool or mask.shape != text.shape[:2] or not mask.any(axis=1).all():
            raise ValueError(
                f"text_mask has shape {mask.shape} and dtype {mask.dtype}; give booleans "
                f"{text.shape[:2]}, True for at least one token of each text."
            )
        for name, width in (("size", 2), ("aspect_ratio", 1)):
            if name in arrays and arrays[name].shape != (len(text), width):
                raise ValueError(
                    f"{name} has shape {arrays[name].shape}; give {SIZES[name]} for {len(text)} texts."
                )


def required(condition: Mapping[str, Any], name: str) -> Array:
    """Returns an entry of a condition; raises `ValueError` if it is missing."""
    if name not in condition:
        raise ValueError(f"the condition lacks {name}: {({**TEXT, **SIZES})[name]}.")
    return condition[name]
