"""Wan's video autoencoders: the layout of diffusers, and the authors' of the 2.1 one.

Dimensions: Z latent channels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from qdit_convert.choices import Choices
from qdit_convert.plan import (
    Example,
    Leaf,
    Plan,
    affine,
    block_count,
    convolution,
    convolution3d,
    linear,
    shape_of,
)
from qdit_convert.settings import network_settings
from qdit_convert.tensors import StateDict, StoredTensor
from qdit_convert.wan import renamed, with_names, with_sources
from qdit_convert.wan_settings import AUTOENCODER
from qdit_jax.errors import UserError
from qdit_jax.models import LATENTS_MEAN, LATENTS_STD

CLASS_NAME = "AutoencoderKLWan"


def vector(array: np.ndarray) -> np.ndarray:
    """Returns `[C]` of torch's `[C, 1, 1, 1]`."""
    return array.reshape(-1)


def wan_vae_plan(state: StateDict, choices: Choices, config: Mapping[str, Any] | None) -> Plan:
    """Returns the plan for an autoencoder; `config` is its config.json, if there is one."""
    settings = checked_settings(config or {})
    fields = fields_of(state.tensors, settings)
    notes = []
    z_dim = fields["z_dim"]
    for name, published in (("latents_mean", LATENTS_MEAN), ("latents_std", LATENTS_STD)):
        stated = settings[name]
        if stated is None and z_dim != len(published):
            raise UserError(
                f"nothing says the {name} of these {z_dim}-channel latents; put its config.json "
                "beside it."
            )
        if stated is None:
            notes.append(f"{name} assumed to be Wan 2.1's: no config.json says it")
        fields[name] = tuple(float(x) for x in (published if stated is None else stated))
        if len(fields[name]) != z_dim:
            raise UserError(
                f"config.json says {len(fields[name])} {name}, but the latents have {z_dim} channels."
            )
    if not all(std > 0 for std in fields["latents_std"]):
        raise UserError("config.json says latents_std that are not all positive.")
    return Plan("wan-vae", fields, tuple(vae_leaves(fields)), tuple(notes))


def checked_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a config.json says; raises `UserError` if it is of another network."""
    return network_settings(config, AUTOENCODER, [CLASS_NAME])


def fields_of(tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the network's fields, from shapes and its config.json.

    Raises:
        UserError: if a tensor that settles a size is missing, or config.json contradicts the shapes.
    """
    base, channels, *_ = shape_of(tensors, "encoder.conv_in.weight", 5)
    _, z_dim, *_ = shape_of(tensors, "decoder.conv_in.weight", 5)
    out, finest, *_ = shape_of(tensors, "decoder.conv_out.weight", 5)
    mult, temporal = levels_of(tensors, settings, finest)
    decoder_base = settings["decoder_base_dim"] or finest // mult[0]
    found = {
        "base_dim": base,
        "decoder_base_dim": decoder_base,
        "z_dim": z_dim,
        "dim_mult": mult,
        "num_res_blocks": block_count(tensors, "decoder.up_blocks.0.resnets.") - 1,
        "temporal_downsample": temporal,
        "in_channels": channels,
        "out_channels": out,
        "residual": any(".downsampler." in key for key in tensors),
        "patch_size": settings["patch_size"] or 1,
    }
    stated = {
        "base_dim": base,
        "z_dim": z_dim,
        "num_res_blocks": found["num_res_blocks"],
        "in_channels": channels,
        "out_channels": out,
        "is_residual": found["residual"],
    }
    for key, has in stated.items():
        if settings[key] not in (None, has):
            raise UserError(
                f"config.json says {key} = {settings[key]}, but the weights have {has}."
            )
    if found["num_res_blocks"] < 1 or len(temporal) != len(mult) - 1 or not all(mult):
        raise UserError(
            f"an autoencoder with {found['num_res_blocks']} blocks in a level, dim_mult={list(mult)} "
            f"and temperal_downsample={list(temporal)} is not understood."
        )
    return found


