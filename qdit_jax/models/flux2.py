"""The text-to-image transformer of FLUX.2 (klein, dev; Black Forest Labs).

Layer names follow the published checkpoints; a list index becomes `_i`. Against FLUX.1: all blocks of a
kind share one modulation, MLPs are gated, and positions have four coordinates.
Dimensions: B batch, H and W latent rows and columns, C latent channels, N image tokens, L rows of text,
T both, D width, E channels of text, A coordinates of a position, h heads, d channels of a head.
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

from qdit_jax.models.condition_checks import Entry, check_entries
from qdit_jax.models.flux import TIME_UNIT, Embedder, Modulation
from qdit_jax.models.joint import ModulatedOutput, StreamAttention, joint_attention
from qdit_jax.models.layers import AttentionModule, timestep_features
from qdit_jax.models.linear import Layers
from qdit_jax.models.network import NetworkModule
from qdit_jax.models.norms import RMSNorm, added_by, modulated_norm
from qdit_jax.models.rotary import grid_positions, rotary_angles, rotated
from qdit_jax.models.runs import apply_blocks
from qdit_jax.types import Condition, Params

AXES = 4  # coordinates of a position: a picture's number, its row, its column; a text's row
Vectors = list[Float[Array, "B 1 D"]]  # of a modulation


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a block is made of: the fields of `Flux2` of the same names."""

    num_heads: int
    mlp_width: int
    norm_eps: float


class QKNorm(nn.Module):
    """Returns queries and keys, each head normalized."""

    eps: float

    @nn.compact
    def __call__(
        self, q: Float[Array, "B T h d"], k: Float[Array, "B T h d"]
    ) -> tuple[Float[Array, "B T h d"], Float[Array, "B T h d"]]:
        return RMSNorm(self.eps, name="query_norm")(q), RMSNorm(self.eps, name="key_norm")(k)


class SelfAttention(StreamAttention):
    """The projections of one stream, with norms of queries and keys."""

    eps: float = 1e-6

    def setup(self) -> None:
        super().setup()
        self.norm = QKNorm(self.eps)

    def normed(
        self, q: Float[Array, "B N h d"], k: Float[Array, "B N h d"]
    ) -> tuple[Float[Array, "B N h d"], Float[Array, "B N h d"]]:
        """Returns queries and keys, each head normalized."""
        return self.norm(q, k)


def gated(hidden: Float[Array, "B T F2"]) -> Float[Array, "B T F"]:
    """Returns `silu(a) * b` of the halves a and b of the last axis."""
    gate, value = jnp.split(hidden, 2, axis=-1)
    return nn.silu(gate) * value


class DoubleBlock(nn.Module):
    """Returns the tokens of text and image after attention over both, with layers of their own."""

    kind: Kind
    layers: Layers

    @nn.compact
    def __call__(
        self,
        streams: tuple[Float[Array, "B L D"], Float[Array, "B N D"]],
        vectors: tuple[Vectors, Vectors],
        angles: Float[Array, "... T half"],
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B N D"]]:
        kind, d, names = self.kind, streams[0].shape[-1], ("txt", "img")
        attentions = [
            SelfAttention(d, kind.num_heads, self.layers, eps=kind.norm_eps, name=f"{name}_attn")
            for name in names
        ]
        inputs = [
            modulated_norm(x, m[0], m[1], kind.norm_eps)
            for x, m in zip(streams, vectors, strict=True)
        ]
        attended = joint_attention(attentions, inputs, angles)
        text, image = map(self.after, names, streams, vectors, attended)
        return text, image

    def after(
        self, name: str, x: Float[Array, "B N D"], m: Vectors, attended: Float[Array, "B N D"]
    ) -> Float[Array, "B N D"]:
        """Returns a stream's tokens after its MLP."""
        x = x + m[2] * attended
        hidden = modulated_norm(x, m[3], m[4], self.kind.norm_eps)
        first = self.layers.linear(2 * self.kind.mlp_width, name=f"{name}_mlp_0")
        second = self.layers.linear(x.shape[-1], wide_output=True, name=f"{name}_mlp_2")
        return added_by(second.fused, gated(first.fused(hidden)), x, m[5])


class SingleBlock(AttentionModule):
    """Returns the tokens of text and image, in one sequence, after attention and MLP in parallel.

    Both read one input through one layer, `linear1`, and both write through one, `linear2`.
    """

    kind: Kind
    layers: Layers

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], vectors: Vectors, angles: Float[Array, "... T half"]
    ) -> Float[Array, "B T D"]:
        kind, d = self.kind, x.shape[-1]
        shift, scale, gate = vectors
        linear1 = self.layers.linear(3 * d + 2 * kind.mlp_width, name="linear1")
        hidden = linear1.fused(modulated_norm(x, shift, scale, kind.norm_eps))
        qkv, hidden = jnp.split(hidden, [3 * d], axis=-1)
        q, k, v = rearrange(qkv, "b t (qkv h d) -> qkv b t h d", qkv=3, h=kind.num_heads)
        normed = QKNorm(kind.norm_eps, name="norm")(q, k)
        q, k = (rotated(a, angles).astype(v.dtype) for a in normed)
        attended = rearrange(self.attend(q, k, v), "b t h d -> b t (h d)")
        both = jnp.concatenate([attended, gated(hidden)], axis=-1)
        linear2 = self.layers.linear(d, wide_output=True, name="linear2")
        return added_by(linear2.fused, both, x, gate)


