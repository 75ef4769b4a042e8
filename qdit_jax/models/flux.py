"""The text-to-image transformer of FLUX.1 (dev and schnell, Black Forest Labs).

Layer names follow the published checkpoints; a list index becomes `_i`. The attention's sequence is the
text, then the image, with rotary positions.
Dimensions: B batch, H and W latent rows and columns, C latent channels, N image tokens, L rows of text,
T both, D width, P channels of the pooled text, h heads, d channels of a head.
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

from qdit_jax.kernels import GELU
from qdit_jax.models.condition_checks import Entry, check_entries
from qdit_jax.models.joint import (
    ModulatedOutput,
    StreamAttention,
    chunks,
    joint_attention,
)
from qdit_jax.models.layers import AttentionModule, timestep_features
from qdit_jax.models.linear import Layers
from qdit_jax.models.network import NetworkModule
from qdit_jax.models.norms import RMSNorm, added_by, modulated_norm
from qdit_jax.models.rotary import grid_positions, rotary_angles, rotated
from qdit_jax.models.runs import apply_blocks
from qdit_jax.types import Condition, Params

PATCH = 2  # rows and columns of latents in one token
TIME_UNIT = 1000.0  # times and guidance are embedded in thousandths


class Embedder(nn.Module):
    """Returns `out_layer(silu(in_layer(x)))`."""

    hidden_size: int
    layers: Layers

    @nn.compact
    def __call__(self, x: Float[Array, "B K"]) -> Float[Array, "B D"]:
        init = nn.initializers.normal(0.02)
        hidden = self.layers.linear(self.hidden_size, init, name="in_layer")(x)
        out = self.layers.linear(self.hidden_size, init, wide_output=True, name="out_layer")
        return out(nn.silu(hidden))


class QKNorm(nn.Module):
    """Returns queries and keys, each head normalized."""

    @nn.compact
    def __call__(
        self, q: Float[Array, "B T h d"], k: Float[Array, "B T h d"]
    ) -> tuple[Float[Array, "B T h d"], Float[Array, "B T h d"]]:
        return RMSNorm(name="query_norm")(q), RMSNorm(name="key_norm")(k)


class SelfAttention(StreamAttention):
    """The projections of one stream, with norms of queries and keys."""

    def setup(self) -> None:
        super().setup()
        self.norm = QKNorm()

    def normed(
        self, q: Float[Array, "B N h d"], k: Float[Array, "B N h d"]
    ) -> tuple[Float[Array, "B N h d"], Float[Array, "B N h d"]]:
        """Returns queries and keys, each head normalized."""
        return self.norm(q, k)


class Modulation(nn.Module):
    """Returns vectors that modulate tokens: shift, scale and gate of each branch."""

    count: int
    layers: Layers

    @nn.compact
    def __call__(self, c: Float[Array, "B D"]) -> list[Float[Array, "B 1 D"]]:
        lin = self.layers.linear(self.count * c.shape[-1], wide_output=True, name="lin")
        return chunks(lin(nn.silu(c)), self.count)


class DoubleBlock(nn.Module):
    """Returns the tokens of text and image after attention over both, with layers of their own."""

    num_heads: int
    mlp_width: int
    layers: Layers

    @nn.compact
    def __call__(
        self,
        streams: tuple[Float[Array, "B L D"], Float[Array, "B N D"]],
        c: Float[Array, "B D"],
        angles: Float[Array, "... T half"],
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B N D"]]:
        d, names = streams[0].shape[-1], ("txt", "img")
        vectors = [Modulation(6, self.layers, name=f"{name}_mod")(c) for name in names]
        attentions = [
            SelfAttention(d, self.num_heads, self.layers, name=f"{name}_attn") for name in names
        ]
        inputs = [modulated_norm(x, m[0], m[1]) for x, m in zip(streams, vectors, strict=True)]
        attended = joint_attention(attentions, inputs, angles)
        text, image = map(self.after, names, streams, vectors, attended)
        return text, image

    def after(
        self,
        name: str,
        x: Float[Array, "B N D"],
        m: list[Float[Array, "B 1 D"]],
        attended: Float[Array, "B N D"],
    ) -> Float[Array, "B N D"]:
        """Returns a stream's tokens after its MLP."""
        x = x + m[2] * attended
        hidden = modulated_norm(x, m[3], m[4])
        hidden = self.layers.linear(self.mlp_width, name=f"{name}_mlp_0").fused(hidden, GELU)
        second = self.layers.linear(x.shape[-1], wide_output=True, name=f"{name}_mlp_2")
        return added_by(second.fused, hidden, x, m[5])