def levels_of(
    tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any], finest: int
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Returns the widths of the levels in those of the finest, and which halve the frames as well."""
    count = block_count(tensors, "decoder.up_blocks.")
    if count < 2:
        raise UserError("the decoder has no levels (decoder.up_blocks.0 and so on).")
    keys = [f"decoder.up_blocks.{i}.resnets.0.conv2.weight" for i in range(count)][::-1]
    widths = [shape_of(tensors, key, 5)[0] for key in keys]
    mult = tuple(settings["dim_mult"] or (width // finest for width in widths))
    timed = [
        any(key.startswith(f"decoder.up_blocks.{i}.") and ".time_conv." in key for key in tensors)
        for i in range(count - 1)
    ]
    return mult, tuple(settings["temperal_downsample"] or timed[::-1])


def vae_leaves(fields: Mapping[str, Any]) -> list[Leaf]:
    """Returns the leaves, under diffusers' names."""
    mult, Z, residual = fields["dim_mult"], fields["z_dim"], fields["residual"]
    blocks, temporal = fields["num_res_blocks"], fields["temporal_downsample"]
    down = [fields["base_dim"] * n for n in (1, *mult)]
    up = [fields["decoder_base_dim"] * n for n in (mult[-1], *mult[::-1])]
    leaves = [
        *causal("encoder.conv_in", fields["in_channels"], down[0]),
        *middle("encoder.mid_block", down[-1]),
        *ends("encoder", down[-1], 2 * Z),
        *affine("quant_conv", "quant_conv", (2 * Z, 2 * Z, 1, 1, 1), linear),
        *affine("post_quant_conv", "post_quant_conv", (Z, Z, 1, 1, 1), linear),
        *causal("decoder.conv_in", Z, up[0]),
        *middle("decoder.mid_block", up[0]),
        *ends("decoder", up[-1], fields["out_channels"]),
    ]
    number = 0
    for i, (before, after) in enumerate(pairwise(down)):
        for j in range(blocks):
            key = (
                f"encoder.down_blocks.{i}.resnets.{j}"
                if residual
                else f"encoder.down_blocks.{number}"
            )
            leaves += resnet(key, after if j else before, after)
            number += 1
        if i < len(mult) - 1:
            key = (
                f"encoder.down_blocks.{i}.downsampler"
                if residual
                else f"encoder.down_blocks.{number}"
            )
            leaves += picture(f"{key}.resample.1", after, after)
            leaves += causal(f"{key}.time_conv", after, after, (3, 1, 1)) if temporal[i] else []
            number += 1
    for i, (before, after) in enumerate(pairwise(up)):
        key = f"decoder.up_blocks.{i}"
        halved = before if residual or i == 0 else before // 2
        for j in range(blocks + 1):
            leaves += resnet(f"{key}.resnets.{j}", after if j else halved, after)
        if i < len(mult) - 1:
            key = f"{key}.upsampler" if residual else f"{key}.upsamplers.0"
            leaves += picture(f"{key}.resample.1", after, after if residual else after // 2)
            if temporal[::-1][i]:
                leaves += causal(f"{key}.time_conv", after, 2 * after, (3, 1, 1))
    return leaves


def path_of(key: str) -> str:
    """Returns the path of a layer: a number joins the name before it."""
    return re.sub(r"\.(\d+)", r"_\1", key).replace(".", "/")


def causal(key: str, before: int, after: int, size: tuple[int, ...] = (3, 3, 3)) -> list[Leaf]:
    """Returns the leaves of a convolution over frames, rows and columns."""
    return affine(path_of(key), key, (after, before, *size), convolution3d)


def picture(key: str, before: int, after: int) -> list[Leaf]:
    """Returns the leaves of a convolution over rows and columns."""
    return affine(path_of(key), key, (after, before, 3, 3), convolution)


def gamma(key: str, width: int, axes: int = 3) -> Leaf:
    """Returns the leaf of a norm over channels."""
    return Leaf(f"{path_of(key)}/gamma", (f"{key}.gamma",), ((width, *(1,) * axes),), vector)


def resnet(key: str, before: int, after: int) -> list[Leaf]:
    """Returns the leaves of a residual block."""
    leaves = [
        gamma(f"{key}.norm1", before),
        *causal(f"{key}.conv1", before, after),
        gamma(f"{key}.norm2", after),
        *causal(f"{key}.conv2", after, after),
    ]
    if before != after:
        shortcut = f"{key}.conv_shortcut"
        leaves += affine(path_of(shortcut), shortcut, (after, before, 1, 1, 1), linear)
    return leaves


def middle(key: str, width: int) -> list[Leaf]:
    """Returns the leaves of the narrowest level: a block, attention, a block."""
    attention = f"{key}.attentions.0"
    return [
        *resnet(f"{key}.resnets.0", width, width),
        gamma(f"{attention}.norm", width, 2),
        *affine(path_of(f"{attention}.to_qkv"), f"{attention}.to_qkv", (3 * width, width, 1, 1)),
        *affine(path_of(f"{attention}.proj"), f"{attention}.proj", (width, width, 1, 1)),
        *resnet(f"{key}.resnets.1", width, width),
    ]


def ends(half: str, width: int, out: int) -> list[Leaf]:
    """Returns the leaves of the last norm and convolution."""
    return [gamma(f"{half}.norm_out", width), *causal(f"{half}.conv_out", width, out)]


# The authors' names of the 2.1 autoencoder and diffusers', for what does not depend on the number of
# blocks in a level.
AUTHORS = (
    (r"\b(en|de)coder\.conv1\b", r"\1coder.conv_in"),
    (r"\b(en|de)coder\.head\.0\b", r"\1coder.norm_out"),
    (r"\b(en|de)coder\.head\.2\b", r"\1coder.conv_out"),
    (r"\b(en|de)coder\.middle\.0\b", r"\1coder.mid_block.resnets.0"),
    (r"\b(en|de)coder\.middle\.1\b", r"\1coder.mid_block.attentions.0"),
    (r"\b(en|de)coder\.middle\.2\b", r"\1coder.mid_block.resnets.1"),
    (r"\bencoder\.downsamples\b", "encoder.down_blocks"),
    (r"\bresidual\.0\b", "norm1"),
    (r"\bresidual\.2\b", "conv1"),
    (r"\bresidual\.3\b", "norm2"),
    (r"\bresidual\.6\b", "conv2"),
    (r"\.shortcut\b", ".conv_shortcut"),
    (r"(?<![\w.])conv1\.", "quant_conv."),
    (r"(?<![\w.])conv2\.", "post_quant_conv."),
)
TO_AUTHORS = (
    (r"(?<![\w.])quant_conv\.", "conv1."),
    (r"(?<![\w.])post_quant_conv\.", "conv2."),
    (r"\.conv_shortcut\b", ".shortcut"),
    (r"\b(en|de)coder\.conv_in\b", r"\1coder.conv1 "),
    (r"\b(en|de)coder\.norm_out\b", r"\1coder.head.0"),
    (r"\b(en|de)coder\.conv_out\b", r"\1coder.head.2"),
    (r"\.norm1\b", ".residual.0"),
    (r"\.conv1\b(?! )", ".residual.2"),
    (r"\.norm2\b", ".residual.3"),
    (r"\.conv2\b", ".residual.6"),
    (r"\.conv1 ", ".conv1"),
    (r"\b(en|de)coder\.mid_block\.resnets\.0\b", r"\1coder.middle.0"),
    (r"\b(en|de)coder\.mid_block\.attentions\.0\b", r"\1coder.middle.1"),
    (r"\b(en|de)coder\.mid_block\.resnets\.1\b", r"\1coder.middle.2"),
    (r"\bencoder\.down_blocks\b", "encoder.downsamples"),
)


def from_authors(state: StateDict) -> StateDict:
    """Returns `state` under diffusers' names: the authors count blocks and samplers on, level by level."""
    per_level = upsamplings_of(state)

    def level(found: re.Match[str]) -> str:
        i, j = divmod(int(found[1]), per_level)
        part = "upsamplers.0" if j == per_level - 1 else f"resnets.{j}"
        return f"decoder.up_blocks.{i}.{part}"

    def rename(text: str) -> str:
        return renamed(re.sub(r"\bdecoder\.upsamples\.(\d+)\b", level, text), AUTHORS)

    return with_names(state, rename)


def upsamplings_of(state: StateDict) -> int:
    """Returns how many of the authors' numbers a level of the decoder has: the first upsampling's, and 1."""
    pattern = re.compile(r"decoder\.upsamples\.(\d+)\.resample\.")
    found = [int(match[1]) for key in state.tensors if (match := pattern.match(key))]
    if not found:
        raise UserError("the decoder has no upsampling (decoder.upsamples.3.resample.1 and so on).")
    return min(found) + 1


def in_authors_names(text: str, state: StateDict) -> str:
    """Returns `text` with the authors' names instead of diffusers'."""
    per_level = block_count(state.tensors, "decoder.up_blocks.0.resnets.") + 1
    return to_authors(text, per_level)


def to_authors(text: str, per_level: int) -> str:
    """Returns `text` in the authors' names, for a decoder of so many numbers in a level."""

    def number(found: re.Match[str]) -> str:
        place = per_level - 1 if found[2] == "upsamplers" else int(found[3])
        return f"decoder.upsamples.{int(found[1]) * per_level + place}"

    pattern = r"\bdecoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\b"
    return renamed(re.sub(pattern, number, text), TO_AUTHORS)


SMALL = {
    "base_dim": 4,
    "decoder_base_dim": 4,
    "z_dim": 16,
    "dim_mult": (1, 2),
    "num_res_blocks": 1,
    "temporal_downsample": (True,),
    "in_channels": 3,
    "out_channels": 3,
    "residual": False,
    "patch_size": 1,
}
LIKE_5B = {
    "dim_mult": (2, 2),
    "z_dim": 6,
    "decoder_base_dim": 6,
    "in_channels": 12,
    "out_channels": 12,
    "residual": True,
    "patch_size": 2,
}


def example_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config.json of an example."""
    same = (
        "base_dim",
        "decoder_base_dim",
        "z_dim",
        "num_res_blocks",
        "in_channels",
        "out_channels",
    )
    return {
        "_class_name": CLASS_NAME,
        **{name: fields[name] for name in same},
        "dim_mult": list(fields["dim_mult"]),
        "temperal_downsample": list(fields["temporal_downsample"]),
        "attn_scales": [],
        "dropout": 0.0,
        "is_residual": fields["residual"],
        "patch_size": fields["patch_size"],
        "latents_mean": [0.1] * fields["z_dim"],
        "latents_std": [2.0] * fields["z_dim"],
    }


def wan_vae_example() -> Example:
    """Returns a small autoencoder of the 2.1 kind, with its config.json."""
    return Example(tuple(vae_leaves(SMALL)), config=example_config(SMALL))


def residual_vae_example() -> Example:
    """Returns a small autoencoder of the kind of the 5B network, with its config.json."""
    fields = {**SMALL, **LIKE_5B}
    return Example(tuple(vae_leaves(fields)), config=example_config(fields))


def authors_vae_example() -> Example:
    """Returns a small autoencoder of the 2.1 kind under the authors' names."""
    per_level = SMALL["num_res_blocks"] + 2
    return Example(tuple(with_sources(vae_leaves(SMALL), lambda t: to_authors(t, per_level))))
