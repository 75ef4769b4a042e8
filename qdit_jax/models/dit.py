"""The class-conditional diffusion transformer (DiT, arXiv:2212.09748), also used by SiT.

Layer names follow the published checkpoints; a list index becomes `_i`.
Dimensions: B batch, H and W latent rows and columns, C latent channels, T tokens, D width, G axes
whose entries attend alone (the frames of a video).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float, Int, Num

from qdit_jax.kernels import Gated, Modulated
from qdit_jax.models.class_conditional import ClassConditional
from qdit_jax.models.layers import (
    Attention,
    LabelEmbedder,
    Mlp,
    PatchEmbed,
    TimestepEmbedder,
    modulate,
    sincos_positions,
)
from qdit_jax.models.linear import Layers, stored
from qdit_jax.models.network import NetworkModule
from qdit_jax.models.norms import layer_norm
from qdit_jax.models.runs import apply_blocks

# (depth, width, heads) of the published sizes.
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
PATCH_SIZES = (2, 4, 8)


class Block(nn.Module):
    """Returns a transformer block's output, modulated by the condition (adaLN-zero)."""

    num_heads: int
    mlp_ratio: float
    mlp_norm_eps: float
    layers: Layers

    @nn.compact
    def __call__(
        self, x: Float[Array, "B *G T D"], c: Float[Array, "B D"]
    ) -> Float[Array, "B *G T D"]:
        d = x.shape[-1]
        zeros = nn.initializers.zeros_init()
        adaln = self.layers.linear(6 * d, zeros, wide_output=True, name="adaLN_modulation")
        modulation = adaln(nn.silu(c))
        attention = Attention(self.num_heads, self.layers, name="attn")
        x = attention(Modulated(x, modulation, 0, 1), Gated(x, modulation, 2))
        mlp = Mlp(int(d * self.mlp_ratio), self.layers, name="mlp")
        return mlp(Modulated(x, modulation, 3, 4, self.mlp_norm_eps), Gated(x, modulation, 5))


class FinalLayer(nn.Module):
    """Returns the patches' values, `[B, *G, T, features]`."""

    features: int
    layers: Layers

    @nn.compact
    def __call__(
        self, x: Float[Array, "B *G T D"], c: Float[Array, "B D"]
    ) -> Float[Array, "B *G T P"]:
        zeros = nn.initializers.zeros_init()
        modulation = self.layers.linear(
            2 * x.shape[-1], zeros, wide_output=True, name="adaLN_modulation"
        )
        shift, scale = jnp.split(modulation(nn.silu(c)), 2, axis=-1)
        hidden = modulate(layer_norm(x), shift, scale)
        return self.layers.linear(self.features, zeros, wide_output=True, name="linear")(hidden)


