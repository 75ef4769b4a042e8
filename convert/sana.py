"""Sana: the authors' file, and diffusers' `SanaTransformer2DModel`.

Dimensions: D width, p patch size, C channels of the latents, F channels of a gated convolution, E
channels of text, X channels of all heads of the attention on the text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qdit_convert.choices import Choices
from qdit_convert.dit import out_channels
from qdit_convert.image_settings import SANA
from qdit_convert.joint import Naming, layer
from qdit_convert.pixart import has
from qdit_convert.plan import (
    Example,
    Leaf,
    Plan,
    block_count,
    convolution,
    shape_of,
)
from qdit_convert.settings import network_settings
from qdit_convert.sizes import check_channels
from qdit_convert.tensors import StateDict, StoredTensor
from qdit_jax.errors import UserError

CLASS_NAME = "SanaTransformer2DModel"
HEAD_DIM = 32  # of the linear attention, in every published size
CROSS_HEADS = {2240: 20, 1152: 16}  # width -> heads of the attention on the text, as published
SIZE = 32  # rows and columns of latents of 1024 pixels
TEXT_LENGTH = 300
# Beside the weights in the authors' file: of training, and positions that no published network adds.
LEFT = frozenset(["y_embedder.y_embedding", "pos_embed"])
GUIDED = (
    "guidance is embedded, as in Sana-Sprint, whose own sampler (of trigonometric consistency) is not "
    "here: calls are its own, but the samplers of a flow do not draw its pictures"
)
TABLE = "scale_shift_table"
OUTSIDE_DIFFUSERS = {
    "x_embedder/proj": "patch_embed.proj",
    "t_block": "time_embed.linear",
    "y_embedder/y_proj/fc1": "caption_projection.linear_1",
    "y_embedder/y_proj/fc2": "caption_projection.linear_2",
    "attention_y_norm": "caption_norm",
    "final_layer/linear": "proj_out",
}
IN_DIFFUSERS = {
    "attn/qkv": "attn1.to_q attn1.to_k attn1.to_v",
    "attn/proj": "attn1.to_out.0",
    "attn/q_norm": "attn1.norm_q",
    "attn/k_norm": "attn1.norm_k",
    "cross_attn/q_linear": "attn2.to_q",
    "cross_attn/kv_linear": "attn2.to_k attn2.to_v",
    "cross_attn/proj": "attn2.to_out.0",
    "cross_attn/q_norm": "attn2.norm_q",
    "cross_attn/k_norm": "attn2.norm_k",
    "mlp/inverted_conv": "ff.conv_inverted",
    "mlp/depth_conv": "ff.conv_depth",
    "mlp/point_conv": "ff.conv_point",
}


def in_original(path: str) -> tuple[str, ...]:
    """Returns the name of a layer's tensors in the authors' file."""
    name = re.sub(r"_(\d+)(?=/|$)", r".\1", path).replace("/", ".")
    name = re.sub(r"((inverted|depth|point)_conv)$", r"\1.conv", name)
    return (re.sub(r"^t_block$", "t_block.1", name),)


def in_diffusers(guidance: bool) -> Naming:
    """Returns the function that names a layer's tensors in diffusers' file."""
    embedder = "time_embed" if guidance else "time_embed.emb"
    outside = OUTSIDE_DIFFUSERS | {
        f"{ours}_embedder/mlp_{i}": f"{embedder}.{theirs}_embedder.linear_{1 + i // 2}"
        for ours, theirs in (("t", "timestep"), ("guidance", "guidance"))
        for i in (0, 2)
    }

    def naming(path: str) -> tuple[str, ...]:
        if found := re.fullmatch(r"blocks_(\d+)/(.+)", path):
            names = IN_DIFFUSERS[found[2]].split()
            return tuple(f"transformer_blocks.{found[1]}.{name}" for name in names)
        return (outside[path],)

    return naming


@dataclass(frozen=True)
class Sizes:
    """The sizes that follow from the shapes of a Sana."""

    depth: int
    width: int
    patch_size: int
    in_channels: int
    out_channels: int
    mlp_width: int
    text_width: int
    cross_width: int
    qk_norm: bool = False
    guidance: bool = False
    qkv_bias: bool = False


def original_plan(state: StateDict, choices: Choices, _: Mapping[str, Any] | None) -> Plan:
    """Returns the plan for the authors' file."""
    sizes = sizes_of(state.tensors, in_original, "blocks.")
    return plan_of(sizes, choices, None, in_original)


