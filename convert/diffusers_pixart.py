"""The layout of diffusers' PixArt (`PixArtTransformer2DModel`), alpha and Sigma.

Differs from the authors' layout: q, k and v are apart, neither positions nor a null caption are stored,
and config.json says what shapes cannot.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qdit_convert.choices import Choices
from qdit_convert.dit import out_channels
from qdit_convert.pixart import Sizes, has, pixart_config
from qdit_convert.pixart_settings import PIXART
from qdit_convert.plan import (
    Example,
    Leaf,
    Plan,
    affine,
    block_count,
    convolution,
    linear,
    shape_of,
)
from qdit_convert.settings import network_settings
from qdit_convert.tensors import StateDict, StoredTensor
from qdit_convert.training_args import Arguments, unknown_note
from qdit_jax.diffusion import shown
from qdit_jax.errors import UserError

BLOCKS = "transformer_blocks."
CLASS_NAMES = ("PixArtTransformer2DModel", "Transformer2DModel")
EMBEDDERS = {"t": "timestep", "csize": "resolution", "ar": "aspect_ratio"}
CONDITIONED_SIZE = 128  # of the only published network that has size conditions
TEXT_LENGTHS = (300, 120)  # of Sigma and of alpha


def diffusers_pixart_plan(
    state: StateDict, choices: Choices, config: Mapping[str, Any] | None
) -> Plan:
    """Returns the plan for a diffusers PixArt; `config` is its config.json, which it needs."""
    if config is None:
        raise UserError(
            "a PixArt in the diffusers layout needs its config.json, which says what shapes cannot "
            "(heads, sample size, scale of the positions); give the folder that holds both."
        )
    settings = checked_settings(config)
    sizes = diffusers_sizes(state.tensors, settings)
    check_shapes(settings, sizes)
    scale = settings["interpolation_scale"]
    size = settings["sample_size"]
    text_length = TEXT_LENGTHS[sizes.size_conditions]
    fields = pixart_config(sizes, settings["num_attention_heads"]) | {
        "sample_size": size,
        "interpolation_scale": float(max(size // 64, 1) if scale is None else scale),
        "stored_positions": False,
        "text_length": text_length,
        "null_caption": False,
    }
    notes = (
        "this layout has no null caption: give null_text and null_text_mask, the embedding of an empty "
        "prompt, for guidance",
        f"examples and costs count {text_length} rows of text; texts of any length are taken",
    )
    said = Arguments({}, {}, tuple(f"{key}={shown(value)}" for key, value in state.hints.items()))
    leaves = tuple(diffusers_leaves(sizes))
    return Plan("pixart", fields, leaves, (*notes, *unknown_note(said)))


def checked_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of config.json; raises `UserError` if one is not understood."""
    settings = network_settings(config, PIXART, CLASS_NAMES)
    if settings["caption_channels"] is None:
        raise UserError(
            "config.json says nothing of caption_channels: a PixArt that does not project its text is "
            "not supported."
        )
    if settings["sample_size"] % settings["patch_size"]:
        raise UserError(
            f"config.json says sample_size={settings['sample_size']}, which patches of "
            f"{settings['patch_size']} do not divide."
        )
    return settings


def diffusers_sizes(tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any]) -> Sizes:
    """Returns the sizes of the network: those of the shapes, and of config.json for the text."""
    depth = block_count(tensors, BLOCKS)
    if depth == 0:
        raise UserError("there are no blocks (transformer_blocks.0.attn1.to_q.weight and so on).")
    width, in_channels, patch, _ = shape_of(tensors, "pos_embed.proj.weight", 4)
    return Sizes(
        depth=depth,
        width=width,
        patch_size=patch,
        in_channels=in_channels,
        out_channels=out_channels(shape_of(tensors, "proj_out.weight", 2)[0], patch),
        mlp_width=shape_of(tensors, f"{BLOCKS}0.ff.net.0.proj.weight", 2)[0],
        text_width=settings["caption_channels"],
        size_conditions=has(tensors, r"adaln_single\.emb\.(resolution|aspect_ratio)_embedder\."),
        compression=(1,) * depth,
    )


