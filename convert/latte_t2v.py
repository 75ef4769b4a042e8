"""The layout of diffusers' Latte for text (`LatteTransformer3DModel`): PixArt's names, and more blocks.

Neither table of positions is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    linear,
    most_common,
    shape_of,
)
from qdit_convert.settings import CONFIG, network_settings
from qdit_convert.sizes import mlp_ratio
from qdit_convert.stdit import SMALL, unread
from qdit_convert.tensors import StateDict
from qdit_convert.training_args import unknown_note
from qdit_convert.video import (
    TEXT_WIDTH,
    VideoSizes,
    heads_of,
    overridden_heads,
    video_config,
    video_size,
)
from qdit_convert.video_settings import LATTE
from qdit_jax.errors import UserError

SPATIAL, TEMPORAL = "transformer_blocks", "temporal_transformer_blocks"
EMBEDDER = "adaln_single.emb.timestep_embedder"
LATTE_CLASSES = ("LatteTransformer3DModel", "LatteT2V")


def is_latte_t2v(state: StateDict) -> bool:
    """Returns whether a file in these names has blocks over time."""
    return any(key.startswith(f"{TEMPORAL}.") for key in state.tensors)


def latte_t2v_plan(state: StateDict, choices: Choices, config: Mapping[str, Any] | None) -> Plan:
    """Returns the plan for Latte-T2V; `config` is its config.json, if there is one."""
    settings = network_settings(config or {}, LATTE, LATTE_CLASSES)
    if config is None:
        settings |= {"activation_fn": None, "norm_eps": 1e-6, "video_length": 16}
    sizes, is_gated = t2v_sizes(state, settings)
    check_t2v(settings, sizes, config or {})
    said = settings["num_attention_heads"]
    heads = heads_of(sizes.depth, sizes.width, choices.num_heads, said)
    notes = overridden_heads(choices, said, CONFIG)
    if config is None:
        assumed = (
            f"video_length=16, norm_eps=1e-06 and {'geglu' if is_gated else 'gelu-approximate'}"
        )
        notes.append(f"{assumed}, as published: there is no config.json")
    size = settings["sample_size"]
    if size is None and choices.input_size is None:
        raise UserError(
            "this layout does not store the image size; pass --input-size, as 64 for 512 pixels."
        )
    frames, rows, columns = video_size(
        choices.input_size, (settings["video_length"] or 16, size or 0, size or 0), sizes.patch_size
    )
    if rows != columns:
        raise UserError(
            f"input_size={rows} {columns}: this network's positions are those of a square; give its side, "
            "and the real shape when sampling."
        )
    result = video_config(sizes, heads)
    del result["learn_sigma"]
    result |= {
        "sample_size": rows,
        "video_length": frames,
        "out_channels": sizes.out_channels,
        "activation": settings["activation_fn"] or ("geglu" if is_gated else "gelu-approximate"),
        "norm_eps": float(settings["norm_eps"]),
        "mlp_ratio": mlp_ratio(sizes.mlp_width, sizes.width),
    }
    notes += unknown_note(unread(state))
    return Plan("latte_t2v", result, tuple(t2v_leaves(sizes, is_gated)), tuple(notes))


def t2v_sizes(state: StateDict, settings: Mapping[str, Any]) -> tuple[VideoSizes, bool]:
    """Returns the sizes of the network, and whether its MLPs are gated: by the shapes if unsaid.

    Raises:
        UserError: if the blocks over space and over time are not as many.
    """
    tensors = state.tensors
    depth, over_time = (block_count(tensors, f"{name}.") for name in (SPATIAL, TEMPORAL))
    if depth == 0 or depth != over_time:
        raise UserError(
            f"there are {depth} blocks over space ({SPATIAL}.*) and {over_time} over time "
            f"({TEMPORAL}.*); there must be as many."
        )
    width, channels, patch, _ = shape_of(tensors, "pos_embed.proj.weight", 4)
    features = shape_of(tensors, "proj_out.weight", 2)[0]
    blocks = [f"{kind}.{i}.ff.net" for kind in (SPATIAL, TEMPORAL) for i in range(depth)]
    first = most_common([shape_of(tensors, f"{b}.0.proj.weight", 2)[0] for b in blocks])
    second = most_common([shape_of(tensors, f"{b}.2.weight", 2)[1] for b in blocks])
    activation = settings["activation_fn"]
    is_gated = first == 2 * second if activation is None else activation == "geglu"
    if first != second * (2 if is_gated else 1):
        raise UserError(
            f"{CONFIG} activation_fn={activation}, but the MLPs of the weights are {first} and "
            f"{second} wide; give the config.json of these weights."
        )
    return VideoSizes(
        depth=depth,
        width=width,
        patch_size=patch,
        in_channels=channels,
        out_channels=out_channels(features, patch),
        mlp_width=second,
        caption_channels=settings["caption_channels"]
        or shape_of(tensors, "caption_projection.linear_1.weight", 2)[1],
        caption_length=120,
    ), is_gated


def check_t2v(settings: Mapping[str, Any], sizes: VideoSizes, config: Mapping[str, Any]) -> None:
    """Raises `UserError` if config.json contradicts the weights."""
    heads, each = settings["num_attention_heads"], settings["attention_head_dim"]
    stated = {
        "num_layers": (settings["num_layers"], sizes.depth),
        "num_attention_heads * attention_head_dim": (heads and each and heads * each, sizes.width),
        "cross_attention_dim": (settings["cross_attention_dim"], sizes.width),
        "patch_size": (settings["patch_size"], sizes.patch_size),
        "in_channels": (settings["in_channels"], sizes.in_channels),
        "out_channels": (settings["out_channels"], sizes.out_channels),
    }
    for key, (says, found) in stated.items():
        if says is not None and says != found:
            raise UserError(f"{CONFIG} {key} = {says}, but the weights have {found}.")


def t2v_leaves(sizes: VideoSizes, is_gated: bool = False) -> list[Leaf]:
    """Returns the leaves; q, k and v of an attention become one."""
    D, p = sizes.width, sizes.patch_size
    out, K = p * p * sizes.out_channels, sizes.caption_channels
    leaves = [
        *affine("x_embedder/proj", "pos_embed.proj", (D, sizes.in_channels, p, p), convolution),
        *affine("t_embedder/mlp_0", f"{EMBEDDER}.linear_1", (D, 256)),
        *affine("t_embedder/mlp_2", f"{EMBEDDER}.linear_2", (D, D)),
        *affine("t_block", "adaln_single.linear", (6 * D, D)),
        *affine("y_embedder/y_proj/fc1", "caption_projection.linear_1", (D, K)),
        *affine("y_embedder/y_proj/fc2", "caption_projection.linear_2", (D, D)),
        Leaf("final_layer/scale_shift_table", ("scale_shift_table",), ((2, D),)),
        *affine("final_layer/linear", "proj_out", (out, D)),
    ]
    mlp = "glu" if is_gated else "mlp"
    for kind in (SPATIAL, TEMPORAL):
        for i in range(sizes.depth):
            new, old = f"{kind}_{i}", f"{kind}.{i}"
            table = f"{old}.scale_shift_table"
            leaves.append(Leaf(f"{new}/scale_shift_table", (table,), ((6, D),)))
            leaves += joined(f"{new}/attn/qkv", f"{old}.attn1", "qkv", D)
            leaves += affine(f"{new}/attn/proj", f"{old}.attn1.to_out.0", (D, D))
            if kind == SPATIAL:
                leaves += affine(f"{new}/cross_attn/q_linear", f"{old}.attn2.to_q", (D, D))
                leaves += joined(f"{new}/cross_attn/kv_linear", f"{old}.attn2", "kv", D)
                leaves += affine(f"{new}/cross_attn/proj", f"{old}.attn2.to_out.0", (D, D))
            first = (sizes.mlp_width * (2 if is_gated else 1), D)
            leaves += affine(f"{new}/{mlp}/fc1", f"{old}.ff.net.0.proj", first)
            leaves += affine(f"{new}/{mlp}/fc2", f"{old}.ff.net.2", (D, sizes.mlp_width))
    return leaves


def joined(path: str, attention: str, names: str, width: int) -> list[Leaf]:
    """Returns the leaves of one linear layer that the file holds as `to_q`, `to_k`, `to_v`."""
    parts = [f"{attention}.to_{name}" for name in names]
    return [
        Leaf(f"{path}/kernel", tuple(f"{k}.weight" for k in parts), ((width, width),), linear),
        Leaf(f"{path}/bias", tuple(f"{k}.bias" for k in parts), ((width,),)),
    ]


def latte_t2v_example() -> Example:
    """Returns a small Latte-T2V with its config.json."""
    config = {
        "_class_name": LATTE_CLASSES[0],
        "num_attention_heads": 2,
        "attention_head_dim": SMALL.width // 2,
        "caption_channels": TEXT_WIDTH,
        "sample_size": 4,
        "video_length": 3,
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
    }
    return Example(tuple(t2v_leaves(SMALL)), config=config)
