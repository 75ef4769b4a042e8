"""FLUX.2: Black Forest Labs' single file, and diffusers' `Flux2Transformer2DModel`.

Dimensions: D width, C channels of the latents, F hidden channels of an MLP.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qdit_convert.choices import Choices
from qdit_convert.flux import HEAD_DIM, NORMS, SINGLE, in_original
from qdit_convert.image_settings import FLUX2
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
from qdit_convert.plan import Example, Leaf, Plan, block_count, shape_of
from qdit_convert.tensors import StateDict, StoredTensor
from qdit_jax.errors import UserError

CLASS_NAME = "Flux2Transformer2DModel"
ROPE_AXES = (32, 32, 32, 32)  # as published, of heads of 128 channels
LARGEST = 2**16  # more latents than anything fits
SIZE = 64  # rows and columns of latents of 1024 pixels
TEXT_LENGTH = 512
TIME_CHANNELS = 256  # of the sinusoids of time, as published
EMBEDDER = "time_guidance_embed"
# diffusers' names of a double block's layers; those of the text's stream after the bar.
DOUBLE_IN_DIFFUSERS = {
    "attn/qkv": "attn.to_q attn.to_k attn.to_v|attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "attn/proj": "attn.to_out.0|attn.to_add_out",
    "attn/norm/query_norm": "attn.norm_q|attn.norm_added_q",
    "attn/norm/key_norm": "attn.norm_k|attn.norm_added_k",
    "mlp_0": "ff.linear_in|ff_context.linear_in",
    "mlp_2": "ff.linear_out|ff_context.linear_out",
}
SINGLE_IN_DIFFUSERS = {
    "linear1": "attn.to_qkv_mlp_proj",
    "linear2": "attn.to_out",
    "norm/query_norm": "attn.norm_q",
    "norm/key_norm": "attn.norm_k",
}
OUTSIDE_DIFFUSERS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "double_stream_modulation_img/lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt/lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation/lin": "single_stream_modulation.linear",
    "final_layer/linear": "proj_out",
    "final_layer/adaLN_modulation": "norm_out.linear",
} | {
    f"{ours}/{name}": f"{EMBEDDER}.{theirs}_embedder.{linear}"
    for ours, theirs in (("time_in", "timestep"), ("guidance_in", "guidance"))
    for name, linear in (("in_layer", "linear_1"), ("out_layer", "linear_2"))
}


def in_diffusers(path: str) -> tuple[str, ...]:
    """Returns the names of a layer's tensors in diffusers' file."""
    if found := re.fullmatch(r"double_blocks_(\d+)/(img|txt)_(.+)", path):
        number, stream, kind = found.groups()
        names = DOUBLE_IN_DIFFUSERS[kind].split("|")[stream == "txt"]
        return tuple(f"transformer_blocks.{number}.{name}" for name in names.split())
    if found := re.fullmatch(r"single_blocks_(\d+)/(.+)", path):
        number, kind = found.groups()
        return (f"{SINGLE}{number}.{SINGLE_IN_DIFFUSERS[kind]}",)
    return (OUTSIDE_DIFFUSERS[path],)


@dataclass(frozen=True)
class Sizes:
    """The sizes that follow from the shapes of a FLUX.2."""

    depth: int
    single_depth: int
    width: int
    channels: int
    mlp_width: int
    text_width: int
    head_dim: int
    guidance: bool


def is_flux2(state: StateDict) -> bool:
    """Returns whether a file in Black Forest Labs' names is of FLUX.2: blocks share a modulation."""
    return any(key.startswith("single_stream_modulation.") for key in state.tensors)


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
        "in_channels": sizes.channels,
        "out_channels": sizes.channels,
        "joint_attention_dim": sizes.text_width,
        "guidance_embeds": sizes.guidance,
        "num_attention_heads * attention_head_dim": sizes.width,
    }
    settings = checked_config(config, CLASS_NAME, FLUX2, found)
    ratio = settings.get("mlp_ratio")
    if ratio is not None and int(sizes.width * ratio) != sizes.mlp_width:
        raise UserError(
            f"config.json says mlp_ratio = {ratio}, but the weights have MLPs of {sizes.mlp_width} "
            f"channels for a width of {sizes.width}."
        )
    return plan_of(sizes, choices, settings, in_diffusers)


