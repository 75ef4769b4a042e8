"""Stable Diffusion 3 and 3.5: Stability's single file, and diffusers' `SD3Transformer2DModel`.

Dimensions: D width, C channels, p patch size, M side of the table of positions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qdit_convert.choices import Choices
from qdit_convert.dit import out_channels
from qdit_convert.joint import (
    TEXT_NOTE,
    Naming,
    checked_config,
    head_dim,
    layer,
    num_heads,
    sample_size,
)
from qdit_convert.joint_settings import SD3
from qdit_convert.plan import Example, Leaf, Plan, affine, block_count, convolution, shape_of
from qdit_convert.sizes import mlp_ratio
from qdit_convert.tensors import StateDict, StoredTensor
from qdit_jax.errors import UserError

CLASS_NAME = "SD3Transformer2DModel"
HEAD_DIM = 64  # of every published size
TEXT_LENGTH = 333  # rows of the published pipeline: 77 of CLIP, 256 of T5
EMBEDDER = "time_text_embed"
NORMS = re.compile(r"\.(ln_[qk]|norm_(added_)?[qk])\.weight$")
# diffusers' names of a block's layers; those of the text's stream after the bar.
IN_DIFFUSERS = {
    "adaLN_modulation": "norm1.linear|norm1_context.linear",
    "attn/qkv": "attn.to_q attn.to_k attn.to_v|attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "attn/proj": "attn.to_out.0|attn.to_add_out",
    "attn/ln_q": "attn.norm_q|attn.norm_added_q",
    "attn/ln_k": "attn.norm_k|attn.norm_added_k",
    "attn2/qkv": "attn2.to_q attn2.to_k attn2.to_v",
    "attn2/proj": "attn2.to_out.0",
    "attn2/ln_q": "attn2.norm_q",
    "attn2/ln_k": "attn2.norm_k",
    "mlp/fc1": "ff.net.0.proj|ff_context.net.0.proj",
    "mlp/fc2": "ff.net.2|ff_context.net.2",
}
OUTSIDE_DIFFUSERS = {
    "pos_embed": "pos_embed.pos_embed",
    "x_embedder/proj": "pos_embed.proj",
    "t_embedder/mlp_0": f"{EMBEDDER}.timestep_embedder.linear_1",
    "t_embedder/mlp_2": f"{EMBEDDER}.timestep_embedder.linear_2",
    "y_embedder/mlp_0": f"{EMBEDDER}.text_embedder.linear_1",
    "y_embedder/mlp_2": f"{EMBEDDER}.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer/linear": "proj_out",
    "final_layer/adaLN_modulation": "norm_out.linear",
}


def in_original(path: str) -> tuple[str, ...]:
    """Returns the name of a layer's tensors in Stability's file."""
    name = re.sub(r"_(\d+)(?=/|$)", r".\1", path).replace("/", ".")
    return (name.replace("adaLN_modulation", "adaLN_modulation.1"),)


def in_diffusers(path: str) -> tuple[str, ...]:
    """Returns the names of a layer's tensors in diffusers' file."""
    found = re.fullmatch(r"joint_blocks_(\d+)/(x|context)_block/(.+)", path)
    if found is None:
        return (OUTSIDE_DIFFUSERS[path],)
    number, stream, kind = found.groups()
    names = IN_DIFFUSERS[kind].split("|")[stream == "context"]
    return tuple(f"transformer_blocks.{number}.{name}" for name in names.split())


@dataclass(frozen=True)
class Sizes:
    """The sizes that follow from the shapes of an SD3."""

    depth: int
    width: int
    patch_size: int
    in_channels: int
    out_channels: int
    mlp_width: int
    side: int
    text_width: int
    pooled_width: int
    head_dim: int | None
    dual_blocks: tuple[int, ...]


def original_plan(state: StateDict, choices: Choices, _: Mapping[str, Any] | None) -> Plan:
    """Returns the plan for Stability's file."""
    sizes = sizes_of(state.tensors, in_original, "joint_blocks.")
    return plan_of(sizes, choices, {}, in_original)


def diffusers_plan(state: StateDict, choices: Choices, config: Mapping[str, Any] | None) -> Plan:
    """Returns the plan for diffusers' file; `config` is its config.json, if there is one."""
    sizes = sizes_of(state.tensors, in_diffusers, "transformer_blocks.")
    found = {
        "num_layers": sizes.depth,
        "in_channels": sizes.in_channels,
        "out_channels": sizes.out_channels,
        "joint_attention_dim": sizes.text_width,
        "pooled_projection_dim": sizes.pooled_width,
        "caption_projection_dim": sizes.width,
        "pos_embed_max_size": sizes.side,
        "patch_size": sizes.patch_size,
        "num_attention_heads * attention_head_dim": sizes.width,
        "dual_attention_layers": list(sizes.dual_blocks),
    }
    settings = checked_config(config, CLASS_NAME, SD3, found)
    if config is not None and (settings["qk_norm"] is None) != (sizes.head_dim is None):
        has = "none" if sizes.head_dim is None else "some"
        raise UserError(
            f"config.json says qk_norm = {settings['qk_norm']!r}, but the weights have {has} of its "
            "norms."
        )
    return plan_of(sizes, choices, settings, in_diffusers)