class Flux2(NetworkModule):
    """A transformer of FLUX.2; its fields are the configuration that a checkpoint stores.

    The latents have the channels of 2 x 2 of the autoencoder's in one, and may have any size.

    Attributes:
        sample_size: rows and columns of the latents that are sampled by default (one number when
            equal).
        depth, single_depth: double and single blocks.
        mlp_width: hidden channels of a block's gated MLP.
        norm_eps: of all norms.
        guidance_embed: whether the strength of guidance is an entry of the condition (dev).
        time_channels: of the sinusoids of time.
        rope_axes: channels of a head that turn with the four coordinates of a position.
        text_width, text_length: E, and rows of text in examples; a call takes any number.
    """

    sample_size: int | tuple[int, int] = 64
    in_channels: int = 128
    out_channels: int = 128
    hidden_size: int = 3072
    depth: int = 5
    single_depth: int = 20
    num_heads: int = 24
    mlp_width: int = 9216
    norm_eps: float = 1e-6
    guidance_embed: bool = False
    time_channels: int = 256
    rope_axes: tuple[int, ...] = (32, 32, 32, 32)
    rope_base: float = 2000.0
    text_width: int = 7680
    text_length: int = 512

    scans_blocks = True
    prediction = "velocity"
    flow_times = (1.0, 0.0)
    velocity_to = "noise"
    flow_shift = "tokens and steps"
    flow_spacing = "uniform"
    learned_variance = False
    guided_channels = None
    default_sampler = "flow-euler"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], timestep: Num[Array, " B"], condition: Condition
    ) -> Float[Array, "B H W C"]:
        """Returns the velocity, noise less data, of noisy latents.

        `timestep` is 1 at noise and 0 at the data. `condition` has the entries `text [B, L, E]`, with
        `guidance_embed` also `guidance [B]` such as 4, and, where the positions are not those of a
        picture's grid and a text's rows, `position_ids [B, N, 4]` and `text_ids [B, L, 4]`.

        Raises:
            ValueError: if the latents do not fit.
        """
        rows, columns = self.grid_size(x)
        given: Any = condition
        d, layers = self.hidden_size, self.layers

        def embedded(name: str, value: Num[Array, " B"]) -> Float[Array, "B D"]:
            features = timestep_features(TIME_UNIT * value, self.time_channels)
            return Embedder(d, layers, name=name)(features)

        c = embedded("time_in", timestep)
        if self.guidance_embed:
            c = c + embedded("guidance_in", given["guidance"])
        double = tuple(
            Modulation(6, layers, name=f"double_stream_modulation_{name}")(c)
            for name in ("txt", "img")
        )
        single = Modulation(3, layers, name="single_stream_modulation")(c)
        packed = rearrange(x, "b h w c -> b (h w) c")
        image = layers.linear(d, wide_output=True, name="img_in")(packed)
        text = layers.linear(d, wide_output=True, name="txt_in")(given["text"])
        angles = self.angles(given, text.shape[1], (rows, columns))
        kind = Kind(self.num_heads, self.mlp_width, self.norm_eps)
        make_double = partial(DoubleBlock, kind, layers)
        streams = apply_blocks(
            self, make_double, "double_blocks", self.depth, (text, image), double, angles
        )
        tokens = jnp.concatenate(streams, axis=1)
        make_single = partial(SingleBlock, kind, layers)
        tokens = apply_blocks(
            self, make_single, "single_blocks", self.single_depth, tokens, single, angles
        )
        final = ModulatedOutput(self.out_channels, layers, self.norm_eps, name="final_layer")
        out = final(tokens[:, text.shape[1] :], c)
        return rearrange(out, "b (h w) c -> b h w c", h=rows, w=columns)

    def angles(
        self, condition: Any, length: int, grid: tuple[int, int]
    ) -> Float[Array, "... T half"]:
        """Returns the rotary angles of text and image: of rows and grid, or of the positions given."""
        position_ids, text_ids = condition.get("position_ids"), condition.get("text_ids")
        image = np.pad(grid_positions(*grid), ((0, 0), (1, 1)))
        text = np.pad(np.arange(length)[:, None], ((0, 0), (AXES - 1, 0)))
        if position_ids is None and text_ids is None:
            ids: Any = np.concatenate([text, image])
        else:
            one = position_ids if position_ids is not None else text_ids
            both = [text if text_ids is None else text_ids]
            both += [image if position_ids is None else position_ids]
            ids = jnp.concatenate(
                [jnp.broadcast_to(jnp.asarray(a), (len(one), *a.shape[-2:])) for a in both], axis=1
            )
        return rotary_angles(ids, self.rope_axes, self.rope_base)

    def grid_size(self, x: Float[Array, "B H W C"]) -> tuple[int, int]:
        """Returns the rows and columns of tokens; raises `ValueError` for what does not fit."""
        d, heads, axes = self.hidden_size, self.num_heads, self.rope_axes
        if d % heads or len(axes) != AXES or sum(axes) != d // heads:
            raise ValueError(
                f"hidden_size={d} must be divisible by num_heads={heads}, and rope_axes={axes} be "
                f"{AXES} numbers that add up to a head's channels."
            )
        if x.ndim != 4 or x.shape[3] != self.in_channels:
            raise ValueError(
                f"x has shape {x.shape}; this model takes [B, H, W, {self.in_channels}]."
            )
        return x.shape[1], x.shape[2]

    @property
    def has_null(self) -> bool:
        """Returns whether a second call guides, with the caller's null text: not where it is embedded."""
        return not self.guidance_embed

    def sample_shape(self) -> tuple[int, int, int]:
        """Returns rows, columns and channels of the latents."""
        size = self.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height, width, self.in_channels

    def num_tokens(self, shape: tuple[int, ...]) -> int:
        """Returns how many tokens the image of a sample has."""
        return shape[-3] * shape[-2]

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
            "position_ids": Entry((None, AXES), required=False),
            "text_ids": Entry((None, AXES), required=False),
        }
        if self.guidance_embed:
            entries["guidance"] = Entry(())
        check_entries(condition, entries)
