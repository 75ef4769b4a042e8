"""The video transformers of Wan 2.1 and 2.2: the authors' layout, and that of diffusers.

The tree has the authors' names, with q, k, v that read the same input as one layer; diffusers' names
are put into those first. Norms are the trap: the authors' affine `norm3` stands before the
cross-attention and is diffusers' `norm2`.

Dimensions: D width, C latent channels, p patch size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qdit_convert.choices import Choices
from qdit_convert.plan import (
    Example,
    Leaf,
    Plan,
    affine,
    block_count,
    convolution3d,
    linear,
    most_common,
    norm,
    shape_of,
)
from qdit_convert.settings import network_settings
from qdit_convert.tensors import StateDict, listing
from qdit_convert.wan_settings import AUTHORS, DIFFUSERS
from qdit_jax.errors import UserError

DIFFUSERS_NAME = "WanTransformer3DModel"
AUTHORS_NAME = "WanModel"
HEAD_WIDTH = 128  # of all published networks
# Published (depth, D), and the default size of the latents by C: 81 frames of 480 x 832, and of the
# 5B network 121 frames of 704 x 1280.
PUBLISHED = ((30, 1536), (40, 5120), (30, 3072))
SAMPLE_SIZES = {16: (21, 60, 104), 48: (31, 44, 80)}
PATCH_SIZE = (1, 2, 2)
TEXT_LENGTH = 512
KNOWN = (
    "convert reads the text-to-video networks of Wan 2.1 and 2.2 (T2V 1.3B, 14B and A14B, TI2V 5B)"
)
# Names that only networks with an image as a condition have, in either layout.
OF_IMAGES = re.compile(
    r"img_emb\.|condition_embedder\.image_embedder\.|vace_|control_|"
    r"blocks\.\d+\.(cross_attn\.(k|v|norm_k)_img|attn2\.(add_|norm_added_))"
)


@dataclass(frozen=True)
class Sizes:
    """The sizes that follow from the shapes."""

    depth: int
    width: int
    patch_size: tuple[int, ...]
    channels: int
    ffn_width: int
    freq_width: int
    text_width: int


def wan_plan(state: StateDict, choices: Choices, config: Mapping[str, Any] | None) -> Plan:
    """Returns the plan of one network under the authors' names; `config` is its config.json."""
    check_text_to_video(state)
    said = settings_of(config or {})
    sizes = wan_sizes(state, said)
    check_settings(said, sizes)
    notes: list[str] = []
    fields = {
        "patch_size": sizes.patch_size,
        "in_channels": sizes.channels,
        "hidden_size": sizes.width,
        "depth": sizes.depth,
        "num_heads": num_heads(said, choices, sizes),
        "ffn_width": sizes.ffn_width,
        "freq_width": sizes.freq_width,
        "text_width": sizes.text_width,
        "text_length": said.get("text_len") or TEXT_LENGTH,
        "eps": float(said["eps"]),
        "sample_size": sample_size(choices, sizes, notes),
    }
    return Plan("wan", fields, tuple(wan_leaves(sizes)), tuple(notes))