def diffusers_plan(state: StateDict, choices: Choices, config: Mapping[str, Any] | None) -> Plan:
    """Returns the plan for diffusers' file; `config` is its config.json, if there is one."""
    naming = in_diffusers(has(state.tensors, r"time_embed\.guidance_embedder\."))
    sizes = sizes_of(state.tensors, naming, "transformer_blocks.")
    settings = None if config is None else checked(config, sizes)
    if settings is not None and settings["caption_channels"] is not None:
        sizes = replace(sizes, text_width=settings["caption_channels"])
    return plan_of(sizes, choices, settings, naming)


def sizes_of(tensors: Mapping[str, StoredTensor], naming: Naming, blocks: str) -> Sizes:
    """Returns the sizes of the network from its shapes."""

    def shape(path: str, rank: int = 2) -> tuple[int, ...]:
        return shape_of(tensors, f"{naming(path)[0]}.weight", rank)

    depth = block_count(tensors, blocks)
    if not depth:
        raise UserError(f"there are no blocks ({blocks}0.{TABLE} and so on).")
    width, in_channels, patch, _ = shape("x_embedder/proj", 4)
    return Sizes(
        depth=depth,
        width=width,
        patch_size=patch,
        in_channels=in_channels,
        out_channels=out_channels(shape("final_layer/linear")[0], patch),
        mlp_width=shape("blocks_0/mlp/point_conv", 4)[1],
        text_width=shape("y_embedder/y_proj/fc1")[1],
        cross_width=shape("blocks_0/cross_attn/q_linear")[0],
        qk_norm=has(tensors, r".*\.([qk]_norm|norm_[qk])\."),
        guidance=has(tensors, r"(time_embed\.)?guidance_embedder\."),
        qkv_bias=has(tensors, r"(transformer_)?blocks\.\d+\.attn1?\.(qkv|to_[qkv])\.bias$"),
    )