def plan_of(sizes: Sizes, choices: Choices, settings: Mapping[str, Any], naming: Naming) -> Plan:
    """Returns the plan of a network of these sizes."""
    notes: list[str] = []
    heads = choices.num_heads or settings.get("num_attention_heads")
    axes = choices.rope_axes or settings.get("axes_dims_rope")
    time_channels = settings.get("timestep_guidance_channels") or TIME_CHANNELS
    size = SIZE if choices.input_size is None else choices.input_size
    if choices.input_size is None:
        notes.append(f"sample_size taken to be {SIZE}: the network takes others (--input-size)")
    config = {
        "sample_size": sample_size(size, None, LARGEST, 1, notes),
        "in_channels": sizes.channels,
        "out_channels": sizes.channels,
        "hidden_size": sizes.width,
        "depth": sizes.depth,
        "single_depth": sizes.single_depth,
        "num_heads": num_heads(sizes.width, heads, sizes.head_dim, HEAD_DIM, notes),
        "mlp_width": sizes.mlp_width,
        "norm_eps": float(settings.get("eps", 1e-6)),
        "guidance_embed": sizes.guidance,
        "time_channels": time_channels,
        "rope_axes": rope_axes(sizes.head_dim, ROPE_AXES, axes, notes),
        "rope_base": float(settings.get("rope_theta", 2000)),
        "text_width": sizes.text_width,
        "text_length": TEXT_LENGTH,
    }
    notes.append(TEXT_NOTE.format(TEXT_LENGTH))
    leaves = tuple(leaves_of(sizes, naming, time_channels))
    return Plan("flux2", config, leaves, tuple(notes))


def sizes_of(
    tensors: Mapping[str, StoredTensor], naming: Naming, prefixes: tuple[str, str]
) -> Sizes:
    """Returns the sizes of the network from its shapes."""

    def shape(path: str) -> tuple[int, ...]:
        return shape_of(tensors, f"{naming(path)[0]}.weight", 2)

    def mlp_width() -> (
        int
    ):  # of a gated MLP, whose two halves are one layer, beside q, k and v in a single block
        both = shape("double_blocks_0/img_mlp_0") if depth else shape("single_blocks_0/linear1")
        return (both[0] - (0 if depth else 3 * width)) // 2

    depth, single_depth = (block_count(tensors, prefix) for prefix in prefixes)
    if not depth and not single_depth:
        raise UserError(f"there are no blocks {' or '.join(f'{p}0' for p in prefixes)} and so on.")
    width, channels = shape("img_in")[0], shape("final_layer/linear")[0]
    guidance = naming("guidance_in/in_layer")[0].rpartition(".")[0]
    of_head = head_dim(tensors, NORMS)
    if of_head is None:
        raise UserError("there are no norms of queries, which settle the channels of a head.")
    return Sizes(
        depth=depth,
        single_depth=single_depth,
        width=width,
        channels=channels,
        mlp_width=mlp_width(),
        text_width=shape("txt_in")[1],
        head_dim=of_head,
        guidance=any(key.startswith(guidance) for key in tensors),
    )


def leaves_of(sizes: Sizes, naming: Naming, time_channels: int = TIME_CHANNELS) -> list[Leaf]:
    """Returns the leaves of the network, under the names of either layout; no layer has a bias."""
    D, F = sizes.width, sizes.mlp_width
    foreign = naming is in_diffusers
    leaves: list[Leaf] = []

    def add(path: str, rows: int, columns: int = D, swap: bool = False) -> None:
        leaves.extend(layer(path, naming(path), (rows, columns), swap=swap, bias=False))

    def add_norms(path: str) -> None:
        for name in ("query_norm", "key_norm"):
            key = f"{naming(f'{path}/{name}')[0]}.{'weight' if foreign else 'scale'}"
            leaves.append(Leaf(f"{path}/{name}/scale", (key,), ((sizes.head_dim,),)))

    for name in ("time_in", *(["guidance_in"] if sizes.guidance else [])):
        add(f"{name}/in_layer", D, time_channels)
        add(f"{name}/out_layer", D)
    add("img_in", D, sizes.channels)
    add("txt_in", D, sizes.text_width)
    for stream in ("img", "txt"):
        add(f"double_stream_modulation_{stream}/lin", 6 * D)
    add("single_stream_modulation/lin", 3 * D)
    for i in range(sizes.depth):
        for stream in ("img", "txt"):
            block = f"double_blocks_{i}/{stream}"
            add(f"{block}_attn/qkv", 3 * D)
            add_norms(f"{block}_attn/norm")
            add(f"{block}_attn/proj", D)
            add(f"{block}_mlp_0", 2 * F)
            add(f"{block}_mlp_2", D, F)
    for i in range(sizes.single_depth):
        block = f"single_blocks_{i}"
        add(f"{block}/linear1", 3 * D + 2 * F)
        add_norms(f"{block}/norm")
        add(f"{block}/linear2", D, D + F)
    add("final_layer/adaLN_modulation", 2 * D, swap=foreign)
    add("final_layer/linear", sizes.channels)
    return leaves


SMALL = Sizes(
    depth=1,
    single_depth=2,
    width=16,
    channels=8,
    mlp_width=48,
    text_width=12,
    head_dim=8,
    guidance=True,
)


def original_example() -> Example:
    """Returns a small FLUX.2 in Black Forest Labs' layout."""
    choices = {"rope_axes": (2, 2, 2, 2), "input_size": 4}
    return Example(tuple(leaves_of(SMALL, in_original)), choices)


def diffusers_example() -> Example:
    """Returns a small FLUX.2 in diffusers' layout with its config.json."""
    config = {
        "_class_name": CLASS_NAME,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "axes_dims_rope": [2, 2, 2, 2],
        "guidance_embeds": True,
    }
    return Example(tuple(leaves_of(SMALL, in_diffusers)), {"input_size": 4}, config=config)
