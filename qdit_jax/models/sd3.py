"""The text-to-image transformer of Stable Diffusion 3 and 3.5 (MM-DiT, arXiv:2403.03206).

Layer names follow the published checkpoints; a list index becomes `_i`.
Dimensions: B batch, H and W latent rows and columns, C latent channels, N image tokens, L rows of text,
D width, P channels of the pooled text, h heads, d channels of a head.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float, Num

from qdit_jax.models.condition_checks import Entry, check_entries
from qdit_jax.models.joint import (
    Heads,
    ModulatedOutput,
    StreamAttention,
    chunks,
    joined,
    modulated,
)
from qdit_jax.models.layers import (
    Mlp,
    PatchEmbed,
    TimestepEmbedder,
    VectorEmbedder,
    sincos_positions,
)
from qdit_jax.models.linear import Layers, stored
from qdit_jax.models.network import NetworkModule
from qdit_jax.models.norms import RMSNorm, added_by, layer_norm, modulated_norm
from qdit_jax.models.runs import apply_blocks
from qdit_jax.types import Condition, Params


class Attention(StreamAttention):
    """A stream's attention, its queries and keys normalized by head where `qk_norm` says so."""

    qk_norm: bool = False

    def setup(self) -> None:
        super().setup()
        if self.qk_norm:
            self.ln_q, self.ln_k = RMSNorm(), RMSNorm()

    def normed(
        self, q: Float[Array, "B N h d"], k: Float[Array, "B N h d"]
    ) -> tuple[Float[Array, "B N h d"], Float[Array, "B N h d"]]:
        """Returns queries and keys after their norms, if there are any."""
        return (self.ln_q(q), self.ln_k(k)) if self.qk_norm else (q, k)


class Stream(nn.Module):
    """One stream of a block, before and after the attention that it shares with the other.

    Attributes:
        is_dual: whether it has an attention of its own as well, beside the shared one.
        is_last: whether it ends here, and only supplies keys and values.
    """

    width: int
    num_heads: int
    mlp_width: int
    qk_norm: bool
    is_dual: bool
    is_last: bool
    layers: Layers

    def setup(self) -> None:
        zeros = nn.initializers.zeros_init()
        self.adaLN_modulation = self.layers.linear(
            self.num_chunks * self.width, zeros, wide_output=True, name=None
        )
        shared = (self.width, self.num_heads, self.layers)
        self.attn = Attention(*shared, not self.is_last, self.qk_norm)
        if self.is_dual:
            self.attn2 = Attention(*shared, qk_norm=self.qk_norm)
        if not self.is_last:
            self.mlp = Mlp(self.mlp_width, self.layers, wide_output=True)

    @property
    def num_chunks(self) -> int:
        """Returns how many vectors modulate the stream."""
        return 2 if self.is_last else 9 if self.is_dual else 6

    def modulation(self, c: Float[Array, "B D"]) -> list[Float[Array, "B 1 D"]]:
        """Returns shift, scale, gate of the attention, of the MLP, and of its own attention."""
        return chunks(self.adaLN_modulation(nn.silu(c)), self.num_chunks)

    def heads(self, x: Float[Array, "B N D"], m: list[Float[Array, "B 1 D"]]) -> Heads:
        """Returns the stream's queries, keys and values in the shared attention."""
        return self.attn.heads(modulated_norm(x, m[0], m[1]))

    def after(
        self,
        x: Float[Array, "B N D"],
        attended: Float[Array, "B N h d"],
        m: list[Float[Array, "B 1 D"]],
    ) -> Float[Array, "B N D"]:
        """Returns the stream's tokens after the block, from its rows of the shared attention."""
        before = layer_norm(x)
        x = x + m[2] * self.attn.output(attended)
        if self.is_dual:  # on the same norm: that of the tokens before the shared attention
            own = self.attn2.heads(modulated(before, m[6], m[7]))
            x = x + m[8] * self.attn2.output(self.attn2.attend(*own))
        return added_by(self.mlp, modulated_norm(x, m[3], m[4]), x, m[5])


