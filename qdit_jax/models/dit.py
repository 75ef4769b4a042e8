"""The class-conditional diffusion transformer (DiT, arXiv:2212.09748), also used by SiT.

Layer names follow the published checkpoints; a list index becomes `_i`.
Dimensions: B batch, H and W latent rows and columns, C latent channels, T tokens, D width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Num

from qdit_jax.models.layers import (
    Attention,
    LabelEmbedder,
    Linear,
    Mlp,
    PatchEmbed,
    TimestepEmbedder,
    layer_norm,
    modulate,
    sincos_positions,
    stored,
)

# (depth, width, heads) of the published sizes.
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
PATCH_SIZES = (2, 4, 8)


class Block(nn.Module):
    """Returns a transformer block's output, modulated by the condition (adaLN-zero)."""

    num_heads: int
    mlp_ratio: float
    mlp_norm_eps: float
    execution: str

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], c: Float[Array, "B D"]) -> Float[Array, "B T D"]:
        d = x.shape[-1]
        zeros = nn.initializers.zeros_init()
        modulation = Linear(6 * d, self.execution, zeros, name="adaLN_modulation")(nn.silu(c))
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)
        attention = Attention(self.num_heads, self.execution, name="attn")
        x = x + gate1[:, None] * attention(modulate(layer_norm(x), shift1, scale1))
        mlp = Mlp(int(d * self.mlp_ratio), self.execution, name="mlp")
        hidden = modulate(layer_norm(x, self.mlp_norm_eps), shift2, scale2)
        return x + gate2[:, None] * mlp(hidden)


class FinalLayer(nn.Module):
    """Returns the patches' values, `[B, T, features]`."""

    features: int
    execution: str

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], c: Float[Array, "B D"]) -> Float[Array, "B T P"]:
        zeros = nn.initializers.zeros_init()
        modulation = Linear(2 * x.shape[-1], self.execution, zeros, name="adaLN_modulation")
        shift, scale = jnp.split(modulation(nn.silu(c)), 2, axis=-1)
        hidden = modulate(layer_norm(x), shift, scale)
        return Linear(self.features, self.execution, zeros, name="linear")(hidden)


class DiT(nn.Module):
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
        execution: how quantised layers compute, `"simulated"` or `"integer"`.
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
    execution: str = "simulated"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        timestep: Num[Array, " B"],
        label: Int[Array, " B"],
    ) -> Float[Array, "B H W out"]:
        """Returns the prediction for noisy latents.

        `timestep` is 0 to 999 for DiT. For a velocity it runs from 0 at noise to 1 at the data, and
        the velocity points to the data, whatever times the network itself was trained with.
        `label` is a class, or `num_classes` for the null class. Output channels: the noise, then (with `learn_sigma`)
        the variance fraction in [-1, 1].
        """
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be divisible by num_heads={self.num_heads} and by 4."
            )
        if self.velocity:
            timestep = self.noise_time + (self.data_time - self.noise_time) * timestep
        rows, columns = self.grid_size(x)
        tokens = PatchEmbed(self.hidden_size, self.patch_size, self.execution, name="x_embedder")(x)
        table = stored(self, "pos_embed", self.init_positions, (1, *tokens.shape[1:]))
        tokens = tokens + jax.lax.stop_gradient(table).astype(tokens.dtype)
        c = TimestepEmbedder(
            self.hidden_size, self.frequency_shift, self.execution, name="t_embedder"
        )(timestep)
        num_rows = self.num_classes + int(self.null_class)
        c = c + LabelEmbedder(num_rows, self.hidden_size, name="y_embedder")(label)
        for i in range(self.depth):
            tokens = Block(
                self.num_heads,
                self.mlp_ratio,
                self.mlp_norm_eps,
                self.execution,
                name=f"blocks_{i}",
            )(tokens, c)
        channels = self.in_channels * (2 if self.learn_sigma else 1)
        p = self.patch_size
        out = FinalLayer(p * p * channels, self.execution, name="final_layer")(tokens, c)
        out = out.reshape(-1, rows, columns, p, p, channels).transpose(0, 1, 3, 2, 4, 5)
        out = out.reshape(-1, rows * p, columns * p, channels)
        if not self.velocity:
            return out
        velocity = out[..., : self.in_channels]
        return velocity if self.data_time > self.noise_time else -velocity

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Returns abstract arguments of a call with one sample, to trace the network with."""
        size = self.input_size
        height, width = (size, size) if isinstance(size, int) else size
        return (
            jax.ShapeDtypeStruct((1, height, width, self.in_channels), jnp.float32),
            jax.ShapeDtypeStruct((1,), jnp.float32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
        )

    def grid_size(self, x: Float[Array, "B H W C"]) -> tuple[int, int]:
        """Returns the rows and columns of tokens; raises `ValueError` for another input size."""
        size = self.input_size
        expected = (size, size) if isinstance(size, int) else tuple(size)
        if x.shape[1:] != (*expected, self.in_channels):
            raise ValueError(
                f"x has shape {x.shape}; this model takes [B, {expected[0]}, {expected[1]}, "
                f"{self.in_channels}]."
            )
        if any(n % self.patch_size for n in expected):
            raise ValueError(
                f"input_size={expected} is not divisible by patch_size={self.patch_size}."
            )
        return expected[0] // self.patch_size, expected[1] // self.patch_size

    def init_positions(self, key: Array, shape: tuple[int, ...]) -> Array:
        size = self.input_size
        height, width = (size, size) if isinstance(size, int) else size
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