def check_text_to_video(state: StateDict) -> None:
    """Raises `UserError` for networks that are conditioned on images too."""
    found = [key for key in state.tensors if OF_IMAGES.match(key)]
    if found:
        raise UserError(
            "these are weights of a Wan network that is conditioned on images or controls as well "
            f"({listing(found, 2)}); {KNOWN}."
        )


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a config.json of either layout says.

    Raises:
        UserError: if it is of another network, or says what is not understood.
    """
    is_diffusers = config.get("_class_name") == DIFFUSERS_NAME or "num_attention_heads" in config
    table = DIFFUSERS if is_diffusers else AUTHORS
    return network_settings(config, table, [DIFFUSERS_NAME, AUTHORS_NAME])


def wan_sizes(state: StateDict, said: Mapping[str, Any]) -> Sizes:
    """Returns the sizes of the network: those of one tensor alone as config.json has them, if it says.

    Raises:
        UserError: if it has other input channels than output channels, as image-to-video networks.
    """
    tensors = state.tensors
    depth = block_count(tensors, "blocks.")
    if depth == 0:
        raise UserError("there are no blocks (blocks.0.self_attn.q.weight and so on).")
    patch = tuple(said.get("patch_size") or PATCH_SIZE)
    if len(patch) != 3 or not all(type(n) is int and n > 0 for n in patch):
        raise UserError(f"config.json says patch_size={list(patch)}; 3 whole numbers are needed.")
    width, channels, *_ = shape_of(tensors, "patch_embedding.weight", 5)
    rows = shape_of(tensors, "head.head.weight", 2)[0]
    if rows % math.prod(patch) == 0 and channels > rows // math.prod(patch):
        raise UserError(
            f"the network takes {channels} channels and returns {rows // math.prod(patch)}, as "
            f"image-to-video networks do; {KNOWN}."
        )
    ffn = [t.shape[0] for key, t in tensors.items() if key.endswith(".ffn.0.weight") and t.shape]
    shape_of(tensors, "blocks.0.ffn.0.weight", 2)
    return Sizes(
        depth=depth,
        width=width,
        patch_size=patch,
        channels=channels,
        ffn_width=most_common(ffn),
        freq_width=said.get("freq_dim") or shape_of(tensors, "time_embedding.0.weight", 2)[1],
        text_width=said.get("text_dim") or shape_of(tensors, "text_embedding.0.weight", 2)[1],
    )


def check_settings(said: Mapping[str, Any], sizes: Sizes) -> None:
    """Raises `UserError` if a config.json contradicts the weights."""
    heads, head_width = said.get("num_attention_heads"), said.get("attention_head_dim")
    stated = {
        "num_layers": (said.get("num_layers"), sizes.depth),
        "dim": (said.get("dim"), sizes.width),
        "num_attention_heads * attention_head_dim": (
            heads and head_width and heads * head_width,
            sizes.width,
        ),
        "ffn_dim": (said.get("ffn_dim"), sizes.ffn_width),
    }
    for key in ("in_dim", "out_dim", "in_channels", "out_channels"):
        stated[key] = (said.get(key), sizes.channels)
    for key, (says, found) in stated.items():
        if says is not None and says != found:
            raise UserError(f"config.json says {key} = {says}, but the weights have {found}.")


def num_heads(said: Mapping[str, Any], choices: Choices, sizes: Sizes) -> int:
    """Returns the number of heads: the user's, the config's, or as published.

    Raises:
        UserError: if nothing says it, it contradicts config.json, or it does not divide the width.
    """
    stated = said.get("num_attention_heads") or said.get("num_heads")
    if stated and choices.num_heads not in (None, stated):
        raise UserError(f"config.json says {stated} heads, but num_heads={choices.num_heads}.")
    heads = choices.num_heads or stated
    if heads is None and (sizes.depth, sizes.width) in PUBLISHED:
        heads = sizes.width // HEAD_WIDTH
    if heads is None:
        raise UserError(
            f"{sizes.depth} blocks of width {sizes.width} is not a published size, and shapes cannot "
            "tell the number of attention heads; pass --num-heads, or put its config.json beside it."
        )
    if sizes.width % heads or (sizes.width // heads) % 2:
        raise UserError(
            f"the width {sizes.width} does not make num_heads={heads} heads of an even width."
        )
    return int(heads)


def sample_size(choices: Choices, sizes: Sizes, notes: list[str]) -> tuple[int, ...]:
    """Returns frames, rows and columns of the latents by default; `notes` say what is assumed.

    Raises:
        UserError: if patches do not divide the user's size.
    """
    frames, rows, columns = SAMPLE_SIZES.get(sizes.channels, SAMPLE_SIZES[16])
    given = choices.input_size
    given = (given,) * 2 if isinstance(given, int) else given
    if given is None:
        size = (frames, rows, columns)
        notes.append(
            f"latents of {frames} frames, {rows} rows and {columns} columns by default: no file "
            "says it (--input-size FRAMES ROWS COLUMNS); a call may have others"
        )
    else:
        size = tuple(given) if len(given) == 3 else (frames, *given)
    if any(n < 1 or n % p for n, p in zip(size, sizes.patch_size, strict=True)):
        raise UserError(f"patches of {list(sizes.patch_size)} do not divide input_size={size}.")
    return size


def wan_leaves(sizes: Sizes) -> list[Leaf]:
    """Returns the leaves of one network, under the authors' names."""
    D = sizes.width
    patch = (D, sizes.channels, *sizes.patch_size)
    leaves = [
        *affine("patch_embedding", "patch_embedding", patch, convolution3d),
        *affine("text_embedding_0", "text_embedding.0", (D, sizes.text_width)),
        *affine("text_embedding_2", "text_embedding.2", (D, D)),
        *affine("time_embedding_0", "time_embedding.0", (D, sizes.freq_width)),
        *affine("time_embedding_2", "time_embedding.2", (D, D)),
        *affine("time_projection_1", "time_projection.1", (6 * D, D)),
    ]
    for i in range(sizes.depth):
        new, old = f"blocks_{i}", f"blocks.{i}"
        leaves.append(Leaf(f"{new}/modulation", (f"{old}.modulation",), ((1, 6, D),)))
        leaves += joined(f"{new}/self_attn/qkv", [f"{old}.self_attn.{n}" for n in "qkv"], D)
        leaves += affine(f"{new}/cross_attn/q", f"{old}.cross_attn.q", (D, D))
        leaves += joined(f"{new}/cross_attn/kv", [f"{old}.cross_attn.{n}" for n in "kv"], D)
        for attention in ("self_attn", "cross_attn"):
            leaves += affine(f"{new}/{attention}/o", f"{old}.{attention}.o", (D, D))
            leaves += [
                Leaf(f"{new}/{attention}/{n}/scale", (f"{old}.{attention}.{n}.weight",), ((D,),))
                for n in ("norm_q", "norm_k")
            ]
        leaves += norm(f"{new}/norm3", f"{old}.norm3", D)
        leaves += affine(f"{new}/ffn_0", f"{old}.ffn.0", (sizes.ffn_width, D))
        leaves += affine(f"{new}/ffn_2", f"{old}.ffn.2", (D, sizes.ffn_width))
    out = sizes.channels * math.prod(sizes.patch_size)
    leaves += affine("head/head", "head.head", (out, D))
    leaves.append(Leaf("head/modulation", ("head.modulation",), ((1, 2, D),)))
    return leaves


