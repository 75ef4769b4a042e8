"""LightningDiT (arXiv:2501.01423): a DiT that predicts a velocity, with RMS norms, SwiGLU and rope.

Layer names follow the published checkpoints; a list index becomes `_i`.
Dimensions: B batch, H and W latent rows and columns, C latent channels, T tokens, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float, Int, Num

from qdit_jax.models.class_conditional import ClassConditional
from qdit_jax.models.layers import (
    AttentionModule,
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    sincos_positions,
)
from qdit_jax.models.linear import Layers, stored
from qdit_jax.models.network import NetworkModule
from qdit_jax.models.norms import RMSNorm, layer_norm
from qdit_jax.models.rotary import grid_positions, pairs_turned, rotary_angles
from qdit_jax.models.runs import apply_blocks

# cos and sin of every channel of a head, `[T, h]`, each pair's twice.
Tables = tuple[Float[Array, "T h"], Float[Array, "T h"]]


class SwiGLU(nn.Module):
    """Returns `w3(silu(a) * b)` of the halves a and b of `w12(x)`."""

    hidden_size: int
    layers: Layers

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        a, b = jnp.split(self.layers.linear(2 * self.hidden_size, name="w12")(x), 2, axis=-1)
        return self.layers.linear(x.shape[-1], name="w3")(nn.silu(a) * b)


class RotaryAttention(AttentionModule):
    """Returns self-attention whose q and k are normalized per head and turned, where it has that."""

    num_heads: int
    qk_norm: bool
    layers: Layers

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], tables: Tables | None) -> Float[Array, "B T D"]:
        d = x.shape[-1]
        qkv = self.layers.linear(3 * d, name="qkv")(x)
        q, k, v = rearrange(qkv, "b t (qkv h d) -> qkv b t h d", qkv=3, h=self.num_heads)
        if self.qk_norm:
            q, k = (RMSNorm(name=f"{n}_norm")(a).astype(v.dtype) for n, a in (("q", q), ("k", k)))
        if tables is not None:
            cos, sin = (table[:, 0::2] for table in tables)
            q, k = pairs_turned(q, cos, sin), pairs_turned(k, cos, sin)
        joined = rearrange(self.attend(q, k, v), "b t h d -> b t (h d)")
        return self.layers.linear(d, name="proj")(joined)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a block is made of: the fields of `LightningDiT` of the same names."""

    num_heads: int
    mlp_width: int
    rms_norm: bool
    qk_norm: bool
    shifts: bool


class Block(nn.Module):
    """Returns a block's output, modulated by the condition as in DiT, with shifts or without."""

    kind: Kind
    layers: Layers

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], c: Float[Array, "B D"], tables: Tables | None
    ) -> Float[Array, "B T D"]:
        kind, d = self.kind, x.shape[-1]
        zeros = nn.initializers.zeros_init()
        rows = 6 if kind.shifts else 4
        adaln = self.layers.linear(rows * d, zeros, wide_output=True, name="adaLN_modulation")
        parts = jnp.split(adaln(nn.silu(c))[:, None], rows, axis=-1)
        first, second = parts[: rows // 2], parts[rows // 2 :]
        attention = RotaryAttention(kind.num_heads, kind.qk_norm, self.layers, name="attn")
        hidden = modulated(normed(x, kind.rms_norm, "norm1"), first[:-1])
        x = x + first[-1] * attention(hidden, tables)
        mlp = SwiGLU(kind.mlp_width, self.layers, name="mlp")
        return x + second[-1] * mlp(modulated(normed(x, kind.rms_norm, "norm2"), second[:-1]))


class StoredRope(nn.Module):
    """Returns the stored tables of cos and sin, `[T, head channels]`, as published checkpoints have them.

    The first half of a head's channels turns with the row, the second with the column.
    """

    head_width: int
    grid: tuple[int, int]

    @nn.compact
    def __call__(self) -> Tables:
        def table(function: Callable[[Array], Array]) -> Callable[..., Array]:
            half = self.head_width // 2
            angles = rotary_angles(grid_positions(*self.grid), (half, half))
            return lambda key, shape: jnp.repeat(function(angles), 2, axis=-1)

        shape = (self.grid[0] * self.grid[1], self.head_width)
        tables = {"freqs_cos": jnp.cos, "freqs_sin": jnp.sin}
        cos, sin = (
            jax.lax.stop_gradient(stored(self, name, table(function), shape))
            for name, function in tables.items()
        )
        return cos, sin


def normed(x: Float[Array, "B T D"], rms: bool, name: str) -> Float[Array, "B T D"]:
    """Returns the norm of `x`: RMS with a scale, whose module calls this, or without parameters."""
    return RMSNorm(name=name)(x) if rms else layer_norm(x)


def modulated(x: Float[Array, "B T D"], rows: list[Array]) -> Float[Array, "B T D"]:
    """Returns `x * (1 + scale)`, plus the shift where `rows` are shift and scale."""
    scaled = x * (1 + rows[-1])
    return scaled if len(rows) == 1 else scaled + rows[0]


class FinalLayer(nn.Module):
    """Returns the patches' values, `[B, T, features]`."""

    features: int
    rms_norm: bool
    layers: Layers

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], c: Float[Array, "B D"]) -> Float[Array, "B T P"]:
        zeros = nn.initializers.zeros_init()
        adaln = self.layers.linear(
            2 * x.shape[-1], zeros, wide_output=True, name="adaLN_modulation"
        )
        rows = jnp.split(adaln(nn.silu(c))[:, None], 2, axis=-1)
        hidden = modulated(normed(x, self.rms_norm, "norm_final"), rows)
        return self.layers.linear(self.features, zeros, wide_output=True, name="linear")(hidden)


