"""Z-Image: text to images by one stream of image and text, after refiners of each.

Layer names follow the authors' checkpoints; a list index becomes `_i`.

Both sequences are padded to multiples of `MULTIPLE` with learned tokens, which are attended. A text's
own rows come first: where `text_mask` leaves rows out, those that it keeps move together.

Dimensions: B batch, H and W latent rows and columns, C latent channels, N image tokens and P rows of
text, both after padding, L rows of text as given, T = N + P, D width, A width of the time embedding,
E channels of text, h heads, d channels of a head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Num

from qdit_jax.models.condition_checks import Entry, check_entries, check_text_mask
from qdit_jax.models.layers import AttentionModule, timestep_features
from qdit_jax.models.linear import Layers, stored
from qdit_jax.models.network import NetworkModule
from qdit_jax.models.norms import RMSNorm, layer_norm
from qdit_jax.models.rotary import grid_positions, rotary_angles, rotated
from qdit_jax.models.runs import apply_blocks
from qdit_jax.types import Condition, Params

MULTIPLE = 32  # of the tokens of either sequence
QK_EPS = 1e-5  # of the norms of q and k, whatever the others have
NORMAL = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a block is made of: the fields of `ZImage` of the same names."""

    num_heads: int
    mlp_width: int
    qk_norm: bool
    norm_eps: float


class Attention(AttentionModule):
    """Returns self-attention, each head's q and k normed where it has that, and turned by position."""

    num_heads: int
    qk_norm: bool
    layers: Layers

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        angles: Float[Array, "... T half"],
        mask: Bool[Array, "B T"] | None,
    ) -> Float[Array, "B T D"]:
        d = x.shape[-1]
        qkv = self.layers.linear(3 * d, name="qkv")(x)
        q, k, v = rearrange(qkv, "b t (qkv h d) -> qkv b t h d", qkv=3, h=self.num_heads)
        if self.qk_norm:
            q, k = RMSNorm(QK_EPS, name="q_norm")(q), RMSNorm(QK_EPS, name="k_norm")(k)
        q, k = (rotated(a, angles).astype(v.dtype) for a in (q, k))
        joined = rearrange(self.attend(q, k, v, mask), "b t h d -> b t (h d)")
        return self.layers.linear(d, wide_output=True, name="out")(joined)


class FeedForward(nn.Module):
    """Returns `w2(silu(w1(x)) * w3(x))`."""

    width: int
    layers: Layers

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate, value = (self.layers.linear(self.width, name=name)(x) for name in ("w1", "w3"))
        return self.layers.linear(x.shape[-1], wide_output=True, name="w2")(nn.silu(gate) * value)


class Block(nn.Module):
    """Returns a block's tokens: RMS norms before and after attention and MLP.

    With a time embedding, inputs are scaled and outputs gated by it; nothing is shifted.
    """

    kind: Kind
    layers: Layers

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        angles: Float[Array, "... T half"],
        mask: Bool[Array, "B T"] | None,
        c: Float[Array, "B A"] | None,
    ) -> Float[Array, "B T D"]:
        d, kind = x.shape[-1], self.kind
        scale1: Any = 1.0
        gate1 = scale2 = gate2 = scale1
        if c is not None:
            adaln = self.layers.linear(4 * d, wide_output=True, name="adaLN_modulation")
            scale1, gate1, scale2, gate2 = jnp.split(adaln(c)[:, None], 4, axis=-1)
            scale1, scale2 = 1 + scale1, 1 + scale2
            gate1, gate2 = jnp.tanh(gate1), jnp.tanh(gate2)
        norm = partial(RMSNorm, kind.norm_eps)
        attention = Attention(kind.num_heads, kind.qk_norm, self.layers, name="attention")
        hidden = attention(norm(name="attention_norm1")(x) * scale1, angles, mask)
        x = x + gate1 * norm(name="attention_norm2")(hidden)
        hidden = norm(name="ffn_norm1")(x) * scale2
        hidden = FeedForward(kind.mlp_width, self.layers, name="feed_forward")(hidden)
        return x + gate2 * norm(name="ffn_norm2")(hidden)


class TimeEmbedder(nn.Module):
    """Returns the vector of times, through sinusoids and an MLP of another width inside."""

    width: int
    mlp_width: int
    layers: Layers

    @nn.compact
    def __call__(self, timestep: Num[Array, " B"]) -> Float[Array, "B A"]:
        hidden = self.layers.linear(self.mlp_width, NORMAL, name="mlp_0")(
            timestep_features(timestep)
        )
        out = self.layers.linear(self.width, NORMAL, wide_output=True, name="mlp_2")
        return out(nn.silu(hidden))