def joined(path: str, keys: list[str], width: int) -> list[Leaf]:
    """Returns the leaves of layers that read the same input, side by side."""
    return [
        Leaf(f"{path}/kernel", tuple(f"{k}.weight" for k in keys), ((width, width),), linear),
        Leaf(f"{path}/bias", tuple(f"{k}.bias" for k in keys), ((width,),)),
    ]


# diffusers' names, and the authors'.
RENAMED = (
    (r"\bcondition_embedder\.time_embedder\.linear_1\b", "time_embedding.0"),
    (r"\bcondition_embedder\.time_embedder\.linear_2\b", "time_embedding.2"),
    (r"\bcondition_embedder\.text_embedder\.linear_1\b", "text_embedding.0"),
    (r"\bcondition_embedder\.text_embedder\.linear_2\b", "text_embedding.2"),
    (r"\bcondition_embedder\.time_proj\b", "time_projection.1"),
    (r"\b(blocks\.\d+)\.scale_shift_table\b", r"\1.modulation"),
    (r"\bscale_shift_table\b", "head.modulation"),
    (r"\b(blocks\.\d+)\.norm2\b", r"\1.norm3"),
    (r"\b(blocks\.\d+)\.attn1\.to_([qkv])\b", r"\1.self_attn.\2"),
    (r"\b(blocks\.\d+)\.attn2\.to_([qkv])\b", r"\1.cross_attn.\2"),
    (r"\b(blocks\.\d+)\.attn1\.to_out\.0\b", r"\1.self_attn.o"),
    (r"\b(blocks\.\d+)\.attn2\.to_out\.0\b", r"\1.cross_attn.o"),
    (r"\b(blocks\.\d+)\.attn1\.(norm_[qk])\b", r"\1.self_attn.\2"),
    (r"\b(blocks\.\d+)\.attn2\.(norm_[qk])\b", r"\1.cross_attn.\2"),
    (r"\b(blocks\.\d+)\.ffn\.net\.0\.proj\b", r"\1.ffn.0"),
    (r"\b(blocks\.\d+)\.ffn\.net\.2\b", r"\1.ffn.2"),
    (r"\bproj_out\b", "head.head"),
)
RENAMED_BACK = (
    (r"\btime_embedding\.0\b", "condition_embedder.time_embedder.linear_1"),
    (r"\btime_embedding\.2\b", "condition_embedder.time_embedder.linear_2"),
    (r"\btext_embedding\.0\b", "condition_embedder.text_embedder.linear_1"),
    (r"\btext_embedding\.2\b", "condition_embedder.text_embedder.linear_2"),
    (r"\btime_projection\.1\b", "condition_embedder.time_proj"),
    (r"\b(blocks\.\d+)\.modulation\b", r"\1.scale_shift_table"),
    (r"\bhead\.modulation\b", "scale_shift_table"),
    (r"\b(blocks\.\d+)\.norm3\b", r"\1.norm2"),
    (r"\b(blocks\.\d+)\.self_attn\.([qkv])\b", r"\1.attn1.to_\2"),
    (r"\b(blocks\.\d+)\.cross_attn\.([qkv])\b", r"\1.attn2.to_\2"),
    (r"\b(blocks\.\d+)\.self_attn\.o\b", r"\1.attn1.to_out.0"),
    (r"\b(blocks\.\d+)\.cross_attn\.o\b", r"\1.attn2.to_out.0"),
    (r"\b(blocks\.\d+)\.self_attn\.(norm_[qk])\b", r"\1.attn1.\2"),
    (r"\b(blocks\.\d+)\.cross_attn\.(norm_[qk])\b", r"\1.attn2.\2"),
    (r"\b(blocks\.\d+)\.ffn\.0\b", r"\1.ffn.net.0.proj"),
    (r"\b(blocks\.\d+)\.ffn\.2\b", r"\1.ffn.net.2"),
    (r"\bhead\.head\b", "proj_out"),
)


