"""What the layouts of networks for videos share: sizes of latents, and leaves of text and time.

Dimensions: F frames, D width, C channels of the latent, K channels of text, L rows of text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qdit_convert.choices import Choices
from qdit_convert.dit import PUBLISHED, out_channels
from qdit_convert.plan import Leaf, affine, most_common, shape_of
from qdit_convert.sizes import check_channels, check_heads, mlp_ratio
from qdit_convert.tensors import StoredTensor, shape_text
from qdit_jax.errors import UserError

NULL = "y_embedder.y_embedding"  # the learned null caption
TEXT_WIDTH = 4096  # of the published networks' text encoder, T5


@dataclass(frozen=True)
class VideoSizes:
    """The sizes that follow from the shapes of a text-to-video network.

    Attributes:
        caption_length: rows of the learned null caption.
    """

    depth: int
    width: int
    patch_size: int
    in_channels: int
    out_channels: int
    mlp_width: int
    caption_channels: int
    caption_length: int


def video_sizes(tensors: Mapping[str, StoredTensor], depth: int, block: str) -> VideoSizes:
    """Returns the sizes of a network in the authors' names; `block` is one block's prefix.

    A single wrong shape is outvoted, to be named later.

    Raises:
        UserError: if a tensor that settles them is missing, or patches span several frames.
    """
    width, channels, frames, patch, _ = shape_of(tensors, "x_embedder.proj.weight", 5)
    if frames != 1:
        raise UserError(f"patches span {frames} frames; only patches of one frame are supported.")
    voters = ("t_embedder.mlp.2.weight", f"{block}.attn.proj.weight", "final_layer.linear.weight")
    votes = [tensors[k].shape[-1] for k in voters if k in tensors and tensors[k].shape]
    rows, _ = shape_of(tensors, NULL, 2)
    texts = [shape_of(tensors, key, 2)[1] for key in (NULL, "y_embedder.y_proj.fc1.weight")]
    features = shape_of(tensors, "final_layer.linear.weight", 2)[0]
    return VideoSizes(
        depth=depth,
        width=most_common([width, *votes]),
        patch_size=patch,
        in_channels=channels,
        out_channels=out_channels(features, patch),
        mlp_width=shape_of(tensors, f"{block}.mlp.fc1.weight", 2)[0],
        caption_channels=most_common([*texts, TEXT_WIDTH]),
        caption_length=rows,
    )


def frame_convolution(array: np.ndarray) -> np.ndarray:
    """Returns the kernel HWIO of torch's OIDHW with a depth of one frame."""
    return array[:, :, 0].transpose(2, 3, 1, 0)


def outer_leaves(sizes: VideoSizes) -> list[Leaf]:
    """Returns the leaves outside of the blocks, in the authors' names."""
    D, p, K = sizes.width, sizes.patch_size, sizes.caption_channels
    table = "final_layer.scale_shift_table"
    out = p * p * sizes.out_channels
    patches = (D, sizes.in_channels, 1, p, p)
    return [
        *affine("x_embedder/proj", "x_embedder.proj", patches, frame_convolution),
        *affine("t_embedder/mlp_0", "t_embedder.mlp.0", (D, 256)),
        *affine("t_embedder/mlp_2", "t_embedder.mlp.2", (D, D)),
        *affine("t_block", "t_block.1", (6 * D, D)),
        Leaf("y_embedder/y_embedding", (NULL,), ((sizes.caption_length, K),)),
        *affine("y_embedder/y_proj/fc1", "y_embedder.y_proj.fc1", (D, K)),
        *affine("y_embedder/y_proj/fc2", "y_embedder.y_proj.fc2", (D, D)),
        Leaf("final_layer/scale_shift_table", (table,), ((2, D),)),
        *affine("final_layer/linear", "final_layer.linear", (out, D)),
    ]


def block_leaves(
    new: str, old: str, width: int, mlp: int, attentions: tuple[str, ...]
) -> list[Leaf]:
    """Returns the leaves of one block; `attentions` are its self-attentions."""
    D = width
    leaves = [Leaf(f"{new}/scale_shift_table", (f"{old}.scale_shift_table",), ((6, D),))]
    for name in attentions:
        leaves += affine(f"{new}/{name}/qkv", f"{old}.{name}.qkv", (3 * D, D))
        leaves += affine(f"{new}/{name}/proj", f"{old}.{name}.proj", (D, D))
    for name, rows in (("q_linear", D), ("kv_linear", 2 * D), ("proj", D)):
        leaves += affine(f"{new}/cross_attn/{name}", f"{old}.cross_attn.{name}", (rows, D))
    leaves += affine(f"{new}/mlp/fc1", f"{old}.mlp.fc1", (mlp, D))
    return leaves + affine(f"{new}/mlp/fc2", f"{old}.mlp.fc2", (D, mlp))


def video_config(sizes: VideoSizes, heads: int) -> dict[str, Any]:
    """Returns the fields of a network that follow from `sizes`.

    Raises:
        UserError: if channels or heads do not fit.
    """
    C, out = sizes.in_channels, sizes.out_channels
    check_channels(C, out)
    check_heads(sizes.width, heads)
    return {
        "patch_size": sizes.patch_size,
        "in_channels": C,
        "hidden_size": sizes.width,
        "depth": sizes.depth,
        "num_heads": heads,
        "mlp_ratio": mlp_ratio(sizes.mlp_width, sizes.width),
        "caption_channels": sizes.caption_channels,
        "caption_length": sizes.caption_length,
        "learn_sigma": out == 2 * C,
    }


def heads_of(depth: int, width: int, *stated: int | None) -> int:
    """Returns the first number of heads that is stated, else as published for this size.

    Raises:
        UserError: if none is, with the option that says it.
    """
    heads = next((n for n in stated if n is not None), PUBLISHED.get((depth, width)))
    if heads is None:
        raise UserError(
            f"{depth} blocks of width {width} is not a published size, and shapes cannot tell the "
            "number of attention heads; pass --num-heads."
        )
    if heads < 1:
        raise UserError(f"num_heads={heads} is not a number of heads; use 1 or more.")
    return heads


def video_size(
    stated: int | tuple[int, ...] | None, default: tuple[int, int, int], patch: int = 1
) -> tuple[int, int, int]:
    """Returns frames, rows and columns of a latent: 1 to 3 numbers, a square for one.

    Raises:
        UserError: if they are no size, or patches do not divide rows and columns.
    """
    frames, rows, columns = default
    numbers = () if stated is None else (stated,) if isinstance(stated, int) else tuple(stated)
    if len(numbers) == 1:
        rows = columns = numbers[0]
    elif len(numbers) == 2:
        rows, columns = numbers
    elif len(numbers) == 3:
        frames, rows, columns = numbers
    if len(numbers) > 3 or min(frames, rows, columns) < 1 or rows % patch or columns % patch:
        raise UserError(
            f"input_size={shape_text(numbers)} is no size of this network's latents; give ROWS COLUMNS "
            f"or FRAMES ROWS COLUMNS, with rows and columns divisible by {patch}."
        )
    return frames, rows, columns


def overridden_heads(choices: Choices, said: int | None, where: str) -> list[str]:
    """Returns a note where the user's number of heads overrides what a file says."""
    if choices.num_heads in (None, said) or said is None:
        return []
    return [f"{where} num_heads={said}; {choices.num_heads} taken, as asked"]
