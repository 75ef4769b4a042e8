"""The authors' layouts of Open-Sora: STDiT of 1.0 (a flat state dict) and STDiT3 of 1.2.

Dimensions: F frames, S positions of a frame, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qdit_convert.choices import Choices
from qdit_convert.plan import Example, Leaf, Plan, affine, block_count, shape_of
from qdit_convert.settings import CONFIG, network_settings
from qdit_convert.tensors import StateDict, StoredTensor
from qdit_convert.training_args import Arguments, unknown_note
from qdit_convert.video import (
    TEXT_WIDTH,
    VideoSizes,
    block_leaves,
    heads_of,
    outer_leaves,
    overridden_heads,
    video_config,
    video_size,
    video_sizes,
)
from qdit_convert.video_settings import STDIT3
from qdit_jax.diffusion import shown
from qdit_jax.errors import UserError

TABLES = ("pos_embed", "pos_embed_temporal")
# Positions of the published latents -> what their coordinates are divided by.
SPACE_SCALES = {256: 0.5, 1024: 1.0}
PUBLISHED_SIZE = (15, 64, 64)  # latent of 51 frames of 512 x 512 pixels
SMALL = VideoSizes(
    depth=2,
    width=16,
    patch_size=2,
    in_channels=4,
    out_channels=8,
    mlp_width=64,
    caption_channels=TEXT_WIDTH,
    caption_length=5,
)
STDIT3_CLASS = "STDiT3"


def is_stdit(state: StateDict) -> bool:
    """Returns whether a file in these names has attention over time in its blocks."""
    return any(".attn_temp." in key for key in state.tensors)


def stdit_plan(state: StateDict, choices: Choices, _: Mapping[str, Any] | None) -> Plan:
    """Returns the plan for STDiT of Open-Sora 1.0."""
    tensors = state.tensors
    depth = block_count(tensors, "blocks.")
    if depth == 0:
        raise UserError("there are no blocks (blocks.0.attn_temp.qkv.weight and so on).")
    sizes = video_sizes(tensors, depth, "blocks.0")
    config = video_config(sizes, heads_of(depth, sizes.width, choices.num_heads))
    notes: list[str] = []
    size = stdit_size(tensors, choices, sizes.patch_size, notes)
    config |= {"sample_size": size}
    config |= scales(choices, size[1] * size[2] // sizes.patch_size**2, notes)
    stored = frozenset(key for key in TABLES if key in tensors)
    if stored:
        notes.append(
            f"{' and '.join(sorted(stored))}: not read, positions are computed for each size"
        )
    notes += unknown_note(unread(state))
    return Plan("stdit", config, tuple(stdit_leaves(sizes)), tuple(notes), stored)


def unread(state: StateDict) -> Arguments:
    """Returns the training arguments beside the weights, none of which is read."""
    return Arguments({}, {}, tuple(f"{key}={shown(value)}" for key, value in state.hints.items()))


def stdit_size(
    tensors: Mapping[str, StoredTensor], choices: Choices, patch: int, notes: list[str]
) -> tuple[int, int, int]:
    """Returns the default size of latents: as asked, else that of the stored tables of positions."""
    frames = shape_of(tensors, TABLES[1], 3)[1] if TABLES[1] in tensors else 16
    stated = choices.input_size
    default = (frames, 0, 0)
    if stated is None or (isinstance(stated, tuple) and len(stated) == 0):
        tokens = shape_of(tensors, TABLES[0], 3)[1] if TABLES[0] in tensors else 256
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise UserError(
                f"{tokens} positions make no square; pass --input-size FRAMES ROWS COLUMNS of the latent."
            )
        default = (frames, side * patch, side * patch)
        if not set(TABLES) <= set(tensors):
            notes.append(f"size of latents assumed: {default} (--input-size)")
    return video_size(stated, default, patch)


def scales(choices: Choices, tokens: int, notes: list[str]) -> dict[str, float]:
    """Returns the scales of positions: as asked, else the published ones for so many positions."""
    space, time = choices.space_scale, choices.time_scale
    if space is None:
        if tokens not in SPACE_SCALES:
            raise UserError(
                f"frames have {tokens} positions, which no published network has, and the file does "
                "not say their scale; pass --space-scale (0.5 at 256 pixels, 1 at 512, as published)."
            )
        space = SPACE_SCALES[tokens]
        notes.append(f"space_scale={space}, as published for {tokens} positions (--space-scale)")
    if time is None:
        time = 1.0
        notes.append("time_scale=1.0, as published for 16 frames (--time-scale)")
    if min(space, time) <= 0:
        raise UserError(f"space_scale={space} and time_scale={time} must be above 0.")
    return {"space_scale": float(space), "time_scale": float(time)}


def stdit_leaves(sizes: VideoSizes) -> list[Leaf]:
    """Returns the leaves of STDiT: every tensor but the tables of positions."""
    leaves = outer_leaves(sizes)
    for i in range(sizes.depth):
        pair = (f"blocks_{i}", f"blocks.{i}", sizes.width, sizes.mlp_width)
        leaves += block_leaves(*pair, ("attn", "attn_temp"))
    return leaves


def stdit_example() -> Example:
    """Returns a small STDiT without its tables of positions, which are not read."""
    choices = {"num_heads": 2, "input_size": (3, 4, 6), "space_scale": 0.5}
    return Example(tuple(stdit_leaves(SMALL)), choices)


def stdit3_plan(state: StateDict, choices: Choices, config: Mapping[str, Any] | None) -> Plan:
    """Returns the plan for STDiT3 of Open-Sora 1.2; `config` is its config.json, if there is one."""
    tensors = state.tensors
    depth = block_count(tensors, "spatial_blocks.")
    if depth == 0:
        raise UserError("there are no blocks (spatial_blocks.0.attn.qkv.weight and so on).")
    sizes = video_sizes(tensors, depth, "spatial_blocks.0")
    settings = network_settings(config or {}, STDIT3)
    check_stdit3(settings, sizes)
    said = settings["num_heads"]
    heads = heads_of(depth, sizes.width, choices.num_heads, said)
    if sizes.width // heads % 2:
        raise UserError(
            f"num_heads={heads} makes heads of {sizes.width / heads:g}, which rotary positions cannot "
            "pair; pass --num-heads."
        )
    notes = overridden_heads(choices, said, CONFIG)
    if config is None:
        notes.append("input_sq_size=512, as published: there is no config.json")
    size, named = settings["input_size"], choices.input_size
    default = tuple(size) if size and None not in size else PUBLISHED_SIZE
    if named is None and default == PUBLISHED_SIZE:
        notes.append(f"size of latents assumed: {default}, 51 frames of 512 x 512 (--input-size)")
    normed = any(".q_norm." in key for key in tensors)
    result = video_config(sizes, heads) | {
        "sample_size": video_size(named, (default[0], default[1], default[2])),
        "input_sq_size": settings["input_sq_size"],
        "qk_norm": normed,
    }
    notes += unknown_note(unread(state))
    leaves = stdit3_leaves(sizes, sizes.width // heads, normed)
    return Plan("stdit3", result, tuple(leaves), tuple(notes))


def check_stdit3(settings: Mapping[str, Any], sizes: VideoSizes) -> None:
    """Raises `UserError` if config.json contradicts the weights."""
    found: dict[str, Any] = {
        "depth": sizes.depth,
        "hidden_size": sizes.width,
        "in_channels": sizes.in_channels,
        "caption_channels": sizes.caption_channels,
        "model_max_length": sizes.caption_length,
        "pred_sigma": sizes.out_channels == 2 * sizes.in_channels,
        "patch_size": [1, sizes.patch_size, sizes.patch_size],
    }
    for name, value in found.items():
        says = settings[name]
        if says is not None and says != value:
            raise UserError(f"{CONFIG} {name} = {says}, but the weights have {value}.")
    ratio = settings["mlp_ratio"]
    if ratio is not None and int(sizes.width * ratio) != sizes.mlp_width:
        raise UserError(
            f"{CONFIG} mlp_ratio = {ratio}, but the weights have {sizes.mlp_width} features."
        )


def stdit3_leaves(sizes: VideoSizes, head_width: int, normed: bool = True) -> list[Leaf]:
    """Returns the leaves of STDiT3."""
    D = sizes.width
    leaves = [
        *outer_leaves(sizes),
        *affine("fps_embedder/mlp_0", "fps_embedder.mlp.0", (D, 256)),
        *affine("fps_embedder/mlp_2", "fps_embedder.mlp.2", (D, D)),
        Leaf("rope/freqs", ("rope.freqs",), ((head_width // 2,),)),
    ]
    for i in range(sizes.depth):
        for kind in ("spatial", "temporal"):
            new, old = f"{kind}_blocks_{i}", f"{kind}_blocks.{i}"
            leaves += block_leaves(new, old, D, sizes.mlp_width, ("attn",))
            for name in ("q_norm", "k_norm") * normed:
                source = f"{old}.attn.{name}.weight"
                leaves.append(Leaf(f"{new}/attn/{name}/scale", (source,), ((head_width,),)))
    return leaves


def stdit3_example() -> Example:
    """Returns a small STDiT3 with its config.json."""
    config = {"model_type": STDIT3_CLASS, "num_heads": 2, "input_sq_size": 32}
    leaves = tuple(stdit3_leaves(SMALL, SMALL.width // 2))
    return Example(leaves, {"input_size": (3, 3, 4)}, config=config)
