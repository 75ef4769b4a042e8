"""The rows of networks for videos in the table of families."""

from __future__ import annotations

from typing import Any

from qdit_jax.models.family import Family
from qdit_jax.models.folding import Fold, Producer, ungated

QKV, KV = ("q", "k", "v"), ("k", "v")
CHUNKS = tuple(f"{kind}_{of}" for of in ("attn", "mlp") for kind in ("shift", "scale", "gate"))
EMBEDDERS = r"x_embedder/proj|t_embedder/mlp_\d"
CAPTIONS = r"y_embedder/y_proj/fc[12]"
SMALL: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 16,
    "depth": 1,
    "num_heads": 2,
}
SMALL_TEXT = {**SMALL, "caption_channels": 12, "caption_length": 5}
SMALL_LATTE = {**SMALL, "depth": 2, "input_size": 4, "num_frames": 3, "num_classes": 4}


def modulated(layers: str, layer: str, shift: str, scale: str) -> Fold:
    """Returns the fold into a modulation's shift and scale, of a layer `\\1/adaLN_modulation`."""
    producers = (Producer(layer, shift), Producer(layer, scale, 1.0, shifted=False))
    return Fold(layers, producers)


def values(attention: str, projection: str = "qkv") -> Fold:
    """Returns the fold of an attention's output layer into the rows of its values.

    Args:
        attention: pattern of the attention module; its only group is the module's path.
    """
    return Fold(f"{attention}/proj", (Producer(rf"\1/{projection}", "v"),))


LATTE = Family(
    name="latte",
    network="qdit_jax.models.latte:Latte",
    block=r"blocks_\d+",
    parts={
        "blocks": r"blocks_\d+/(attn/(qkv|proj)|mlp/(fc1|fc2))",
        "adaln": r"(blocks_\d+|final_layer)/adaLN_modulation",
        "embedders": EMBEDDERS,
        "final": r"final_layer/linear",
    },
    attention={
        "spatial_attention": r"blocks_\d*[02468]/attn",
        "temporal_attention": r"blocks_\d*[13579]/attn",
    },
    rounded_first="adaln",
    outputs={
        r"blocks_\d+/adaLN_modulation": CHUNKS,
        r"final_layer/adaLN_modulation": ("shift", "scale"),
        r"blocks_\d+/attn/qkv": QKV,
    },
    folds=(
        modulated(r"(blocks_\d+)/attn/qkv", r"\1/adaLN_modulation", "shift_attn", "scale_attn"),
        modulated(r"(blocks_\d+)/mlp/fc1", r"\1/adaLN_modulation", "shift_mlp", "scale_mlp"),
        values(r"(blocks_\d+/attn)"),
        modulated(r"(final_layer)/linear", r"\1/adaLN_modulation", "shift", "scale"),
    ),
    gelu_inputs=r"blocks_\d+/mlp/fc2",
    marks=("temp_embed",),
    examples=(
        SMALL_LATTE,
        {**SMALL_LATTE, "input_size": [4, 6], "num_classes": 0, "learn_sigma": False},
    ),
)
# One modulation is shared by all blocks: no divisor of one block's inputs can be folded into it.
STDIT = Family(
    name="stdit",
    network="qdit_jax.models.stdit:STDiT",
    block=r"blocks_\d+",
    parts={
        "blocks": r"blocks_\d+/((attn|attn_temp)/(qkv|proj)|cross_attn/(q_linear|kv_linear|proj)"
        r"|mlp/(fc1|fc2))",
        "adaln": "t_block",
        "embedders": f"{EMBEDDERS}|{CAPTIONS}",
        "final": r"final_layer/linear",
    },
    attention={
        "spatial_attention": r"blocks_\d+/attn",
        "temporal_attention": r"blocks_\d+/attn_temp",
        "cross_attention": r"blocks_\d+/cross_attn",
    },
    rounded_first="adaln",
    outputs={r"blocks_\d+/(attn|attn_temp)/qkv": QKV, r"blocks_\d+/cross_attn/kv_linear": KV},
    folds=(
        values(r"(blocks_\d+/(?:attn|attn_temp))"),
        values(r"(blocks_\d+/cross_attn)", "kv_linear"),
    ),
    gelu_inputs=r"blocks_\d+/mlp/fc2",
    marks=("blocks_0/attn_temp/proj/bias",),
    examples=({**SMALL_TEXT, "depth": 2, "sample_size": [3, 4, 6]},),
)
BLOCKS3 = r"(?:spatial|temporal)_blocks_\d+"
STDIT3 = Family(
    name="stdit3",
    network="qdit_jax.models.stdit3:STDiT3",
    block=BLOCKS3,
    parts={
        "blocks": BLOCKS3
        + r"/(attn/(qkv|proj)|cross_attn/(q_linear|kv_linear|proj)|mlp/(fc1|fc2))",
        "adaln": "t_block",
        "embedders": rf"{EMBEDDERS}|fps_embedder/mlp_\d|{CAPTIONS}",
        "final": r"final_layer/linear",
    },
    attention={
        "spatial_attention": r"spatial_blocks_\d+/attn",
        "temporal_attention": r"temporal_blocks_\d+/attn",
        "cross_attention": rf"{BLOCKS3}/cross_attn",
    },
    rounded_first="adaln",
    outputs={rf"{BLOCKS3}/attn/qkv": QKV, rf"{BLOCKS3}/cross_attn/kv_linear": KV},
    folds=(values(rf"({BLOCKS3}/attn)"), values(rf"({BLOCKS3}/cross_attn)", "kv_linear")),
    gelu_inputs=rf"{BLOCKS3}/mlp/fc2",
    examples=({**SMALL_TEXT, "sample_size": [5, 3, 4], "input_sq_size": 32},),
)
BLOCKS2 = r"(?:temporal_)?transformer_blocks_\d+"
LATTE_T2V = Family(
    name="latte_t2v",
    network="qdit_jax.models.latte_t2v:LatteT2V",
    block=BLOCKS2,
    parts={
        "blocks": BLOCKS2
        + r"/(attn/(qkv|proj)|cross_attn/(q_linear|kv_linear|proj)|(mlp|glu)/(fc1|fc2))",
        "adaln": "t_block",
        "embedders": f"{EMBEDDERS}|{CAPTIONS}",
        "final": r"final_layer/linear",
    },
    attention={
        "spatial_attention": r"transformer_blocks_\d+/attn",
        "temporal_attention": r"temporal_transformer_blocks_\d+/attn",
        "cross_attention": r"transformer_blocks_\d+/cross_attn",
    },
    rounded_first="adaln",
    outputs={
        rf"{BLOCKS2}/attn/qkv": QKV,
        r"transformer_blocks_\d+/cross_attn/kv_linear": KV,
        rf"{BLOCKS2}/glu/fc1": ("value", "gate"),
    },
    folds=(
        values(rf"({BLOCKS2}/attn)"),
        values(r"(transformer_blocks_\d+/cross_attn)", "kv_linear"),
        Fold(rf"({BLOCKS2}/glu)/fc2", ungated(r"\1/fc1", "value")),
    ),
    gelu_inputs=rf"{BLOCKS2}/mlp/fc2",
    examples=(
        {**SMALL_TEXT, "sample_size": 4, "video_length": 3},
        {**SMALL_TEXT, "sample_size": 4, "video_length": 3, "activation": "geglu"},
    ),
)
VIDEO_FAMILIES = (LATTE, STDIT, STDIT3, LATTE_T2V)