class DiT(ClassConditional, NetworkModule):
    """A diffusion transformer; its fields are the configuration that a checkpoint stores.

    Attributes:
        input_size: rows and columns of the latent (one number when equal).
        null_class: whether the label table ends with a row for "no label".
        learn_sigma: whether the output carries a variance fraction for each channel.
        frequency_shift: 0 as published; 1 as in the diffusers port (`timestep_features`).
        mlp_norm_eps: epsilon of the second norm of a block; the diffusers port has 1e-5.
        velocity: SiT: return only the first `in_channels` of the output, a velocity.
        noise_time: of a velocity: the time that the network itself knows at pure noise.
        data_time: the time that it knows at the data; its velocity points to the later of the two.
    """

    input_size: int | tuple[int, int] = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    null_class: bool = True
    learn_sigma: bool = True
    frequency_shift: int = 0
    mlp_norm_eps: float = 1e-6
    velocity: bool = False
    noise_time: float = 0.0
    data_time: float = 1.0

    scans_blocks = True
    flow_times = (0.0, 1.0)  # as seen from outside
    velocity_to = "data"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        timestep: Num[Array, " B"],
        condition: Int[Array, " B"],
    ) -> Float[Array, "B H W out"]:
        """Returns the prediction for noisy latents.

        `timestep` is 0 to 999 for DiT. For a velocity it runs from 0 at noise to 1 at the data, and
        the velocity points to the data, whatever times the network itself was trained with.
        `condition` is a class label, or `num_classes` for the null class. Output channels: the
        noise, then (with `learn_sigma`)
        the variance fraction in [-1, 1].
        """
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be divisible by num_heads={self.num_heads} and by 4."
            )
        if self.velocity:
            timestep = self.noise_time + (self.data_time - self.noise_time) * timestep
        rows, _ = self.grid_size(x)
        tokens = PatchEmbed(self.hidden_size, self.patch_size, self.layers, name="x_embedder")(x)
        table = stored(self, "pos_embed", self.init_positions, (1, *tokens.shape[1:]))
        tokens = tokens + jax.lax.stop_gradient(table).astype(tokens.dtype)
        c = TimestepEmbedder(
            self.hidden_size, self.frequency_shift, self.layers, name="t_embedder"
        )(timestep)
        num_rows = self.num_classes + int(self.null_class)
        c = c + LabelEmbedder(num_rows, self.hidden_size, name="y_embedder")(condition)
        make_fn = partial(Block, self.num_heads, self.mlp_ratio, self.mlp_norm_eps, self.layers)
        tokens = apply_blocks(self, make_fn, "blocks", self.depth, tokens, c)
        channels = self.in_channels * (2 if self.learn_sigma else 1)
        p = self.patch_size
        out = FinalLayer(p * p * channels, self.layers, name="final_layer")(tokens, c)
        out = rearrange(out, "b (h w) (p q c) -> b (h p) (w q) c", h=rows, p=p, q=p)
        if not self.velocity:
            return out
        velocity = out[..., : self.in_channels]
        return velocity if self.data_time > self.noise_time else -velocity

    @property
    def prediction(self) -> str:
        """Returns what the output is: the noise, or for SiT a velocity."""
        return "velocity" if self.velocity else "epsilon"

    @property
    def learned_variance(self) -> bool:
        """Returns whether the output carries a variance in further channels."""
        return self.learn_sigma and not self.velocity

    @property
    def guided_channels(self) -> int:
        """Returns 3, as published, or all channels where there are fewer."""
        return min(3, self.in_channels)

    @property
    def default_sampler(self) -> str:
        """Returns the sampler of the published scripts."""
        return "flow" if self.velocity else "ddim"

    def sample_shape(self) -> tuple[int, int, int]:
        """Returns rows, columns and channels of the latents."""
        size = self.input_size
        height, width = (size, size) if isinstance(size, int) else size
        return height, width, self.in_channels

    def num_tokens(self, shape: tuple[int, ...]) -> int:
        """Returns the number of patches."""
        return shape[0] * shape[1] // self.patch_size**2

    def grid_size(self, x: Float[Array, "B H W C"]) -> tuple[int, int]:
        """Returns the rows and columns of tokens; raises `ValueError` for another input size."""
        *expected, channels = self.sample_shape()
        if x.shape[1:] != (*expected, channels):
            raise ValueError(
                f"x has shape {x.shape}; this model takes [B, {expected[0]}, {expected[1]}, "
                f"{self.in_channels}]."
            )
        if any(n % self.patch_size for n in expected):
            raise ValueError(
                f"input_size={tuple(expected)} is not divisible by patch_size={self.patch_size}."
            )
        return expected[0] // self.patch_size, expected[1] // self.patch_size

    def init_positions(self, key: Array, shape: tuple[int, ...]) -> Array:
        height, width, _ = self.sample_shape()
        grid = (height // self.patch_size, width // self.patch_size)
        return jnp.asarray(sincos_positions(shape[-1], grid))[None]


def published_config(name: str) -> dict[str, int]:
    """Returns the size fields of a published model such as `"DiT-XL/2"` or `"SiT-B/4"`.

    Raises:
        ValueError: if the name is not one of S, B, L, XL with patch 2, 4 or 8.
    """
    size, _, patch = name.removeprefix("DiT-").removeprefix("SiT-").partition("/")
    if size not in SIZES or patch not in map(str, PATCH_SIZES):
        known = ", ".join(f"DiT-{s}/{p}" for s in SIZES for p in PATCH_SIZES)
        raise ValueError(f"model={name!r} is not a published size; use one of {known}.")
    depth, width, heads = SIZES[size]
    return {"depth": depth, "hidden_size": width, "num_heads": heads, "patch_size": int(patch)}