class SingleBlock(AttentionModule):
    """Returns the tokens of text and image, in one sequence, after attention and MLP in parallel.

    Both read one input through one layer, `linear1`, and both write through one, `linear2`.
    """

    num_heads: int
    mlp_width: int
    layers: Layers

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], c: Float[Array, "B D"], angles: Float[Array, "... T half"]
    ) -> Float[Array, "B T D"]:
        d = x.shape[-1]
        shift, scale, gate = Modulation(3, self.layers, name="modulation")(c)
        linear1 = self.layers.linear(3 * d + self.mlp_width, name="linear1")
        both = linear1.fused(modulated_norm(x, shift, scale))
        qkv, hidden = jnp.split(both, [3 * d], axis=-1)
        q, k, v = rearrange(qkv, "b t (qkv h d) -> qkv b t h d", qkv=3, h=self.num_heads)
        q, k = (rotated(a, angles).astype(v.dtype) for a in QKNorm(name="norm")(q, k))
        attended = rearrange(self.attend(q, k, v), "b t h d -> b t (h d)")
        both = jnp.concatenate([attended, nn.gelu(hidden, approximate=True)], axis=-1)
        linear2 = self.layers.linear(d, wide_output=True, name="linear2")
        return added_by(linear2.fused, both, x, gate)


