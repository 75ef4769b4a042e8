"""The table of networks: a new family is one file and one row here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn
from flax.traverse_util import flatten_dict

from qdit_jax.models.family import SHIFT_SCALE_GATE, Family
from qdit_jax.models.folding import Fold, Producer, Segments, from_modulation, ungated
from qdit_jax.models.joint_rows import JOINT_ROWS
from qdit_jax.models.text_to_image_rows import TEXT_TO_IMAGE_ROWS
from qdit_jax.models.video_families import VIDEO_FAMILIES
from qdit_jax.models.wan_families import WAN_FAMILIES
from qdit_jax.types import Params

SMALL_DIT = {
    "input_size": 4,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 16,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 5,
}
SMALL_PIXART = {
    "sample_size": 4,
    "hidden_size": 24,
    "depth": 2,
    "num_heads": 2,
    "mlp_width": 48,
    "text_length": 6,
    "text_width": 16,
}

SMALL_LIGHTNING = {
    "input_size": 4,
    "in_channels": 4,
    "hidden_size": 16,
    "depth": 2,
    "num_heads": 2,
    "mlp_width": 24,
    "num_classes": 5,
}

FAMILIES: dict[str, Family] = {
    row.name: row
    for row in (
        Family(
            name="dit",
            network="qdit_jax.models.dit:DiT",
            block=r"blocks_\d+",
            parts={
                "blocks": r"blocks_\d+/(attn/(qkv|proj)|mlp/(fc1|fc2))",
                "adaln": r"(blocks_\d+|final_layer)/adaLN_modulation",
                "embedders": r"x_embedder/proj|t_embedder/mlp_\d",
                "final": r"final_layer/linear",
            },
            attention={"self_attention": r"blocks_\d+/attn"},
            rounded_first="adaln",
            outputs={
                r"blocks_\d+/adaLN_modulation": (
                    *(f"{name}_attn" for name in SHIFT_SCALE_GATE),
                    *(f"{name}_mlp" for name in SHIFT_SCALE_GATE),
                ),
                r"final_layer/adaLN_modulation": ("shift", "scale"),
                r"blocks_\d+/attn/qkv": ("q", "k", "v"),
            },
            folds=(
                Fold(
                    r"(blocks_\d+)/attn/qkv",
                    from_modulation(r"\1/adaLN_modulation", "_attn"),
                ),
                Fold(
                    r"(blocks_\d+)/mlp/fc1",
                    from_modulation(r"\1/adaLN_modulation", "_mlp"),
                ),
                Fold(r"(blocks_\d+)/attn/proj", (Producer(r"\1/attn/qkv", "v"),)),
                Fold(
                    r"(final_layer)/linear",
                    from_modulation(r"\1/adaLN_modulation"),
                ),
            ),
            gelu_inputs=r"blocks_\d+/mlp/fc2",
            examples=(
                SMALL_DIT,
                {**SMALL_DIT, "input_size": [4, 8], "learn_sigma": False, "null_class": False},
                {**SMALL_DIT, "velocity": True, "noise_time": 1.0, "data_time": 0.0},
            ),
        ),
        *JOINT_ROWS,
        *TEXT_TO_IMAGE_ROWS,
        *VIDEO_FAMILIES,
        Family(
            name="pixart",
            network="qdit_jax.models.pixart:PixArt",
            block=r"blocks_\d+",
            parts={
                "blocks": (
                    r"blocks_\d+/(attn(_sr)?/(qkv|proj)|cross_attn/(q_linear|kv_linear|proj)|"
                    r"mlp/(fc1|fc2))"
                ),
                "adaln": "t_block",
                "embedders": (
                    r"x_embedder/proj|(t|csize|ar)_embedder/mlp_\d|y_embedder/y_proj/fc\d"
                ),
                "final": r"final_layer/linear",
            },
            attention={
                "self_attention": r"blocks_\d+/attn(_sr)?",
                "cross_attention": r"blocks_\d+/cross_attn",
            },
            rounded_first="adaln",
            outputs={
                "t_block": (
                    *(f"{name}_attn" for name in SHIFT_SCALE_GATE),
                    *(f"{name}_mlp" for name in SHIFT_SCALE_GATE),
                ),
                r"blocks_\d+/attn(_sr)?/qkv": ("q", "k", "v"),
                r"blocks_\d+/cross_attn/kv_linear": ("k", "v"),
            },
            # The modulation is shared by all blocks, a compressed v is normalized, and q_linear reads
            # the residual stream: nothing passes through those.
            folds=(
                Fold(r"(blocks_\d+)/attn/proj", (Producer(r"\1/attn/qkv", "v"),)),
                Fold(r"(blocks_\d+)/cross_attn/proj", (Producer(r"\1/cross_attn/kv_linear", "v"),)),
            ),
            gelu_inputs=r"blocks_\d+/mlp/fc2",
            examples=(
                {**SMALL_PIXART, "stored_positions": True},
                {**SMALL_PIXART, "size_conditions": True, "interpolation_scale": 2.0},
                {
                    **SMALL_PIXART,
                    "sample_size": 8,
                    "qk_norm": True,
                    "kv_compression": [1, 2],
                    "learn_sigma": False,
                },
            ),
        ),
        Family(
            name="lightningdit",
            network="qdit_jax.models.lightningdit:LightningDiT",
            block=r"blocks_\d+",
            parts={
                "blocks": r"blocks_\d+/(attn/(qkv|proj)|mlp/(w12|w3))",
                "adaln": r"(blocks_\d+|final_layer)/adaLN_modulation",
                "embedders": r"x_embedder/proj|t_embedder/mlp_\d",
                "final": r"final_layer/linear",
            },
            attention={"self_attention": r"blocks_\d+/attn"},
            rounded_first="adaln",
            outputs={
                r"blocks_\d+/adaLN_modulation": Segments(
                    (
                        *(f"{name}_attn" for name in SHIFT_SCALE_GATE),
                        *(f"{name}_mlp" for name in SHIFT_SCALE_GATE),
                    ),
                    optional=("shift_attn", "shift_mlp"),
                ),
                r"final_layer/adaLN_modulation": ("shift", "scale"),
                r"blocks_\d+/attn/qkv": ("q", "k", "v"),
                r"blocks_\d+/mlp/w12": ("gate", "value"),
            },
            folds=(
                Fold(r"(blocks_\d+)/attn/qkv", from_modulation(r"\1/adaLN_modulation", "_attn")),
                Fold(r"(blocks_\d+)/mlp/w12", from_modulation(r"\1/adaLN_modulation", "_mlp")),
                Fold(r"(blocks_\d+)/attn/proj", (Producer(r"\1/attn/qkv", "v"),)),
                Fold(r"(blocks_\d+)/mlp/w3", ungated(r"\1/mlp/w12", "value")),
                Fold(r"(final_layer)/linear", from_modulation(r"\1/adaLN_modulation")),
            ),
            examples=(
                SMALL_LIGHTNING,
                {
                    **SMALL_LIGHTNING,
                    **dict.fromkeys(("rms_norm", "rope", "shifts"), False),
                    **dict.fromkeys(("qk_norm", "learn_sigma"), True),
                },
            ),
        ),
        Family(
            "vae",
            "qdit_jax.models.vae:AutoencoderKL",
            is_diffusion=False,
            examples=({"block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4},),
        ),
        *WAN_FAMILIES,
        Family("inception", "qdit_jax.models.inception:InceptionV3", is_diffusion=False),
        Family("i3d", "qdit_jax.models.i3d:I3D", is_diffusion=False),
    )
}
# Fields of a linen module, or of how it runs, that are no part of a stored configuration.
NOT_CONFIG = {"parent", "name", "numerics", "implementation", "dtype", "expert"}


def family_named(name: str) -> Family:
    """Returns a row of the table; raises `ValueError` if there is none of that name."""
    if name not in FAMILIES:
        raise ValueError(f"family={name!r} is unknown; use one of {', '.join(FAMILIES)}.")
    return FAMILIES[name]


def build_model(family: str, config: Mapping[str, Any]) -> nn.Module:
    """Returns the network of `family` with the fields in `config` (lists become tuples).

    Raises:
        ValueError: if the family or a field is unknown.
    """
    cls = family_named(family).network_class
    known = {f.name for f in dataclasses.fields(cls)} - NOT_CONFIG
    if unknown := sorted(set(config) - known):
        raise ValueError(
            f"config of family {family!r} has unknown fields {unknown}; known: {sorted(known)}."
        )
    return cls(**{name: tuple_of_list(value) for name, value in config.items()})


def config_of(model: nn.Module) -> dict[str, Any]:
    """Returns the JSON-able configuration of a model, which `build_model` takes."""
    fields = (f for f in dataclasses.fields(model) if f.name not in NOT_CONFIG)
    return {f.name: getattr(model, f.name) for f in fields}


def family_of(model: nn.Module) -> Family:
    """Returns the row of a network; raises `TypeError` for a class that has none."""
    for row in FAMILIES.values():
        if row.network.endswith(f":{type(model).__name__}") and type(model) is row.network_class:
            return row
    raise TypeError(f"{type(model).__name__} belongs to no family that can be saved.")


def family_of_params(params: Params) -> Family | None:
    """Returns the family whose parts cover every layer of a tree; None if there is none."""
    found = [row for row in FAMILIES.values() if row.claims(params)]
    return max(found, key=lambda row: len(row.marks), default=None)


def tuple_of_list(value: object) -> object:
    return tuple(tuple_of_list(v) for v in value) if isinstance(value, list) else value


def abstract_params(model: nn.Module) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the path (joined by `/`), shape and dtype of every parameter, computing nothing."""
    inputs = model.example_inputs()
    variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    return flatten_dict(variables["params"], sep="/")
