"""Latte (arXiv:2401.03048) for videos of a class or of none: DiT's blocks over frames and over time.

Even blocks attend within each frame, odd blocks over the frames at each position.
Layer names follow the published checkpoints; a list index becomes `_i`.
Dimensions: B batch, F frames, H and W latent rows and columns, C latent channels, S positions of a
frame, D width.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float, Int, Num

from qdit_jax.models.class_conditional import ClassConditional
from qdit_jax.models.dit import Block, FinalLayer
from qdit_jax.models.layers import (
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    line_positions,
    over_time,
    sincos_positions,
)
from qdit_jax.models.linear import stored
from qdit_jax.models.network import NetworkModule
from qdit_jax.models.runs import BlockKind, apply_periods
from qdit_jax.types import Condition, Params


class Latte(ClassConditional, NetworkModule):
    """A video diffusion transformer; its fields are the configuration that a checkpoint stores.

    Attributes:
        input_size: rows and columns of the latent (one number when equal).
        num_frames: of a video; the stored table of temporal positions has as many rows.
        depth: blocks of both kinds together, an even number.
        num_classes: 0 for a network without labels.
        null_class: whether the label table ends with a row for "no label".
        learn_sigma: whether the output carries a variance fraction for each channel.
    """

    input_size: int | tuple[int, int] = 32
    num_frames: int = 16
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 101
    null_class: bool = True
    learn_sigma: bool = True

    scans_blocks = True
    prediction = "epsilon"
    default_sampler = "ddim"
    default_guidance = 7.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B F H W C"],
        timestep: Num[Array, " B"],
        condition: Int[Array, " B"] | None,
    ) -> Float[Array, "B F H W out"]:
        """Returns the prediction for noisy latents: the noise, then the variance fractions.

        `timestep` is 0 to 999. `condition` is a class label, `num_classes` for the null class, or
        None for a network without labels.
        """
        self.check_sizes(x)
        if (condition is None) != (self.num_classes == 0):
            raise ValueError(
                f"condition={condition!r} of a network of {self.num_classes} classes: give labels where "
                "there are classes, and None where there are none."
            )
        d, p = self.hidden_size, self.patch_size
        tokens = PatchEmbed(d, p, self.layers, name="x_embedder")(x)  # [B, F, S, D]
        table = stored(self, "pos_embed", self.init_positions, (1, tokens.shape[2], d))
        tokens = tokens + jax.lax.stop_gradient(table).astype(tokens.dtype)
        times = stored(self, "temp_embed", init_times, (1, self.num_frames, d))
        times = jax.lax.stop_gradient(times).astype(tokens.dtype)
        c = TimestepEmbedder(d, layers=self.layers, name="t_embedder")(timestep)
        if condition is not None and self.num_classes:
            rows = self.num_classes + int(self.null_class)
            c = c + LabelEmbedder(rows, d, name="y_embedder")(condition)
        make_fn = partial(Block, self.num_heads, self.mlp_ratio, 1e-6, self.layers)
        tokens = make_fn(name="blocks_0")(tokens, c) + times[:, :, None]
        tokens = over_time(make_fn(name="blocks_1"), tokens, c)
        spatial = BlockKind(make_fn, lambda block, x: block(x, c))
        temporal = BlockKind(make_fn, lambda block, x: over_time(block, x, c))
        tokens = apply_periods(self, (spatial, temporal), self.block_periods(), tokens)
        channels = self.in_channels * (2 if self.learn_sigma else 1)
        out = FinalLayer(p * p * channels, self.layers, name="final_layer")(tokens, c)
        return rearrange(out, "b f (h w) (p q c) -> b f (h p) (w q) c", h=x.shape[2] // p, p=p, q=p)

    def block_periods(self) -> list[tuple[str, ...]]:
        """Returns the pairs of blocks but for the first, between which positions in time are added."""
        return [(f"blocks_{i}", f"blocks_{i + 1}") for i in range(2, self.depth, 2)]

    @property
    def learned_variance(self) -> bool:
        """Returns whether the output carries a variance in further channels."""
        return self.learn_sigma

    @property
    def has_null(self) -> bool:
        """Returns whether the label table has a row for no label."""
        return bool(self.num_classes) and self.null_class

    @property
    def guided_channels(self) -> int:
        """Returns the channels that the published sampler guides: all, of 4."""
        return self.in_channels

    def sample_shape(self) -> tuple[int, int, int, int]:
        """Returns frames, rows, columns and channels of the latents."""
        size = self.input_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.num_frames, height, width, self.in_channels

    def example_condition(self, batch: int) -> jax.ShapeDtypeStruct | None:
        """Returns abstract labels; None for a network without labels."""
        return super().example_condition(batch) if self.num_classes else None

    def all_conditions(self) -> np.ndarray | None:
        """Returns the label of every class; None for a network without labels."""
        return super().all_conditions() if self.num_classes else None

    def null_condition(self, condition: Condition, params: Params) -> Array | None:
        """Returns the null class for every label; None if there is none."""
        return super().null_condition(condition, params) if self.num_classes else None

    def check_condition(self, condition: Condition) -> None:
        """Raises `ValueError` if a label is missing, out of range, or given to a network of none."""
        if self.num_classes:
            super().check_condition(condition)
        elif condition is not None:
            raise ValueError(f"condition={condition!r}: this network was trained without labels.")

    def check_sizes(self, x: Float[Array, "B F H W C"]) -> None:
        """Raises `ValueError` for fields or latents that do not fit each other."""
        shape = self.sample_shape()
        if x.shape[1:] != shape:
            raise ValueError(
                f"x has shape {x.shape}; this model takes [B, {', '.join(map(str, shape))}]: its "
                "tables of positions are stored."
            )
        if self.depth % 2 or self.depth < 2:
            raise ValueError(f"depth={self.depth} is not an even number of blocks.")
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be divisible by num_heads={self.num_heads} and by 4."
            )
        if any(n % self.patch_size for n in shape[1:3]):
            raise ValueError(
                f"input_size={shape[1:3]} is not divisible by patch_size={self.patch_size}."
            )

    def init_positions(self, key: Array, shape: tuple[int, ...]) -> Array:
        _, height, width, _ = self.sample_shape()
        grid = (height // self.patch_size, width // self.patch_size)
        return jnp.asarray(sincos_positions(shape[-1], grid))[None]


def init_times(key: Array, shape: tuple[int, ...]) -> Array:
    """Returns the table of temporal positions `[1, F, D]`."""
    return jnp.asarray(line_positions(shape[-1], np.arange(shape[1])))[None]