class FinalLayer(nn.Module):
    """Returns the values of patches, `[B, N, features]`; the time embedding scales its input."""

    features: int
    layers: Layers

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], c: Float[Array, "B A"]) -> Float[Array, "B N F"]:
        adaln = self.layers.linear(x.shape[-1], wide_output=True, name="adaLN_modulation")
        hidden = layer_norm(x) * (1 + adaln(nn.silu(c))[:, None])
        return self.layers.linear(self.features, wide_output=True, name="linear")(hidden)


class ZImage(NetworkModule):
    """A text-to-image transformer that predicts the velocity from the noise to the data.

    Attributes:
        sample_size: rows and columns of the latents that are sampled by default (one number when
            equal); a call may have others.
        depth, refiner_depth: blocks of the joint sequence, and of each sequence before.
        mlp_width: hidden channels of a block's gated MLP.
        time_width, time_mlp_width: A, and the hidden channels of its MLP.
        time_unit: multiplies times 0 to 1 before their sinusoids.
        norm_eps: of all RMS norms but those of q and k.
        qk_norm: whether each head's q and k are normed.
        rope_axes: channels of a head that turn with the three coordinates of a position.
        rope_lengths: how many positions each coordinate has; a call needs fewer.
        text_width, text_length: E, and the rows of text in examples; a call may have others.
    """

    sample_size: int | tuple[int, int] = 128
    patch_size: int = 2
    in_channels: int = 16
    hidden_size: int = 3840
    depth: int = 30
    refiner_depth: int = 2
    num_heads: int = 30
    mlp_width: int = 10240
    time_width: int = 256
    time_mlp_width: int = 1024
    time_unit: float = 1000.0
    norm_eps: float = 1e-5
    qk_norm: bool = True
    rope_axes: tuple[int, ...] = (32, 48, 48)
    rope_lengths: tuple[int, ...] = (1024, 512, 512)
    rope_base: float = 256.0
    text_width: int = 2560
    text_length: int = 512

    scans_blocks = True
    prediction = "velocity"
    flow_times = (0.0, 1.0)
    velocity_to = "data"
    flow_shift = 3.0
    flow_spacing = "uniform"
    learned_variance = False
    has_null = True  # the caller's: the pipeline embeds an empty prompt
    guided_channels = None
    default_sampler = "flow-euler"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], timestep: Num[Array, " B"], condition: Mapping[str, Any]
    ) -> Float[Array, "B H W C"]:
        """Returns the velocity, data less noise, of noisy latents.

        `timestep` is 0 at noise and 1 at the data. `condition` holds `text [B, L, E]`, and where rows
        of it are padding `text_mask [B, L]`.

        Raises:
            ValueError: if the latents or the text do not fit.
        """
        rows, columns = self.grid_size(x, condition["text"].shape[1])
        d, p, layers = self.hidden_size, self.patch_size, self.layers
        embedder = TimeEmbedder(self.time_width, self.time_mlp_width, layers, name="t_embedder")
        c = embedder(timestep * self.time_unit)
        patches = rearrange(x, "b (h p) (w q) c -> b (h w) (p q c)", p=p, q=p)
        image = layers.linear(d, wide_output=True, name="x_embedder")(patches)
        image = self.padded(image, "x_pad_token", rows * columns)
        text, count = kept_first(condition["text"], condition.get("text_mask"))
        text = RMSNorm(self.norm_eps, name="cap_embedder_0")(text)
        text = layers.linear(d, wide_output=True, name="cap_embedder_1")(text)
        own = text.shape[1] if count is None else count[:, None]
        text = self.padded(text, "cap_pad_token", own)
        (N, P), there, seen = (image.shape[1], text.shape[1]), None, None
        if count is not None:
            there = jnp.arange(P) < in_multiples(count)[:, None]
            seen = jnp.pad(there, ((0, 0), (N, 0)), constant_values=True)
        turns = self.angles((rows, columns), P, count)
        names = [field.name for field in dataclasses.fields(Kind)]
        make_fn = partial(Block, Kind(**{n: getattr(self, n) for n in names}), layers)
        apply = partial(apply_blocks, self, make_fn)
        depth = self.refiner_depth
        image = apply("noise_refiner", depth, image, turns[..., :N, :], None, c)
        text = apply("context_refiner", depth, text, turns[..., N:, :], there, None)
        tokens = jnp.concatenate([image, text], axis=1)
        tokens = apply("layers", self.depth, tokens, turns, seen, c)
        out = FinalLayer(p * p * self.in_channels, layers, name="final_layer")
        values = out(tokens[:, : rows * columns], c)
        return rearrange(values, "b (h w) (p q c) -> b (h p) (w q) c", h=rows, p=p, q=p)

    def padded(
        self, tokens: Float[Array, "B T D"], name: str, count: int | Int[Array, "B 1"]
    ) -> Float[Array, "B padded D"]:
        """Returns tokens in a multiple of `MULTIPLE`: the first `count`, then the learned one `name`."""
        length = in_multiples(tokens.shape[1])
        token = stored(self, name, NORMAL, (1, tokens.shape[-1]))
        longer = jnp.pad(tokens, ((0, 0), (0, length - tokens.shape[1]), (0, 0)))
        own = jnp.arange(length) < count
        return jnp.where(own[..., None], longer, token)

    def angles(
        self, grid: tuple[int, int], length: int, count: Int[Array, " B"] | None
    ) -> Float[Array, "... T half"]:
        """Returns the rotary angles of the image's tokens, then of `length` rows of text.

        A row of text is at (its number from 1, 0, 0), a patch at (the number of rows after padding + 1,
        its row, its column), a learned token of the image at (0, 0, 0).
        """
        lines = rotary_angles(np.arange(length + 2)[:, None], self.rope_axes[:1], self.rope_base)
        plane = rotary_angles(grid_positions(*grid), self.rope_axes[1:], self.rope_base)
        first = lines[length + 1] if count is None else lines[in_multiples(count) + 1]  # [B, half]
        lead, (num, half) = first.shape[:-1], plane.shape
        first = jnp.broadcast_to(first[..., None, :], (*lead, num, first.shape[-1]))
        image = jnp.concatenate([first, jnp.broadcast_to(plane, (*lead, num, half))], axis=-1)
        after = ((0, 0),) * len(lead)
        image = jnp.pad(image, (*after, (0, in_multiples(num) - num), (0, 0)))
        text = jnp.pad(lines[1 : length + 1], ((0, 0), (0, half)))
        return jnp.concatenate([image, jnp.broadcast_to(text, (*lead, *text.shape))], axis=-2)

    def grid_size(self, x: Float[Array, "B H W C"], length: int) -> tuple[int, int]:
        """Returns the rows and columns of tokens; raises `ValueError` for what does not fit.

        Args:
            length: rows of text.
        """
        p, heads, axes = self.patch_size, self.num_heads, self.rope_axes
        if self.hidden_size % heads or len(axes) != 3 or sum(axes) != self.hidden_size // heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be divisible by num_heads={heads}, and "
                f"rope_axes={axes} be three numbers that add up to a head's channels."
            )
        if x.ndim != 4 or x.shape[3] != self.in_channels or x.shape[1] % p or x.shape[2] % p:
            raise ValueError(
                f"x has shape {x.shape}; this model takes [B, H, W, {self.in_channels}] with H and W "
                f"divisible by {p}."
            )
        grid = x.shape[1] // p, x.shape[2] // p
        needed = (in_multiples(length) + 2, *grid)
        if any(n > most for n, most in zip(needed, self.rope_lengths, strict=True)):
            raise ValueError(
                f"x of shape {x.shape} with {length} rows of text needs {needed} positions; this model "
                f"has rope_lengths={self.rope_lengths}."
            )
        return grid

    def num_tokens(self, shape: tuple[int, ...]) -> int:
        """Returns how many tokens the image of a sample has, padding left out."""
        return (shape[-3] // self.patch_size) * (shape[-2] // self.patch_size)

    def sample_shape(self) -> tuple[int, int, int]:
        """Returns rows, columns and channels of the latents."""
        size = self.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height, width, self.in_channels

    def example_condition(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns abstract embeddings of prompts."""
        shape = (batch, self.text_length, self.text_width)
        return {"text": jax.ShapeDtypeStruct(shape, jnp.float32)}

    def null_condition(self, condition: Condition, params: Params) -> None:
        """Returns None: the published null is the embedding of an empty prompt, which the caller brings."""

    def check_condition(self, condition: Condition) -> None:
        """Raises `ValueError` unless there are embeddings of prompts that fit."""
        mask = Entry((None,), "bool", required=False)
        check_entries(condition, {"text": Entry((None, self.text_width)), "text_mask": mask})
        check_text_mask(condition)


def in_multiples(count: Any) -> Any:
    """Returns a number of tokens after padding."""
    return -(-count // MULTIPLE) * MULTIPLE


def kept_first(
    text: Float[Array, "B L E"], mask: Bool[Array, "B L"] | None
) -> tuple[Float[Array, "B L E"], Int[Array, " B"] | None]:
    """Returns texts whose kept rows come first, and how many those are; None for all of all texts."""
    if mask is None:
        return text, None
    mask = jnp.asarray(mask)
    order = jnp.argsort(~mask, axis=1, stable=True)
    return jnp.take_along_axis(jnp.asarray(text), order[..., None], axis=1), mask.sum(axis=1)