class Flux(NetworkModule):
    """A transformer of FLUX.1; its fields are the configuration that a checkpoint stores.

    The latents may have any even size.

    Attributes:
        sample_size: rows and columns of the latents that are sampled by default (one number when
            equal).
        in_channels, out_channels: of the latents; a token has those of 2 x 2 of them.
        depth, single_depth: double and single blocks.
        guidance_embed: whether the strength of guidance is an entry of the condition (dev).
        rope_axes: channels of a head that turn with the three coordinates of a position.
        text_width, pooled_width: channels of a row of text, and of the pooled text.
        text_length: rows of text in examples; a call takes any number.
    """

    sample_size: int | tuple[int, int] = 128
    in_channels: int = 16
    out_channels: int = 16
    hidden_size: int = 3072
    depth: int = 19
    single_depth: int = 38
    num_heads: int = 24
    mlp_ratio: float = 4.0
    guidance_embed: bool = True
    rope_axes: tuple[int, ...] = (16, 56, 56)
    rope_base: float = 10_000.0
    text_width: int = 4096
    pooled_width: int = 768
    text_length: int = 512

    scans_blocks = True
    prediction = "velocity"
    flow_times = (1.0, 0.0)
    velocity_to = "noise"
    learned_variance = False
    has_null = False
    guided_channels = None
    default_sampler = "flow-euler"
    default_guidance = 3.5
    flow_spacing = "uniform"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], timestep: Num[Array, " B"], condition: Condition
    ) -> Float[Array, "B H W C"]:
        """Returns the velocity, noise less data, of noisy latents.

        `timestep` is 1 at noise and 0 at the data. `condition` has the entries `text [B, L, C]`,
        `pooled [B, P]`, with `guidance_embed` also `guidance [B]` such as 3.5, and, where the positions
        are not those of a picture's grid, `position_ids [B, N, 3]` and `text_ids [B, L, 3]`.

        Raises:
            ValueError: if the latents do not fit.
        """
        rows, columns = self.grid_size(x)
        given: Any = condition
        d, layers = self.hidden_size, self.layers
        embed = partial(Embedder, d, layers)
        c = embed(name="time_in")(timestep_features(TIME_UNIT * timestep))
        if self.guidance_embed:
            c = c + embed(name="guidance_in")(timestep_features(TIME_UNIT * given["guidance"]))
        c = c + embed(name="vector_in")(given["pooled"])
        packed = rearrange(x, "b (h p) (w q) c -> b (h w) (c p q)", p=PATCH, q=PATCH)
        image = layers.linear(d, wide_output=True, name="img_in")(packed)
        text = layers.linear(d, wide_output=True, name="txt_in")(given["text"])
        angles = self.angles(given, text.shape[1], (rows, columns))
        sizes = (self.num_heads, int(d * self.mlp_ratio), layers)
        streams = apply_blocks(
            self,
            partial(DoubleBlock, *sizes),
            "double_blocks",
            self.depth,
            (text, image),
            c,
            angles,
        )
        tokens = jnp.concatenate(streams, axis=1)
        tokens = apply_blocks(
            self,
            partial(SingleBlock, *sizes),
            "single_blocks",
            self.single_depth,
            tokens,
            c,
            angles,
        )
        features = PATCH * PATCH * self.out_channels
        image = tokens[:, text.shape[1] :]
        out = ModulatedOutput(features, layers, name="final_layer")(image, c)
        return rearrange(
            out, "b (h w) (c p q) -> b (h p) (w q) c", h=rows, w=columns, p=PATCH, q=PATCH
        )

    def angles(
        self, condition: Any, length: int, grid: tuple[int, int]
    ) -> Float[Array, "... T half"]:
        """Returns the rotary angles of text and image: of the grid, or of the positions given."""
        position_ids, text_ids = condition.get("position_ids"), condition.get("text_ids")
        image = np.pad(grid_positions(*grid), ((0, 0), (1, 0)))
        text = np.zeros((length, 3))
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
        if self.hidden_size % self.num_heads or len(self.rope_axes) != 3:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be divisible by num_heads={self.num_heads}, and "
                f"rope_axes={self.rope_axes} be three numbers."
            )
        if sum(self.rope_axes) != self.hidden_size // self.num_heads:
            raise ValueError(
                f"rope_axes={self.rope_axes} must add up to the {self.hidden_size // self.num_heads} "
                "channels of a head."
            )
        if x.ndim != 4 or x.shape[3] != self.in_channels or x.shape[1] % 2 or x.shape[2] % 2:
            raise ValueError(
                f"x has shape {x.shape}; this model takes [B, H, W, {self.in_channels}] with H and W "
                "even."
            )
        return x.shape[1] // PATCH, x.shape[2] // PATCH

    def sample_shape(self) -> tuple[int, int, int]:
        """Returns rows, columns and channels of the latents."""
        size = self.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height, width, self.in_channels

    @property
    def flow_shift(self) -> float | str:  # type: ignore[override]
        """Returns the shift of the published schedules: by the image's tokens (dev), or none."""
        return "tokens" if self.guidance_embed else 1.0

    def num_tokens(self, shape: tuple[int, ...]) -> int:
        """Returns how many tokens the image of a sample has."""
        return (shape[-3] // PATCH) * (shape[-2] // PATCH)

    def example_condition(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns abstract embeddings of prompts, and guidance where it is embedded."""
        shapes = {
            "text": (batch, self.text_length, self.text_width),
            "pooled": (batch, self.pooled_width),
        }
        if self.guidance_embed:
            shapes["guidance"] = (batch,)
        return {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}

    def null_condition(self, condition: Condition, params: Params) -> None:
        """Returns None: guidance is distilled into the network, by no second call."""

    def check_condition(self, condition: Condition) -> None:
        """Raises `ValueError` unless the entries fit, `guidance` where it is embedded and only there."""
        entries = {
            "text": Entry((None, self.text_width)),
            "pooled": Entry((self.pooled_width,)),
            "position_ids": Entry((None, 3), required=False),
            "text_ids": Entry((None, 3), required=False),
        }
        if self.guidance_embed:
            entries["guidance"] = Entry(())
        elif "guidance" in (condition if isinstance(condition, dict) else ()):
            raise ValueError(
                "this network embeds no guidance (guidance_embed=False, as schnell); leave out guidance."
            )
        check_entries(condition, entries)
