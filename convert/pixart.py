"""The authors' layout of PixArt-alpha and PixArt-Sigma.

Dimensions: N tokens, D width, C channels, p patch size, L rows and E channels of text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qdit_convert.choices import Choices
from qdit_convert.dit import out_channels
from qdit_convert.plan import (
    Example,
    Leaf,
    Plan,
    affine,
    block_count,
    convolution,
    most_common,
    norm,
    shape_of,
)
from qdit_convert.sizes import check_channels, voted_width
from qdit_convert.tensors import StateDict, StoredTensor
from qdit_convert.training_args import Arguments, unknown_note
from qdit_jax.diffusion import shown
from qdit_jax.errors import UserError

POSITIONS, NULL = "pos_embed", "y_embedder.y_embedding"
# What the authors published: (depth, width) -> heads, and the sizes of latents, of which the
# positions' scale is a 64th. Only alpha's network of 1024 pixels has size conditions.
HEADS = {(28, 1152): 16}
PUBLISHED_SIZES = (32, 64, 128, 256)
SIZE_OF_CONDITIONED = 128
TEXT_WIDTH = 4096


@dataclass(frozen=True)
class Sizes:
    """What follows from the shapes of a PixArt, in either layout.

    `compression` holds each block's, 1 where it has none.
    """

    depth: int
    width: int
    patch_size: int
    in_channels: int
    out_channels: int
    mlp_width: int
    text_width: int
    size_conditions: bool = False
    qk_norm: bool = False
    compression: tuple[int, ...] = ()


def pixart_plan(state: StateDict, choices: Choices, _: Mapping[str, Any] | None) -> Plan:
    """Returns the plan for a PixArt in the authors' layout."""
    tensors = state.tensors
    sizes = pixart_sizes(tensors)
    text_length = shape_of(tensors, NULL, 2)[0]
    notes: list[str] = []
    heads = pixart_heads(sizes, choices, notes)
    size = latent_size(sizes, tensors, choices, notes)
    config = pixart_config(sizes, heads) | {
        "sample_size": size,
        "interpolation_scale": interpolation(size, choices, notes),
        "stored_positions": POSITIONS in tensors,
        "text_length": text_length,
        "null_caption": True,
    }
    if POSITIONS in tensors:
        notes.append(
            f"positions of {size}x{size} latents as stored; those of other sizes are computed, as by "
            "the authors' networks for several sizes"
        )
    said = Arguments({}, {}, tuple(f"{key}={shown(value)}" for key, value in state.hints.items()))
    tokens = (size // sizes.patch_size) ** 2 if POSITIONS in tensors else 0
    leaves = tuple(pixart_leaves(sizes, text_length, tokens))
    return Plan("pixart", config, leaves, (*notes, *unknown_note(said)))


def pixart_sizes(tensors: Mapping[str, StoredTensor]) -> Sizes:
    """Returns the sizes of the network; a single wrong shape is outvoted, to be named later."""
    depth = block_count(tensors, "blocks.")
    if depth == 0:
        raise UserError("there are no blocks (blocks.0.attn.qkv.weight and so on).")
    _, in_channels, patch, _ = shape_of(tensors, "x_embedder.proj.weight", 4)
    votes = {
        "x_embedder.proj.weight": (0, 4),
        "t_embedder.mlp.2.weight": (0, 2),
        "final_layer.linear.weight": (1, 2),
        "t_block.1.weight": (1, 2),
        "blocks.0.attn.proj.weight": (0, 2),
    }
    width = voted_width(tensors, votes)
    mlp = [t.shape[0] for k, t in tensors.items() if k.endswith(".mlp.fc1.weight") and t.shape]
    texts = [shape_of(tensors, k, 2)[1] for k in ("y_embedder.y_proj.fc1.weight", NULL)]
    return Sizes(
        depth=depth,
        width=width,
        patch_size=patch,
        in_channels=in_channels,
        out_channels=out_channels(shape_of(tensors, "final_layer.linear.weight", 2)[0], patch),
        mlp_width=most_common([*mlp, 4 * width]),
        text_width=most_common([*texts, TEXT_WIDTH]),
        size_conditions=has(tensors, r"(csize|ar)_embedder\."),
        qk_norm=has(tensors, r"blocks\.\d+\.attn\.[qk]_norm\."),
        compression=tuple(compression(tensors, i) for i in range(depth)),
    )


def has(keys: Iterable[str], pattern: str) -> bool:
    """Returns whether a name begins as `pattern` says."""
    return any(re.match(pattern, key) for key in keys)


def compression(tensors: Mapping[str, StoredTensor], block: int) -> int:
    """Returns how many rows and columns become one key and value in a block."""
    prefix = f"blocks.{block}.attn"
    if not has(tensors, rf"{re.escape(prefix)}\.(sr|norm)\."):
        return 1
    return shape_of(tensors, f"{prefix}.sr.weight", 4)[2]


def pixart_heads(sizes: Sizes, choices: Choices, notes: list[str]) -> int:
    """Returns the number of heads: the user's option, or as published for this size, with a note."""
    if choices.num_heads is not None:
        return choices.num_heads
    heads = HEADS.get((sizes.depth, sizes.width))
    if heads is None:
        raise UserError(
            f"{sizes.depth} blocks of width {sizes.width} is not a published size, and shapes cannot "
            "tell the number of attention heads; pass --num-heads."
        )
    notes.append(f"{heads} attention heads, as published for this width and depth")
    return heads


def latent_size(
    sizes: Sizes, tensors: Mapping[str, StoredTensor], choices: Choices, notes: list[str]
) -> int:
    """Returns the rows and columns of the latents that the network was trained for.

    Raises:
        UserError: if neither the file nor the option says it, or they differ.
    """
    said = choices.input_size
    if said is not None and (not isinstance(said, int) or said < 1 or said % sizes.patch_size):
        raise UserError(
            f"input_size={said} of a PixArt: give one number that its patches of {sizes.patch_size} "
            "divide, rows and columns of the squares that it was trained on."
        )
    if POSITIONS in tensors:
        num_tokens = shape_of(tensors, POSITIONS, 3)[1]
        size = math.isqrt(num_tokens) * sizes.patch_size
        if math.isqrt(num_tokens) ** 2 != num_tokens or said not in (None, size):
            raise UserError(
                f"{POSITIONS} has {num_tokens} positions, which are not those of "
                + ("a square." if said is None else f"input_size={said}; leave --input-size out.")
            )
        return size
    if said is not None:
        return said
    if sizes.size_conditions:
        notes.append(
            f"latents of {SIZE_OF_CONDITIONED}x{SIZE_OF_CONDITIONED}, as the published network with "
            "size conditions; another size is --input-size"
        )
        return SIZE_OF_CONDITIONED
    raise UserError(
        f"the file has no table of positions ({POSITIONS}), and shapes cannot tell the size that the "
        "network was trained for; pass --input-size: 32, 64, 128 or 256 for 256 to 2048 pixels."
    )


def interpolation(size: int, choices: Choices, notes: list[str]) -> float:
    """Returns the scale of the positions: the user's option, or as published for the size."""
    scale = choices.interpolation_scale
    if scale is not None:
        if not (math.isfinite(scale) and scale > 0):
            raise UserError(
                f"interpolation_scale={scale} is not understood; use a positive number."
            )
        return float(scale)
    if size not in PUBLISHED_SIZES:
        raise UserError(
            f"latents of {size}x{size} are of no published PixArt, and shapes cannot tell the scale of "
            "the positions; pass --interpolation-scale (0.5, 1, 2 or 4 for 256 to 2048 pixels)."
        )
    notes.append(
        f"interpolation scale {size / 64:g}, as published for {size}x{size} latents; another is "
        "--interpolation-scale"
    )
    return size / 64


def pixart_config(sizes: Sizes, heads: int) -> dict[str, Any]:
    """Returns the fields of the network that follow from `sizes`.

    Raises:
        UserError: if they make no network.
    """
    C, D, out = sizes.in_channels, sizes.width, sizes.out_channels
    check_channels(C, out)
    if D % heads or D % 4 or (sizes.size_conditions and D % 3):
        raise UserError(
            f"the width {D} must be divisible by num_heads={heads}, by 4 for the positions and by 3 "
            "for size conditions."
        )
    return {
        "patch_size": sizes.patch_size,
        "in_channels": C,
        "hidden_size": D,
        "depth": sizes.depth,
        "num_heads": heads,
        "mlp_width": sizes.mlp_width,
        "text_width": sizes.text_width,
        "size_conditions": sizes.size_conditions,
        "learn_sigma": out == 2 * C,
        "qk_norm": sizes.qk_norm,
        "kv_compression": sizes.compression if max(sizes.compression, default=1) > 1 else (),
    }


def pixart_leaves(sizes: Sizes, text_length: int, num_tokens: int) -> list[Leaf]:
    """Returns the leaves; `num_tokens` is 0 where the table of positions is not stored."""
    D, E, C, p = sizes.width, sizes.text_width, sizes.in_channels, sizes.patch_size
    leaves = [Leaf("pos_embed", (POSITIONS,), ((1, num_tokens, D),))] if num_tokens else []
    leaves += affine("x_embedder/proj", "x_embedder.proj", (D, C, p, p), convolution)
    embedders = {"t": D} | ({"csize": D // 3, "ar": D // 3} if sizes.size_conditions else {})
    for name, width in embedders.items():
        key = f"{name}_embedder"
        leaves += affine(f"{key}/mlp_0", f"{key}.mlp.0", (width, 256))
        leaves += affine(f"{key}/mlp_2", f"{key}.mlp.2", (width, width))
    leaves += affine("t_block", "t_block.1", (6 * D, D))
    leaves.append(Leaf("y_embedder/y_embedding", (NULL,), ((text_length, E),)))
    leaves += affine("y_embedder/y_proj/fc1", "y_embedder.y_proj.fc1", (D, E))
    leaves += affine("y_embedder/y_proj/fc2", "y_embedder.y_proj.fc2", (D, D))
    for i in range(sizes.depth):
        leaves += block_leaves(sizes, i)
    table = "scale_shift_table"
    leaves.append(Leaf(f"final_layer/{table}", (f"final_layer.{table}",), ((2, D),)))
    out = p * p * sizes.out_channels
    return [*leaves, *affine("final_layer/linear", "final_layer.linear", (out, D))]


def block_leaves(sizes: Sizes, block: int) -> list[Leaf]:
    """Returns the leaves of a block."""
    D, mlp, k = sizes.width, sizes.mlp_width, sizes.compression[block]
    new, old = f"blocks_{block}", f"blocks.{block}"
    attn, key = f"{new}/{'attn_sr' if k > 1 else 'attn'}", f"{old}.attn"
    table = "scale_shift_table"
    leaves = [
        Leaf(f"{new}/{table}", (f"{old}.{table}",), ((6, D),)),
        *affine(f"{attn}/qkv", f"{key}.qkv", (3 * D, D)),
        *affine(f"{attn}/proj", f"{key}.proj", (D, D)),
    ]
    if sizes.qk_norm:
        leaves += norm(f"{attn}/q_norm", f"{key}.q_norm", D)
        leaves += norm(f"{attn}/k_norm", f"{key}.k_norm", D)
    if k > 1:
        shape = (D, 1, k, k)
        leaves.append(Leaf(f"{attn}/sr/filter", (f"{key}.sr.weight",), (shape,), convolution))
        leaves.append(Leaf(f"{attn}/sr/bias", (f"{key}.sr.bias",), ((D,),)))
        leaves += norm(f"{attn}/norm", f"{key}.norm", D)
    for name, rows in (("q_linear", D), ("kv_linear", 2 * D), ("proj", D)):
        leaves += affine(f"{new}/cross_attn/{name}", f"{old}.cross_attn.{name}", (rows, D))
    leaves += affine(f"{new}/mlp/fc1", f"{old}.mlp.fc1", (mlp, D))
    return [*leaves, *affine(f"{new}/mlp/fc2", f"{old}.mlp.fc2", (D, mlp))]


SMALL = Sizes(
    depth=2,
    width=24,
    patch_size=2,
    in_channels=4,
    out_channels=8,
    mlp_width=96,
    text_width=TEXT_WIDTH,
    size_conditions=True,
    qk_norm=True,
    compression=(1, 2),
)


def pixart_example() -> Example:
    """Returns a small PixArt-Sigma with key-value compression and a table of positions."""
    choices = {"num_heads": 2, "interpolation_scale": 1.0}
    return Example(tuple(pixart_leaves(SMALL, text_length=3, num_tokens=4)), choices)