def plan_of(sizes: Sizes, choices: Choices, settings: Mapping[str, Any], naming: Naming) -> Plan:
    """Returns the plan of a network of these sizes."""
    notes: list[str] = []
    stated = choices.num_heads or settings.get("num_attention_heads")
    limit = sizes.side * sizes.patch_size
    config = {
        "sample_size": sample_size(
            choices.input_size, settings.get("sample_size"), limit, sizes.patch_size, notes
        ),
        "patch_size": sizes.patch_size,
        "in_channels": sizes.in_channels,
        "out_channels": sizes.out_channels,
        "hidden_size": sizes.width,
        "depth": sizes.depth,
        "num_heads": num_heads(sizes.width, stated, sizes.head_dim, HEAD_DIM, notes),
        "mlp_ratio": mlp_ratio(sizes.mlp_width, sizes.width),
        "dual_blocks": sizes.dual_blocks,
        "qk_norm": sizes.head_dim is not None,
        "pos_embed_max_size": sizes.side,
        "text_width": sizes.text_width,
        "pooled_width": sizes.pooled_width,
        "text_length": TEXT_LENGTH,
    }
    notes.append(TEXT_NOTE.format(TEXT_LENGTH))
    return Plan("sd3", config, tuple(leaves_of(sizes, naming)), tuple(notes))


def sizes_of(tensors: Mapping[str, StoredTensor], naming: Naming, prefix: str) -> Sizes:
    """Returns the sizes of the network from its shapes."""

    def shape(path: str, rank: int, suffix: str = ".weight") -> tuple[int, ...]:
        return shape_of(tensors, f"{naming(path)[0]}{suffix}", rank)

    depth = block_count(tensors, prefix)
    if depth == 0:
        raise UserError(f"there are no blocks ({naming('joint_blocks_0/x_block/mlp/fc1')[0]}...).")
    width, in_channels, patch, _ = shape("x_embedder/proj", 4)
    positions = shape("pos_embed", 3, "")[1]
    if (side := math.isqrt(positions)) ** 2 != positions:
        raise UserError(f"the table has {positions} positions, which make no square.")
    out = out_channels(shape("final_layer/linear", 2)[0], patch)
    if out != in_channels:
        raise UserError(
            f"the network has {out} output channels for {in_channels} input channels; one that makes "
            "pictures from a prompt has as many."
        )
    return Sizes(
        depth=depth,
        width=width,
        patch_size=patch,
        in_channels=in_channels,
        out_channels=out,
        mlp_width=shape("joint_blocks_0/x_block/mlp/fc1", 2)[0],
        side=side,
        text_width=shape("context_embedder", 2)[1],
        pooled_width=shape("y_embedder/mlp_0", 2)[1],
        head_dim=head_dim(tensors, NORMS),
        dual_blocks=tuple(
            i
            for i in range(depth)
            if any(key.startswith(f"{prefix}{i}.") and ".attn2." in key for key in tensors)
        ),
    )


def leaves_of(sizes: Sizes, naming: Naming) -> list[Leaf]:
    """Returns the leaves of the network, under the names of either layout."""
    D, p, mlp = sizes.width, sizes.patch_size, sizes.mlp_width
    foreign = naming is in_diffusers
    x_embedder = (D, sizes.in_channels, p, p)
    leaves = [
        Leaf("pos_embed", naming("pos_embed"), ((1, sizes.side**2, D),)),
        *affine("x_embedder/proj", naming("x_embedder/proj")[0], x_embedder, convolution),
    ]

    def add(path: str, rows: int, columns: int = D, swap: bool = False) -> None:
        leaves.extend(layer(path, naming(path), (rows, columns), swap=swap))

    for embedder, columns in (("t_embedder", 256), ("y_embedder", sizes.pooled_width)):
        add(f"{embedder}/mlp_0", D, columns)
        add(f"{embedder}/mlp_2", D)
    add("context_embedder", D, sizes.text_width)
    for i in range(sizes.depth):
        for stream in ("x_block", "context_block"):
            block = f"joint_blocks_{i}/{stream}"
            is_last = stream == "context_block" and i == sizes.depth - 1
            is_dual = stream == "x_block" and i in sizes.dual_blocks
            chunks = 2 if is_last else 9 if is_dual else 6
            add(f"{block}/adaLN_modulation", chunks * D, swap=foreign and is_last)
            for attn in ("attn", "attn2")[: 1 + is_dual]:
                add(f"{block}/{attn}/qkv", 3 * D)
                if not is_last:
                    add(f"{block}/{attn}/proj", D)
                if sizes.head_dim is not None:
                    for norm in ("ln_q", "ln_k"):
                        key = f"{naming(f'{block}/{attn}/{norm}')[0]}.weight"
                        path = f"{block}/{attn}/{norm}/scale"
                        leaves.append(Leaf(path, (key,), ((sizes.head_dim,),)))
            if not is_last:
                add(f"{block}/mlp/fc1", mlp)
                add(f"{block}/mlp/fc2", D, mlp)
    add("final_layer/adaLN_modulation", 2 * D, swap=foreign)
    add("final_layer/linear", p * p * sizes.out_channels)
    return leaves


SMALL = Sizes(
    depth=2,
    width=16,
    patch_size=2,
    in_channels=4,
    out_channels=4,
    mlp_width=64,
    side=3,
    text_width=12,
    pooled_width=6,
    head_dim=8,
    dual_blocks=(0,),
)


def original_example() -> Example:
    """Returns a small SD3.5 in Stability's layout."""
    return Example(tuple(leaves_of(SMALL, in_original)), {"input_size": 4})


def diffusers_example() -> Example:
    """Returns a small SD3.5 in diffusers' layout with its config.json."""
    config = {
        "_class_name": CLASS_NAME,
        "sample_size": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "dual_attention_layers": [0],
        "qk_norm": "rms_norm",
        "pos_embed_max_size": SMALL.side,
    }
    return Example(tuple(leaves_of(SMALL, in_diffusers)), config=config)