def from_diffusers(state: StateDict) -> StateDict:
    """Returns `state` under the authors' names instead of diffusers'."""
    return with_names(state, lambda text: renamed(text, RENAMED))


def in_diffusers_names(text: str, state: StateDict) -> str:
    """Returns `text` with diffusers' names instead of the authors'."""
    return renamed(text, RENAMED_BACK)


def with_names(state: StateDict, rename: Callable[[str], str]) -> StateDict:
    """Returns `state` with all names put through `rename`, which is given them line by line."""
    if any("\n" in key for key in state.tensors):
        return state  # of no network that is known
    names = rename("\n".join(state.tensors)).split("\n")
    return replace(state, tensors=dict(zip(names, state.tensors.values(), strict=True)))


def renamed(text: str, names: tuple[tuple[str, str], ...]) -> str:
    """Returns `text` with all `names` (patterns and what replaces them) replaced."""
    for pattern, name in names:
        text = re.sub(pattern, name, text)
    return text


SMALL = Sizes(
    depth=2,
    width=24,
    patch_size=(1, 2, 2),
    channels=4,
    ffn_width=40,
    freq_width=32,
    text_width=10,
)


def wan_example() -> Example:
    """Returns a small network in the authors' layout, with its config.json."""
    config = {
        "_class_name": AUTHORS_NAME,
        "_diffusers_version": "0.30.0",
        "model_type": "t2v",
        "text_len": 12,
        "in_dim": SMALL.channels,
        "out_dim": SMALL.channels,
        "dim": SMALL.width,
        "ffn_dim": SMALL.ffn_width,
        "freq_dim": SMALL.freq_width,
        "text_dim": SMALL.text_width,
        "num_heads": 2,
        "num_layers": SMALL.depth,
        "eps": 1e-6,
    }
    return Example(tuple(wan_leaves(SMALL)), {"input_size": (2, 4, 4)}, config)


def diffusers_wan_example() -> Example:
    """Returns a small network in the diffusers layout, with its config.json."""
    config = {
        "_class_name": DIFFUSERS_NAME,
        "num_attention_heads": 2,
        "attention_head_dim": SMALL.width // 2,
        "num_layers": SMALL.depth,
        "patch_size": list(SMALL.patch_size),
        "in_channels": SMALL.channels,
        "out_channels": SMALL.channels,
        "text_dim": SMALL.text_width,
        "freq_dim": SMALL.freq_width,
        "ffn_dim": SMALL.ffn_width,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": None,
    }
    leaves = with_sources(wan_leaves(SMALL), lambda text: renamed(text, RENAMED_BACK))
    return Example(tuple(leaves), {"input_size": (2, 4, 4)}, config)


def with_sources(leaves: list[Leaf], rename: Callable[[str], str]) -> list[Leaf]:
    """Returns leaves of tensors whose names are put through `rename`."""
    lines = rename("\n".join("\t".join(leaf.sources) for leaf in leaves)).split("\n")
    return [
        replace(leaf, sources=tuple(line.split("\t")))
        for leaf, line in zip(leaves, lines, strict=True)
    ]
