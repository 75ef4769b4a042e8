"""A family that is as unlike DiT as the contract allows, in one file and one row.

Video-shaped latents, cross-attention on text with a mask, one modulation shared by all blocks, a
learned null caption. Dimensions: B batch, F frames, H, W, C a latent, T tokens, D width, L text rows.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from qdit_jax.models import (
    AttentionModule,
    Family,
    Fold,
    Layers,
    NetworkModule,
    Producer,
    TimestepEmbedder,
    example_inputs,
)
from qdit_jax.models.layers import Attention, Mlp, modulate
from qdit_jax.models.linear import stored
from qdit_jax.models.norms import layer_norm

NORMAL = nn.initializers.normal(0.2)


class CrossAttention(AttentionModule):
    """Returns attention from tokens to the rows of a text that `mask` keeps."""

    num_heads: int
    layers: Layers

    @nn.compact
    def __call__(self, x: Any, text: Any, mask: Any) -> Any:
        b, t, d = x.shape
        q = self.layers.linear(d, name="q")(x).reshape(b, t, self.num_heads, -1)
        kv = self.layers.linear(2 * d, name="kv")(text)
        k, v = jnp.moveaxis(kv.reshape(b, -1, 2, self.num_heads, d // self.num_heads), 2, 0)
        out = self.attend(q, k, v, mask).reshape(b, t, d)
        return self.layers.linear(d, name="proj")(out)


class ToyBlock(nn.Module):
    """Returns one block's tokens; its modulation is the shared one plus a table of its own."""

    num_heads: int
    layers: Layers

    @nn.compact
    def __call__(self, x: Any, m: Any, text: Any, mask: Any) -> Any:
        d = x.shape[-1]
        table = stored(self, "scale_shift_table", NORMAL, (6, d))
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.moveaxis(
            m.reshape(-1, 6, d) + table, 1, 0
        )
        attention = Attention(self.num_heads, self.layers, name="attn")
        x = x + gate1[:, None] * attention(modulate(layer_norm(x), shift1, scale1))
        x = x + CrossAttention(self.num_heads, self.layers, name="cross")(x, text, mask)
        hidden = modulate(layer_norm(x), shift2, scale2)
        return x + gate2[:, None] * Mlp(2 * d, self.layers, name="mlp")(hidden)


class ToyVideo(NetworkModule):
    """A small text-to-video transformer that predicts the noise."""

    frames: int = 2
    input_size: int = 4
    in_channels: int = 4
    hidden_size: int = 32
    depth: int = 2
    num_heads: int = 2
    text_length: int = 6
    text_width: int = 12

    prediction = "epsilon"
    learned_variance = False
    has_null = True
    guided_channels = None
    default_sampler = "ddim"

    @nn.compact
    def __call__(self, x: Any, timestep: Any, condition: Any) -> Any:
        b, f, h, w, c = x.shape
        d = self.hidden_size
        stored(self, "null_text", NORMAL, (self.text_length, self.text_width))
        patches = x.reshape(b, f, h // 2, 2, w // 2, 2, c).transpose(0, 1, 2, 4, 3, 5, 6)
        tokens = self.layers.linear(d, name="patch")(patches.reshape(b, -1, 4 * c))
        time = TimestepEmbedder(d, layers=self.layers, name="time")(timestep)
        m = self.layers.linear(6 * d, NORMAL, name="modulation")(nn.silu(time))
        text = self.layers.linear(d, name="caption")(condition["text"])
        for i in range(self.depth):
            block = ToyBlock(self.num_heads, self.layers, name=f"layers_{i}")
            tokens = block(tokens, m, text, condition["text_mask"])
        out = self.layers.linear(4 * c, NORMAL, name="head")(layer_norm(tokens))
        out = out.reshape(b, f, h // 2, w // 2, 2, 2, c).transpose(0, 1, 2, 4, 3, 5, 6)
        return out.reshape(x.shape)

    def sample_shape(self) -> tuple[int, ...]:
        return (self.frames, self.input_size, self.input_size, self.in_channels)

    def example_condition(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        shape = (batch, self.text_length)
        return {
            "text": jax.ShapeDtypeStruct((*shape, self.text_width), jnp.float32),
            "text_mask": jax.ShapeDtypeStruct(shape, jnp.bool_),
        }

    def all_conditions(self) -> None:
        return None

    def null_condition(self, condition: Any, params: Any) -> Any:
        null = jnp.broadcast_to(params["null_text"], condition["text"].shape)
        return {**condition, "text": null}

    def check_condition(self, condition: Any) -> None:
        if set(condition) != {"text", "text_mask"}:
            raise ValueError(f"condition has {sorted(condition)}; give text and text_mask.")

    def example_inputs(self, batch: int = 1) -> tuple[Any, ...]:
        return example_inputs(self, batch)


ROW = Family(
    name="toy",
    network="toy_family:ToyVideo",
    block=r"layers_\d+",
    parts={
        "blocks": r"layers_\d+/(attn/(qkv|proj)|cross/(q|kv|proj)|mlp/(fc1|fc2))",
        "adaln": "modulation",
        "embedders": r"patch|caption|time/mlp_\d",
        "final": "head",
    },
    attention={"self_attention": r"layers_\d+/attn", "cross_attention": r"layers_\d+/cross"},
    rounded_first="adaln",
    outputs={r"layers_\d+/attn/qkv": ("q", "k", "v"), r"layers_\d+/cross/kv": ("k", "v")},
    folds=(
        Fold(r"(layers_\d+)/attn/proj", (Producer(r"\1/attn/qkv", "v"),)),
        Fold(r"(layers_\d+)/cross/proj", (Producer(r"\1/cross/kv", "v"),)),
    ),
    gelu_inputs=r"layers_\d+/mlp/fc2",
)


def prompts(count: int = 3, model: ToyVideo | None = None) -> dict[str, np.ndarray]:
    """Returns embeddings of `count` prompts of different lengths."""
    model = ToyVideo() if model is None else model
    rng = np.random.default_rng(4)
    shape = (count, model.text_length)
    lengths = 2 + np.arange(count)[:, None] % (model.text_length - 1)
    return {
        "text": rng.standard_normal((*shape, model.text_width)).astype(np.float32),
        "text_mask": np.arange(model.text_length) < lengths,
    }