def check_shapes(settings: Mapping[str, Any], sizes: Sizes) -> None:
    """Raises `UserError` if config.json contradicts the weights."""
    conditions = settings["use_additional_conditions"]
    if conditions is None:
        conditions = settings["sample_size"] == CONDITIONED_SIZE
    width = settings["num_attention_heads"] * settings["attention_head_dim"]
    stated = {
        "num_layers": (settings["num_layers"], sizes.depth),
        "num_attention_heads * attention_head_dim": (width, sizes.width),
        "cross_attention_dim": (settings["cross_attention_dim"], sizes.width),
        "patch_size": (settings["patch_size"], sizes.patch_size),
        "in_channels": (settings["in_channels"], sizes.in_channels),
        "out_channels": (settings["out_channels"] or sizes.in_channels, sizes.out_channels),
        "use_additional_conditions": (conditions, sizes.size_conditions),
    }
    for key, (says, found) in stated.items():
        if says != found:
            raise UserError(f"config.json says {key} = {says}, but the weights have {found}.")


def diffusers_leaves(sizes: Sizes) -> list[Leaf]:
    """Returns the leaves, q, k and v of self-attention and k and v of cross-attention joined."""
    D, p, mlp = sizes.width, sizes.patch_size, sizes.mlp_width
    patches = (D, sizes.in_channels, p, p)
    leaves = affine("x_embedder/proj", "pos_embed.proj", patches, convolution)
    widths = {"t": D} | ({"csize": D // 3, "ar": D // 3} if sizes.size_conditions else {})
    for name, width in widths.items():
        key = f"adaln_single.emb.{EMBEDDERS[name]}_embedder.linear"
        leaves += affine(f"{name}_embedder/mlp_0", f"{key}_1", (width, 256))
        leaves += affine(f"{name}_embedder/mlp_2", f"{key}_2", (width, width))
    leaves += affine("t_block", "adaln_single.linear", (6 * D, D))
    text = "caption_projection.linear"
    leaves += affine("y_embedder/y_proj/fc1", f"{text}_1", (D, sizes.text_width))
    leaves += affine("y_embedder/y_proj/fc2", f"{text}_2", (D, D))
    for i in range(sizes.depth):
        new, old = f"blocks_{i}", f"{BLOCKS}{i}"
        table = Leaf(f"{new}/scale_shift_table", (f"{old}.scale_shift_table",), ((6, D),))
        leaves += [table, *joined(f"{new}/attn/qkv", f"{old}.attn1.to_", "qkv", D)]
        leaves += affine(f"{new}/attn/proj", f"{old}.attn1.to_out.0", (D, D))
        leaves += affine(f"{new}/cross_attn/q_linear", f"{old}.attn2.to_q", (D, D))
        leaves += joined(f"{new}/cross_attn/kv_linear", f"{old}.attn2.to_", "kv", D)
        leaves += affine(f"{new}/cross_attn/proj", f"{old}.attn2.to_out.0", (D, D))
        leaves += affine(f"{new}/mlp/fc1", f"{old}.ff.net.0.proj", (mlp, D))
        leaves += affine(f"{new}/mlp/fc2", f"{old}.ff.net.2", (D, mlp))
    leaves.append(Leaf("final_layer/scale_shift_table", ("scale_shift_table",), ((2, D),)))
    return [*leaves, *affine("final_layer/linear", "proj_out", (p * p * sizes.out_channels, D))]


def joined(path: str, prefix: str, names: str, width: int) -> list[Leaf]:
    """Returns the leaves of one layer of those that the file holds apart, one per letter."""
    weights, biases = (
        tuple(f"{prefix}{name}.{kind}" for name in names) for kind in ("weight", "bias")
    )
    return [
        Leaf(f"{path}/kernel", weights, ((width, width),), linear),
        Leaf(f"{path}/bias", biases, ((width,),)),
    ]


def diffusers_pixart_example() -> Example:
    """Returns a small PixArt-alpha with size conditions, and its config.json."""
    sizes = Sizes(
        depth=2,
        width=24,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        mlp_width=96,
        text_width=10,
        size_conditions=True,
        compression=(1, 1),
    )
    config = {
        "_class_name": CLASS_NAMES[0],
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "cross_attention_dim": 24,
        "num_layers": 2,
        "sample_size": 128,
        "caption_channels": 10,
        "norm_type": "ada_norm_single",
    }
    return Example(tuple(diffusers_leaves(sizes)), config=config)