class JointBlock(nn.Module):
    """Returns the tokens of text and image after attention over both, each modulated by `c`.

    Attributes:
        is_dual: whether the image has an attention of its own as well.
        is_last: whether the text ends here; it is returned as it came.
    """

    num_heads: int
    mlp_width: int
    qk_norm: bool
    is_dual: bool
    is_last: bool
    layers: Layers

    @nn.compact
    def __call__(
        self, streams: tuple[Float[Array, "B L D"], Float[Array, "B N D"]], c: Float[Array, "B D"]
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B N D"]]:
        text, image = streams
        shared = (image.shape[-1], self.num_heads, self.mlp_width, self.qk_norm)
        context_block = Stream(*shared, False, self.is_last, self.layers, name="context_block")
        x_block = Stream(*shared, self.is_dual, False, self.layers, name="x_block")
        m_text, m_image = context_block.modulation(c), x_block.modulation(c)
        of_image, of_text = x_block.heads(image, m_image), context_block.heads(text, m_text)
        q, k, v = joined(of_image, of_text)
        if self.is_last:
            attended = x_block.attn.attend(of_image[0], k, v)
            return text, x_block.after(image, attended, m_image)
        attended = x_block.attn.attend(q, k, v)
        parts = jnp.split(attended, [image.shape[1]], axis=1)
        image = x_block.after(image, parts[0], m_image)
        return context_block.after(text, parts[1], m_text), image


class SD3(NetworkModule):
    """A transformer of Stable Diffusion 3; its fields are the configuration that a checkpoint stores.

    The latents may have any size up to `pos_embed_max_size` patches a side: the stored table of
    positions is cropped at its center.

    Attributes:
        sample_size: rows and columns of the latents that are sampled by default (one number when
            equal).
        dual_blocks: numbers of the blocks whose image has an attention of its own as well.
        qk_norm: whether queries and keys are normalized.
        text_width, pooled_width: channels of a row of text, and of the pooled text.
        text_length: rows of text in examples; a call takes any number.
    """

    sample_size: int | tuple[int, int] = 128
    patch_size: int = 2
    in_channels: int = 16
    out_channels: int = 16
    hidden_size: int = 1536
    depth: int = 24
    num_heads: int = 24
    mlp_ratio: float = 4.0
    dual_blocks: tuple[int, ...] = ()
    qk_norm: bool = False
    pos_embed_max_size: int = 192
    text_width: int = 4096
    pooled_width: int = 2048
    text_length: int = 333

    scans_blocks = True
    prediction = "velocity"
    flow_times = (1000.0, 0.0)
    velocity_to = "noise"
    learned_variance = False
    has_null = True
    guided_channels = None
    default_sampler = "flow-euler"
    default_guidance = 7.0
    flow_shift = 3.0
    flow_spacing = "trained"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], timestep: Num[Array, " B"], condition: Condition
    ) -> Float[Array, "B H W C"]:
        """Returns the velocity, noise less data, of noisy latents.

        `timestep` is 1000 at noise and 0 at the data. `condition` has the entries `text [B, L, C]` and
        `pooled [B, P]`.

        Raises:
            ValueError: if the latents do not fit.
        """
        rows, columns = self.grid_size(x)
        given: Any = condition
        d, p, layers = self.hidden_size, self.patch_size, self.layers
        image = PatchEmbed(d, p, layers, name="x_embedder")(x)
        image = image + self.positions(rows, columns).astype(image.dtype)
        c = TimestepEmbedder(d, layers=layers, name="t_embedder")(timestep)
        c = c + VectorEmbedder(d, layers, name="y_embedder")(given["pooled"])
        text = layers.linear(d, wide_output=True, name="context_embedder")(given["text"])
        streams = (text, image)
        for first, stop, is_dual in self.runs():
            make_fn = partial(
                JointBlock,
                self.num_heads,
                int(d * self.mlp_ratio),
                self.qk_norm,
                is_dual,
                stop == self.depth,
                layers,
            )
            streams = apply_blocks(
                self, make_fn, "joint_blocks", stop - first, streams, c, first=first
            )
        features = p * p * self.out_channels
        out = ModulatedOutput(features, layers, name="final_layer")(streams[1], c)
        return rearrange(out, "b (h w) (p q c) -> b (h p) (w q) c", h=rows, p=p, q=p)

    def runs(self) -> list[tuple[int, int, bool]]:
        """Returns the first number, that after the last, and whether they are dual, of equal blocks.

        The last block is alone: its text ends there.
        """
        if self.depth < 1 or not set(self.dual_blocks) <= set(range(self.depth)):
            raise ValueError(
                f"dual_blocks={self.dual_blocks} are not among the {self.depth} blocks of depth."
            )
        kinds = [(i in self.dual_blocks, i == self.depth - 1) for i in range(self.depth)]
        found, first = [], 0
        for kind, group in itertools.groupby(kinds):
            stop = first + len(list(group))
            found.append((first, stop, kind[0]))
            first = stop
        return found

    def positions(self, rows: int, columns: int) -> Float[Array, "1 N D"]:
        """Returns the middle of the stored table."""
        m = self.pos_embed_max_size
        table = stored(self, "pos_embed", self.init_positions, (1, m * m, self.hidden_size))
        top, left = (m - rows) // 2, (m - columns) // 2
        grid = jax.lax.stop_gradient(table).reshape(1, m, m, self.hidden_size)
        crop = grid[:, top : top + rows, left : left + columns]
        return crop.reshape(1, rows * columns, self.hidden_size)

    def grid_size(self, x: Float[Array, "B H W C"]) -> tuple[int, int]:
        """Returns the rows and columns of patches; raises `ValueError` for latents that do not fit."""
        p, limit = self.patch_size, self.pos_embed_max_size
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be divisible by num_heads={self.num_heads} "
                "and by 4."
            )
        if x.ndim != 4 or x.shape[3] != self.in_channels or x.shape[1] % p or x.shape[2] % p:
            raise ValueError(
                f"x has shape {x.shape}; this model takes [B, H, W, {self.in_channels}] with H and W "
                f"divisible by {p}."
            )
        rows, columns = x.shape[1] // p, x.shape[2] // p
        if max(rows, columns) > limit:
            raise ValueError(
                f"x has shape {x.shape}; the table of positions holds at most {limit * p} rows and "
                "columns of latents (pos_embed_max_size)."
            )
        return rows, columns

    def init_positions(self, key: Array, shape: tuple[int, ...]) -> Array:
        m = self.pos_embed_max_size
        return jnp.asarray(sincos_positions(shape[-1], (m, m)))[None]

    def sample_shape(self) -> tuple[int, int, int]:
        """Returns rows, columns and channels of the latents."""
        size = self.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height, width, self.in_channels

    def num_tokens(self, shape: tuple[int, ...]) -> int:
        """Returns how many tokens the image of a sample has."""
        return (shape[-3] // self.patch_size) * (shape[-2] // self.patch_size)

    def example_condition(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns abstract embeddings of prompts."""
        return {
            "text": jax.ShapeDtypeStruct((batch, self.text_length, self.text_width), jnp.float32),
            "pooled": jax.ShapeDtypeStruct((batch, self.pooled_width), jnp.float32),
        }

    def null_condition(self, condition: Condition, params: Params) -> None:
        """Returns None: text encoders alone know the empty prompt; bring `null_text` and `null_pooled`."""

    def check_condition(self, condition: Condition) -> None:
        """Raises `ValueError` unless there are `text` and `pooled` of the right widths."""
        pooled = Entry((self.pooled_width,))
        check_entries(condition, {"text": Entry((None, self.text_width)), "pooled": pooled})