def checked(config: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """Returns the settings of a config.json that fits the weights.

    Raises:
        UserError: if it is of another class, is not understood, or contradicts the weights.
    """
    says = network_settings(config, SANA, [CLASS_NAME])

    def product(*names: str) -> int | None:
        numbers = [says[name] for name in names]
        return None if None in numbers else math.prod(numbers)

    norms = None if "qk_norm" not in config else says["qk_norm"] is not None
    ratio = says["mlp_ratio"]
    stated = {
        "num_layers": (says["num_layers"], sizes.depth),
        "num_attention_heads * attention_head_dim": (
            product("num_attention_heads", "attention_head_dim"),
            sizes.width,
        ),
        "num_cross_attention_heads * cross_attention_head_dim": (
            product("num_cross_attention_heads", "cross_attention_head_dim"),
            sizes.cross_width,
        ),
        "cross_attention_dim": (says["cross_attention_dim"], sizes.width),
        "patch_size": (says["patch_size"], sizes.patch_size),
        "in_channels": (says["in_channels"], sizes.in_channels),
        "out_channels": (says["out_channels"], sizes.out_channels),
        "mlp_ratio * width": (ratio and int(ratio * sizes.width), sizes.mlp_width),
        "attention_bias": (says["attention_bias"], sizes.qkv_bias),
        "guidance_embeds": (says["guidance_embeds"], sizes.guidance),
        "qk_norm": (norms, sizes.qk_norm),
    }
    for key, (said, found) in stated.items():
        if said is not None and said != found:
            raise UserError(f"config.json says {key} = {said}, but the weights have {found}.")
    return says


def plan_of(
    sizes: Sizes, choices: Choices, settings: Mapping[str, Any] | None, naming: Naming
) -> Plan:
    """Returns the plan of a network of these sizes."""
    notes: list[str] = []
    check_channels(sizes.in_channels, sizes.out_channels)
    says = settings or {}
    heads, cross_heads = heads_of(sizes, choices, says, notes)
    scale = choices.interpolation_scale or says.get("interpolation_scale")
    if settings is None:
        told = (
            f"are divided by {scale:g}"
            if scale
            else "are not added, as in all but that of 4096 pixels"
        )
        notes.append(
            f"positions {told} (--interpolation-scale, 2 of that one): no config.json says it"
        )
    if sizes.guidance:
        notes.append(GUIDED)
    fields = {
        "sample_size": latent_size(sizes, choices, says, notes),
        "interpolation_scale": None if scale is None else float(scale),
        "patch_size": sizes.patch_size,
        "in_channels": sizes.in_channels,
        "hidden_size": sizes.width,
        "depth": sizes.depth,
        "num_heads": heads,
        "num_cross_heads": cross_heads,
        "cross_width": sizes.cross_width,
        "mlp_width": sizes.mlp_width,
        "norm_eps": float(says.get("norm_eps", 1e-6)),
        "qk_norm": sizes.qk_norm,
        "guidance_embed": sizes.guidance,
        "guidance_unit": float(says.get("guidance_embeds_scale", 0.1)) if sizes.guidance else 1.0,
        "timestep_scale": float(says.get("timestep_scale", 1.0)),
        "learn_sigma": sizes.out_channels == 2 * sizes.in_channels,
        "text_width": sizes.text_width,
        "text_length": TEXT_LENGTH,
    }
    notes.append(
        f"examples and costs count {TEXT_LENGTH} rows of text; texts of any length are taken"
    )
    return Plan("sana", fields, tuple(leaves_of(sizes, naming)), tuple(notes), LEFT)


def heads_of(
    sizes: Sizes, choices: Choices, says: Mapping[str, Any], notes: list[str]
) -> tuple[int, int]:
    """Returns the heads of the linear attention, and of that on the text.

    Raises:
        UserError: if nothing says them, or they do not divide their widths.
    """
    heads = says.get("num_attention_heads")
    if heads is None and sizes.width % HEAD_DIM == 0:
        heads = sizes.width // HEAD_DIM
        notes.append(f"{heads} heads of the linear attention, of {HEAD_DIM} channels as published")
    cross = choices.num_heads or says.get("num_cross_attention_heads")
    if cross is None and sizes.width in CROSS_HEADS:
        cross = CROSS_HEADS[sizes.width]
        notes.append(f"{cross} heads of the attention on the text, as published for this width")
    if heads is None or cross is None:
        what = "the linear attention: give its config.json"
        if heads is not None:
            what = "the attention on the text: pass --num-heads"
        raise UserError(
            f"a width of {sizes.width} is of no published Sana, and shapes cannot tell the heads of "
            f"{what}."
        )
    if sizes.width % heads or sizes.cross_width % cross:
        raise UserError(
            f"{heads} heads of {sizes.width} channels and {cross} on the text of {sizes.cross_width}: "
            "each must divide its channels."
        )
    return heads, cross


def latent_size(sizes: Sizes, choices: Choices, says: Mapping[str, Any], notes: list[str]) -> int:
    """Returns the rows and columns of latents that the network was trained for."""
    size = choices.input_size or says.get("sample_size")
    if size is None:
        notes.append(f"sample_size taken to be {SIZE}: the network takes others (--input-size)")
        size = SIZE
    if not isinstance(size, int) or size < 1 or size % sizes.patch_size:
        raise UserError(
            f"input_size={size} of a Sana: give one number that its patches of {sizes.patch_size} "
            "divide, rows and columns of the squares that it was trained on."
        )
    return size


def leaves_of(sizes: Sizes, naming: Naming) -> list[Leaf]:
    """Returns the leaves of the network, under the names of either layout."""
    D, X, F, C, p = (
        sizes.width,
        sizes.cross_width,
        sizes.mlp_width,
        sizes.in_channels,
        sizes.patch_size,
    )
    leaves: list[Leaf] = []

    def add(path: str, shape: tuple[int, ...], bias: bool = True) -> None:
        leaves.extend(layer(path, naming(path), shape, bias=bias))

    def add_norm(path: str, width: int) -> None:
        leaves.append(Leaf(f"{path}/scale", (f"{naming(path)[0]}.weight",), ((width,),)))

    foreign = naming is not in_original
    leaves += convolved("x_embedder/proj", naming, (D, C, p, p), "kernel")
    for name in ("t_embedder", *(["guidance_embedder"] if sizes.guidance else [])):
        add(f"{name}/mlp_0", (D, 256))
        add(f"{name}/mlp_2", (D, D))
    add("t_block", (6 * D, D))
    add("y_embedder/y_proj/fc1", (D, sizes.text_width))
    add("y_embedder/y_proj/fc2", (D, D))
    add_norm("attention_y_norm", D)
    for i in range(sizes.depth):
        block = f"blocks_{i}"
        key = f"transformer_blocks.{i}.{TABLE}" if foreign else f"blocks.{i}.{TABLE}"
        leaves.append(Leaf(f"{block}/{TABLE}", (key,), ((6, D),)))
        add(f"{block}/attn/qkv", (3 * D, D), bias=sizes.qkv_bias)
        add(f"{block}/attn/proj", (D, D))
        add(f"{block}/cross_attn/q_linear", (X, D))
        add(f"{block}/cross_attn/kv_linear", (2 * X, D))
        add(f"{block}/cross_attn/proj", (D, X))
        if sizes.qk_norm:
            for name, width in (("attn", D), ("cross_attn", X)):
                add_norm(f"{block}/{name}/q_norm", width)
                add_norm(f"{block}/{name}/k_norm", width)
        add(f"{block}/mlp/inverted_conv", (2 * F, D, 1, 1))
        leaves += convolved(f"{block}/mlp/depth_conv", naming, (2 * F, 1, 3, 3), "filter")
        add(f"{block}/mlp/point_conv", (D, F, 1, 1), bias=False)
    key = TABLE if foreign else f"final_layer.{TABLE}"
    leaves.append(Leaf(f"final_layer/{TABLE}", (key,), ((2, D),)))
    add("final_layer/linear", (p * p * sizes.out_channels, D))
    return leaves


def convolved(path: str, naming: Naming, shape: tuple[int, ...], name: str) -> list[Leaf]:
    """Returns the leaves of a convolution, the weight called `name`."""
    (key,) = naming(path)
    return [
        Leaf(f"{path}/{name}", (f"{key}.weight",), (shape,), convolution),
        Leaf(f"{path}/bias", (f"{key}.bias",), (shape[:1],)),
    ]


SMALL = Sizes(
    depth=2,
    width=24,
    patch_size=1,
    in_channels=4,
    out_channels=4,
    mlp_width=60,
    text_width=10,
    cross_width=24,
    qk_norm=True,
)
# The authors' file says no heads: those of the linear attention have 32 channels.
AS_AUTHORS = replace(SMALL, width=32, cross_width=32)


def original_example() -> Example:
    """Returns a small Sana in the authors' layout."""
    choices = {"input_size": 4, "num_heads": 2}
    return Example(tuple(leaves_of(AS_AUTHORS, in_original)), choices)


def diffusers_example() -> Example:
    """Returns a small Sana in diffusers' layout with its config.json."""
    config = {
        "_class_name": CLASS_NAME,
        "num_attention_heads": 3,
        "attention_head_dim": 8,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 12,
        "cross_attention_dim": 24,
        "caption_channels": 10,
        "sample_size": 4,
        "qk_norm": "rms_norm_across_heads",
    }
    return Example(tuple(leaves_of(SMALL, in_diffusers(False))), config=config)
