"""FLUX.1: Black Forest Labs' single file, and diffusers' `FluxTransformer2DModel`.

Dimensions: D width, C channels of the latents.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qdit_convert.choices import Choices
from qdit_convert.joint import (
    TEXT_NOTE,
    Naming,
    checked_config,
    head_dim,
    layer,
    num_heads,
    rope_axes,
    sample_size,
)
from qdit_convert.joint_settings import FLUX
from qdit_convert.plan import Example, Leaf, Plan, block_count, shape_of
from qdit_convert.sizes import mlp_ratio
from qdit_convert.tensors import StateDict, StoredTensor
from qdit_jax.errors import UserError

CLASS_NAME = "FluxTransformer2DModel"
SINGLE = "single_transformer_blocks."
# What only FLUX's files have, of those with diffusers' names of joint attention.
ITS_OWN = (SINGLE, "x_embedder.")
HEAD_DIM = 128  # of every published size
ROPE_AXES = (16, 56, 56)  # as published, of heads of 128 channels
PATCH = 2  # rows and columns of latents in one token
LARGEST = 2**16  # more latents than anything fits
EMBEDDER = "time_text_embed"
NORMS = re.compile(r"\.((query|key)_norm\.scale|norm_(added_)?[qk]\.weight)$")
# diffusers' names of a double block's layers; those of the text's stream after the bar.
DOUBLE_IN_DIFFUSERS = {
    "mod/lin": "norm1.linear|norm1_context.linear",
    "attn/qkv": "attn.to_q attn.to_k attn.to_v|attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "attn/proj": "attn.to_out.0|attn.to_add_out",
    "attn/norm/query_norm": "attn.norm_q|attn.norm_added_q",
    "attn/norm/key_norm": "attn.norm_k|attn.norm_added_k",
    "mlp_0": "ff.net.0.proj|ff_context.net.0.proj",
    "mlp_2": "ff.net.2|ff_context.net.2",
}
SINGLE_IN_DIFFUSERS = {
    "modulation/lin": "norm.linear",
    "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
    "linear2": "proj_out",
    "norm/query_norm": "attn.norm_q",
    "norm/key_norm": "attn.norm_k",
}
OUTSIDE_DIFFUSERS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer/linear": "proj_out",
    "final_layer/adaLN_modulation": "norm_out.linear",
} | {
    f"{ours}/{layer}": f"{EMBEDDER}.{theirs}_embedder.{name}"
    for ours, theirs in (
        ("time_in", "timestep"),
        ("vector_in", "text"),
        ("guidance_in", "guidance"),
    )
    for layer, name in (("in_layer", "linear_1"), ("out_layer", "linear_2"))
}


def in_original(path: str) -> tuple[str, ...]:
    """Returns the name of a layer's tensors in Black Forest Labs' file."""
    name = re.sub(r"_(\d+)(?=/|$)", r".\1", path).replace("/", ".")
    return (name.replace("adaLN_modulation", "adaLN_modulation.1"),)


def in_diffusers(path: str) -> tuple[str, ...]:
    """Returns the names of a layer's tensors in diffusers' file."""
    if found := re.fullmatch(r"double_blocks_(\d+)/(img|txt)_(.+)", path):
        number, stream, kind = found.groups()
        names = DOUBLE_IN_DIFFUSERS[kind].split("|")[stream == "txt"]
        return tuple(f"transformer_blocks.{number}.{name}" for name in names.split())
    if found := re.fullmatch(r"single_blocks_(\d+)/(.+)", path):
        number, kind = found.groups()
        return tuple(f"{SINGLE}{number}.{name}" for name in SINGLE_IN_DIFFUSERS[kind].split())
    return (OUTSIDE_DIFFUSERS[path],)


@dataclass(frozen=True)
class Sizes:
    """The sizes that follow from the shapes of a FLUX."""

    depth: int
    single_depth: int
    width: int
    in_channels: int
    out_channels: int
    mlp_width: int
    text_width: int
    pooled_width: int
    head_dim: int
    guidance: bool


def is_flux(state: StateDict) -> bool:
    """Returns whether a file in diffusers' names of joint attention is a FLUX."""
    return any(key.startswith(ITS_OWN) for key in state.tensors)


def original_plan(state: StateDict, choices: Choices, _: Mapping[str, Any] | None) -> Plan:
    """Returns the plan for Black Forest Labs' file."""
    sizes = sizes_of(state.tensors, in_original, ("double_blocks.", "single_blocks."))
    return plan_of(sizes, choices, {}, in_original)


def diffusers_plan(state: StateDict, choices: Choices, config: Mapping[str, Any] | None) -> Plan:
    """Returns the plan for diffusers' file; `config` is its config.json, if there is one."""
    sizes = sizes_of(state.tensors, in_diffusers, ("transformer_blocks.", SINGLE))
    found = {
        "num_layers": sizes.depth,
        "num_single_layers": sizes.single_depth,
        "in_channels": sizes.in_channels * PATCH**2,
        "out_channels": sizes.out_channels * PATCH**2,
        "joint_attention_dim": sizes.text_width,
        "pooled_projection_dim": sizes.pooled_width,
        "guidance_embeds": sizes.guidance,
        "num_attention_heads * attention_head_dim": sizes.width,
    }
    settings = checked_config(config, CLASS_NAME, FLUX, found)
    return plan_of(sizes, choices, settings, in_diffusers)