class LightningDiT(ClassConditional, NetworkModule):
    """A class-conditional velocity transformer; its fields are the configuration that is stored.

    Time runs from 0 at noise to 1 at the data, and the velocity points to the data. Latents are those
    of an autoencoder, normalized by a mean and a deviation per channel, which no checkpoint holds.

    Attributes:
        input_size: rows and columns of the latent (one number when equal).
        mlp_width: hidden channels of a block's gated MLP.
        null_class: whether the label table ends with a row for "no label".
        learn_sigma: whether the stored output has further channels, which are left out.
        rms_norm: whether norms are RMS with a scale; else layer norms without parameters.
        rope: whether q and k are turned by stored tables, beside the added positions.
        qk_norm: whether q and k are normalized per head.
        shifts: whether the blocks' modulation shifts.
    """

    input_size: int | tuple[int, int] = 16
    patch_size: int = 1
    in_channels: int = 32
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_width: int = 3072
    num_classes: int = 1000
    null_class: bool = True
    learn_sigma: bool = False
    rms_norm: bool = True
    rope: bool = True
    qk_norm: bool = False
    shifts: bool = True

    scans_blocks = True
    prediction = "velocity"
    flow_times = (0.0, 1.0)
    velocity_to = "data"
    learned_variance = False
    default_sampler = "flow"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], timestep: Num[Array, " B"], condition: Int[Array, " B"]
    ) -> Float[Array, "B H W C"]:
        """Returns the velocity of latents `x`: `timestep` 0 to 1, `condition` a label or `num_classes`."""
        d, p = self.hidden_size, self.patch_size
        grid = self.grid_size(x)
        tokens = PatchEmbed(d, p, self.layers, name="x_embedder")(x)
        table = stored(self, "pos_embed", init_positions(grid), (1, *tokens.shape[1:]))
        tokens = tokens + jax.lax.stop_gradient(table).astype(tokens.dtype)
        c = TimestepEmbedder(d, layers=self.layers, name="t_embedder")(timestep)
        num_rows = self.num_classes + int(self.null_class)
        c = c + LabelEmbedder(num_rows, d, name="y_embedder")(condition)
        rope = StoredRope(d // self.num_heads, grid, name="feat_rope") if self.rope else None
        names = [field.name for field in dataclasses.fields(Kind)]
        make_fn = partial(Block, Kind(**{n: getattr(self, n) for n in names}), self.layers)
        tables = None if rope is None else rope()
        tokens = apply_blocks(self, make_fn, "blocks", self.depth, tokens, c, tables)
        features = p * p * self.in_channels * (2 if self.learn_sigma else 1)
        out = FinalLayer(features, self.rms_norm, self.layers, name="final_layer")(tokens, c)
        out = rearrange(out, "b (h w) (p q c) -> b (h p) (w q) c", h=grid[0], p=p, q=p)
        return out[..., : self.in_channels]

    @property
    def guided_channels(self) -> int:
        """Returns 3, as published, or all channels where there are fewer."""
        return min(3, self.in_channels)

    def sample_shape(self) -> tuple[int, int, int]:
        """Returns rows, columns and channels of the latents."""
        size = self.input_size
        height, width = (size, size) if isinstance(size, int) else size
        return height, width, self.in_channels

    def grid_size(self, x: Float[Array, "B H W C"]) -> tuple[int, int]:
        """Returns the rows and columns of tokens.

        Raises:
            ValueError: for another input size, or fields that make no network.
        """
        d, p, heads = self.hidden_size, self.patch_size, self.num_heads
        if d % heads or d % 4 or (self.rope and d // heads % 4):
            raise ValueError(
                f"hidden_size={d} must be divisible by num_heads={heads} and by 4, and with rope the "
                f"channels of a head, {d / heads:g}, by 4."
            )
        rows, columns, channels = self.sample_shape()
        if x.shape[1:] != (rows, columns, channels) or rows % p or columns % p:
            raise ValueError(
                f"x has shape {x.shape}; this model takes [B, {rows}, {columns}, {channels}] in "
                f"patches of {p}x{p}, and its stored positions are of that size."
            )
        return rows // p, columns // p


def init_positions(grid: tuple[int, int]) -> Callable[..., Array]:
    """Returns an initializer of the table of positions of a grid."""
    return lambda key, shape: jnp.asarray(sincos_positions(shape[-1], grid))[None]
