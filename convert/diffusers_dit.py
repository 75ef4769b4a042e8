"""The layout of diffusers' class-conditional DiT (`DiTTransformer2DModel`).

Differs from the facebook layout: q, k and v are apart, every block has its own copy of the
embedders, the position table is not stored, and three constants are others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from qdit_convert.choices import Choices
from qdit_convert.dit import (
    SMALL,
    Sizes,
    check_model,
    dit_config,
    input_size,
    label_config,
    num_heads,
    out_channels,
    rows_and_columns,
)
from qdit_convert.plan import (
    Example,
    Leaf,
    Plan,
    Transform,
    affine,
    block_count,
    convolution,
    linear,
    same,
    shape_of,
)
from qdit_convert.settings import TRANSFORMER, network_settings
from qdit_convert.tensors import StateDict, StoredTensor
from qdit_convert.training_args import Arguments, unknown_note
from qdit_jax.diffusion import shown
from qdit_jax.errors import UserError
from qdit_jax.models import sincos_positions

BLOCKS = "transformer_blocks."
EMBEDDER = "norm1.emb.timestep_embedder"
LABELS = "norm1.emb.class_embedder.embedding_table.weight"
POSITIONS = "pos_embed.pos_embed"  # the table, in the few files that store it
CLASS_NAMES = ("DiTTransformer2DModel", "Transformer2DModel")


def diffusers_plan(state: StateDict, choices: Choices, config: Mapping[str, Any] | None) -> Plan:
    """Returns the plan for a diffusers DiT; `config` is its config.json, if there is one."""
    sizes = diffusers_sizes(state)
    check_model(choices.model, sizes)
    settings = _checked_config(config or {}, sizes)
    heads = settings.get("num_attention_heads")
    if choices.num_heads is None and heads is not None:
        choices = replace(choices, num_heads=heads)
    size = choices.input_size if choices.input_size is not None else settings.get("sample_size")
    if size is None:
        raise UserError(
            "this layout does not store the image size; pass --input-size, as 32 for 256 pixels."
        )
    rows, columns = rows_and_columns(size)
    tokens = (rows // sizes.patch_size) * (columns // sizes.patch_size)
    result = dit_config(sizes, num_heads(sizes, choices))
    result |= {"frequency_shift": 1, "mlp_norm_eps": float(settings["norm_eps"])}
    stated = (
        choices.num_classes
        if choices.num_classes is not None
        else settings.get("num_embeds_ada_norm")
    )
    result |= label_config(sizes.table_rows, stated)
    result |= {"input_size": input_size(tokens, sizes.patch_size, (rows, columns))}
    said = Arguments({}, {}, tuple(f"{key}={shown(value)}" for key, value in state.hints.items()))
    leaves = tuple(_leaves(sizes, (rows, columns), state.tensors))
    return Plan("dit", result, leaves, tuple(unknown_note(said)))


def diffusers_sizes(state: StateDict) -> Sizes:
    """Returns the sizes of the network from its shapes."""
    tensors = state.tensors
    depth = block_count(tensors, BLOCKS)
    if depth == 0:
        raise UserError("there are no blocks (transformer_blocks.0.attn1.to_q.weight and so on).")
    width, in_channels, patch, _ = shape_of(tensors, "pos_embed.proj.weight", 4)
    features = shape_of(tensors, "proj_out_2.weight", 2)[0]
    return Sizes(
        depth=depth,
        width=width,
        patch_size=patch,
        in_channels=in_channels,
        out_channels=out_channels(features, patch),
        mlp_width=shape_of(tensors, f"{BLOCKS}0.ff.net.0.proj.weight", 2)[0],
        table_rows=shape_of(tensors, f"{BLOCKS}0.{LABELS}", 2)[0],
    )


def _checked_config(config: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """Returns the settings of config.json; raises `UserError` if it contradicts the weights."""
    name = config.get("_class_name", CLASS_NAMES[0])
    if name not in CLASS_NAMES:
        raise UserError(f"config.json is of a {name}, but the weights are of a {CLASS_NAMES[0]}.")
    for key in ("num_attention_heads", "attention_head_dim", "num_embeds_ada_norm", "sample_size"):
        if key in config and not (type(config[key]) is int and config[key] > 0):
            raise UserError(
                f"config.json says {key}={config[key]!r}, which is not a positive number."
            )
    settings = network_settings(config, TRANSFORMER)
    heads, head_dim = config.get("num_attention_heads"), config.get("attention_head_dim")
    stated = {
        "num_layers": (config.get("num_layers"), sizes.depth),
        "num_attention_heads * attention_head_dim": (
            heads and head_dim and heads * head_dim,
            sizes.width,
        ),
        "patch_size": (config.get("patch_size"), sizes.patch_size),
        "in_channels": (config.get("in_channels"), sizes.in_channels),
        "out_channels": (config.get("out_channels"), sizes.out_channels),
        "num_embeds_ada_norm + 1": (
            (config.get("num_embeds_ada_norm") or sizes.table_rows - 1) + 1,
            sizes.table_rows,
        ),
    }
    for key, (says, found) in stated.items():
        if says is not None and says != found:
            raise UserError(f"config.json says {key} = {says}, but the weights have {found}.")
    return settings


def _leaves(sizes: Sizes, size: tuple[int, int], tensors: Mapping[str, StoredTensor]) -> list[Leaf]:
    D, p, mlp = sizes.width, sizes.patch_size, sizes.mlp_width
    grid = (size[0] // p, size[1] // p)
    positions = Leaf("pos_embed", (), (), values=partial(_positions, D, grid))
    if POSITIONS in tensors:
        positions = Leaf("pos_embed", (POSITIONS,), ((1, grid[0] * grid[1], D),))
    leaves = [
        positions,
        *affine("x_embedder/proj", "pos_embed.proj", (D, sizes.in_channels, p, p), convolution),
        *_shared("t_embedder/mlp_0", f"{EMBEDDER}.linear_1", (D, 256), sizes.depth),
        *_shared("t_embedder/mlp_2", f"{EMBEDDER}.linear_2", (D, D), sizes.depth),
        _copied("y_embedder/embedding_table", LABELS, (sizes.table_rows, D), sizes.depth),
    ]
    for i in range(sizes.depth):
        new, old = f"blocks_{i}", f"{BLOCKS}{i}"
        qkv = [f"{old}.attn1.to_{name}" for name in "qkv"]
        leaves += affine(f"{new}/adaLN_modulation", f"{old}.norm1.linear", (6 * D, D))
        leaves += [
            Leaf(f"{new}/attn/qkv/kernel", tuple(f"{k}.weight" for k in qkv), ((D, D),), linear),
            Leaf(f"{new}/attn/qkv/bias", tuple(f"{k}.bias" for k in qkv), ((D,),)),
        ]
        leaves += affine(f"{new}/attn/proj", f"{old}.attn1.to_out.0", (D, D))
        leaves += affine(f"{new}/mlp/fc1", f"{old}.ff.net.0.proj", (mlp, D))
        leaves += affine(f"{new}/mlp/fc2", f"{old}.ff.net.2", (D, mlp))
    leaves += affine("final_layer/adaLN_modulation", "proj_out_1", (2 * D, D))
    leaves += affine("final_layer/linear", "proj_out_2", (p * p * sizes.out_channels, D))
    return leaves


def diffusers_example() -> Example:
    """Returns a small DiT with its config.json."""
    config = {
        "_class_name": CLASS_NAMES[0],
        "num_attention_heads": 2,
        "attention_head_dim": SMALL.width // 2,
        "num_embeds_ada_norm": SMALL.table_rows - 1,
        "sample_size": 4,
        "out_channels": SMALL.out_channels,
        "norm_type": "ada_norm_zero",
    }
    return Example(tuple(_leaves(SMALL, (4, 4), {})), config=config)


def _copied(
    path: str, key: str, shape: tuple[int, ...], depth: int, transform: Transform = same
) -> Leaf:
    """Returns the leaf of block 0's copy, which feeds the output layer; the others must equal it."""
    first, *others = (f"{BLOCKS}{i}.{key}" for i in range(depth))
    return Leaf(path, (first,), (shape,), transform, copies=tuple(others))


def _shared(path: str, key: str, shape: tuple[int, ...], depth: int) -> list[Leaf]:
    return [
        _copied(f"{path}/kernel", f"{key}.weight", shape, depth, linear),
        _copied(f"{path}/bias", f"{key}.bias", shape[:1], depth),
    ]


def _positions(width: int, grid: tuple[int, int]) -> np.ndarray:
    return sincos_positions(width, grid)[None]