def plan_of(sizes: Sizes, choices: Choices, settings: Mapping[str, Any], naming: Naming) -> Plan:
    """Returns the plan of a network of these sizes."""
    notes: list[str] = []
    stated = choices.num_heads or settings.get("num_attention_heads")
    config = {
        "sample_size": sample_size(choices.input_size, None, LARGEST, PATCH, notes),
        "in_channels": sizes.in_channels,
        "out_channels": sizes.out_channels,
        "hidden_size": sizes.width,
        "depth": sizes.depth,
        "single_depth": sizes.single_depth,
        "num_heads": num_heads(sizes.width, stated, sizes.head_dim, HEAD_DIM, notes),
        "mlp_ratio": mlp_ratio(sizes.mlp_width, sizes.width),
        "guidance_embed": sizes.guidance,
        "rope_axes": rope_axes(
            sizes.head_dim, ROPE_AXES, choices.rope_axes or settings.get("axes_dims_rope"), notes
        ),
        "text_width": sizes.text_width,
        "pooled_width": sizes.pooled_width,
        "text_length": 512 if sizes.guidance else 256,
    }
    notes.append(TEXT_NOTE.format(config["text_length"]))
    return Plan("flux", config, tuple(leaves_of(sizes, naming)), tuple(notes))


def sizes_of(
    tensors: Mapping[str, StoredTensor], naming: Naming, prefixes: tuple[str, str]
) -> Sizes:
    """Returns the sizes of the network from its shapes."""

    def shape(path: str) -> tuple[int, ...]:
        return shape_of(tensors, f"{naming(path)[0]}.weight", 2)

    def single_mlp() -> int:  # beside q, k and v
        names = naming("single_blocks_0/linear1")
        return sum(shape_of(tensors, f"{name}.weight", 2)[0] for name in names)

    depth, single_depth = (block_count(tensors, prefix) for prefix in prefixes)
    if not depth and not single_depth:
        raise UserError(f"there are no blocks {' or '.join(f'{p}0' for p in prefixes)} and so on.")
    width, features = shape("img_in")
    out = shape("final_layer/linear")[0]
    if out % PATCH**2 or (features > out and features % PATCH**2 == 0):
        raise UserError(
            f"a token has {features} channels on the way in and {out} on the way out; a FLUX.1 that "
            "makes pictures from a prompt (dev, schnell) has as many of both, four latents' (its "
            "variants for filling, depth and edges are not supported)."
        )
    channels = head_dim(tensors, NORMS)
    if channels is None:
        raise UserError("there are no norms of queries, which settle the channels of a head.")
    return Sizes(
        depth=depth,
        single_depth=single_depth,
        width=width,
        in_channels=out // PATCH**2,
        out_channels=out // PATCH**2,
        mlp_width=shape("double_blocks_0/img_mlp_0")[0] if depth else single_mlp() - 3 * width,
        text_width=shape("txt_in")[1],
        pooled_width=shape("vector_in/in_layer")[1],
        head_dim=channels,
        guidance=any(key.startswith(naming("guidance_in/in_layer")[0]) for key in tensors),
    )


def leaves_of(sizes: Sizes, naming: Naming) -> list[Leaf]:
    """Returns the leaves of the network, under the names of either layout."""
    D, mlp = sizes.width, sizes.mlp_width
    foreign = naming is in_diffusers
    leaves: list[Leaf] = []

    def add(path: str, rows: int, columns: int = D, **more: Any) -> None:
        leaves.extend(layer(path, naming(path), (rows, columns), **more))

    def add_norms(path: str) -> None:
        for name in ("query_norm", "key_norm"):
            key = f"{naming(f'{path}/{name}')[0]}.{'weight' if foreign else 'scale'}"
            leaves.append(Leaf(f"{path}/{name}/scale", (key,), ((sizes.head_dim,),)))

    embedders = {"time_in": 256, "vector_in": sizes.pooled_width}
    for name, columns in (embedders | ({"guidance_in": 256} if sizes.guidance else {})).items():
        add(f"{name}/in_layer", D, columns)
        add(f"{name}/out_layer", D)
    add("img_in", D, sizes.in_channels * PATCH**2)
    add("txt_in", D, sizes.text_width)
    for i in range(sizes.depth):
        for stream in ("img", "txt"):
            block = f"double_blocks_{i}/{stream}"
            add(f"{block}_mod/lin", 6 * D)
            add(f"{block}_attn/qkv", 3 * D)
            add_norms(f"{block}_attn/norm")
            add(f"{block}_attn/proj", D)
            add(f"{block}_mlp_0", mlp)
            add(f"{block}_mlp_2", D, mlp)
    for i in range(sizes.single_depth):
        block = f"single_blocks_{i}"
        add(f"{block}/modulation/lin", 3 * D)
        add(f"{block}/linear1", 3 * D + mlp, parts=(D, D, D, mlp))
        add_norms(f"{block}/norm")
        add(f"{block}/linear2", D, D + mlp)
    add("final_layer/adaLN_modulation", 2 * D, swap=foreign)
    add("final_layer/linear", sizes.out_channels * PATCH**2)
    return leaves


SMALL = Sizes(
    depth=1,
    single_depth=2,
    width=16,
    in_channels=4,
    out_channels=4,
    mlp_width=64,
    text_width=12,
    pooled_width=6,
    head_dim=8,
    guidance=True,
)


def original_example() -> Example:
    """Returns a small FLUX in Black Forest Labs' layout."""
    choices = {"rope_axes": (2, 4, 2), "input_size": 4}
    return Example(tuple(leaves_of(SMALL, in_original)), choices)


def diffusers_example() -> Example:
    """Returns a small FLUX in diffusers' layout with its config.json."""
    config = {
        "_class_name": CLASS_NAME,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "axes_dims_rope": [2, 4, 2],
        "guidance_embeds": True,
    }
    return Example(tuple(leaves_of(SMALL, in_diffusers)), {"input_size": 4}, config=config)
