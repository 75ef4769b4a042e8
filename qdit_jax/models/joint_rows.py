"""The rows of families with joint attention: Stable Diffusion 3 and FLUX.1."""

from __future__ import annotations

from qdit_jax.models.family import SHIFT_SCALE_GATE, Family
from qdit_jax.models.folding import Fold, Producer, Segments, from_modulation

SMALL_SD3 = {
    "sample_size": 4,
    "in_channels": 4,
    "out_channels": 4,
    "hidden_size": 16,
    "depth": 2,
    "num_heads": 2,
    "pos_embed_max_size": 5,
    "text_width": 12,
    "pooled_width": 6,
    "text_length": 5,
}
SMALL_FLUX = {
    "sample_size": 4,
    "in_channels": 4,
    "out_channels": 4,
    "hidden_size": 16,
    "depth": 1,
    "single_depth": 2,
    "num_heads": 2,
    "rope_axes": [2, 4, 2],
    "text_width": 12,
    "pooled_width": 6,
    "text_length": 5,
}

JOINT_ROWS = (
    Family(
        name="sd3",
        network="qdit_jax.models.sd3:SD3",
        block=r"joint_blocks_\d+",
        parts={
            "blocks": r"joint_blocks_\d+/(x|context)_block/(attn2?/(qkv|proj)|mlp/(fc1|fc2))",
            "adaln": r"(joint_blocks_\d+/(x|context)_block|final_layer)/adaLN_modulation",
            "embedders": r"x_embedder/proj|(t|y)_embedder/mlp_\d|context_embedder",
            "final": r"final_layer/linear",
        },
        attention={
            "joint_attention": r"joint_blocks_\d+/x_block/attn",
            "self_attention": r"joint_blocks_\d+/x_block/attn2",
        },
        rounded_first="adaln",
        outputs={
            r"joint_blocks_\d+/(x|context)_block/adaLN_modulation": Segments(
                tuple(
                    f"{name}_{branch}"
                    for branch in ("attn", "mlp", "attn2")
                    for name in SHIFT_SCALE_GATE
                )
            ),
            r"final_layer/adaLN_modulation": ("shift", "scale"),
            r"joint_blocks_\d+/(x|context)_block/attn2?/qkv": ("q", "k", "v"),
        },
        folds=(
            Fold(
                r"(joint_blocks_\d+/(?:x|context)_block)/attn/qkv",
                from_modulation(r"\1/adaLN_modulation", "_attn"),
            ),
            Fold(
                r"(joint_blocks_\d+/x_block)/attn2/qkv",
                from_modulation(r"\1/adaLN_modulation", "_attn2"),
            ),
            Fold(
                r"(joint_blocks_\d+/(?:x|context)_block)/mlp/fc1",
                from_modulation(r"\1/adaLN_modulation", "_mlp"),
            ),
            Fold(
                r"(joint_blocks_\d+)/(?:x|context)_block/attn/proj",
                (
                    Producer(r"\1/x_block/attn/qkv", "v"),
                    Producer(r"\1/context_block/attn/qkv", "v"),
                ),
            ),
            Fold(r"(joint_blocks_\d+/x_block)/attn2/proj", (Producer(r"\1/attn2/qkv", "v"),)),
            Fold(r"(final_layer)/linear", from_modulation(r"\1/adaLN_modulation")),
        ),
        gelu_inputs=r"joint_blocks_\d+/(x|context)_block/mlp/fc2",
        examples=(
            SMALL_SD3,
            {**SMALL_SD3, "sample_size": [4, 8], "dual_blocks": [0], "qk_norm": True},
        ),
    ),
    Family(
        name="flux",
        network="qdit_jax.models.flux:Flux",
        block=r"(double|single)_blocks_\d+",
        parts={
            "blocks": r"double_blocks_\d+/(img|txt)_(attn/(qkv|proj)|mlp_[02])"
            r"|single_blocks_\d+/linear[12]",
            "adaln": r"double_blocks_\d+/(img|txt)_mod/lin|single_blocks_\d+/modulation/lin"
            r"|final_layer/adaLN_modulation",
            "embedders": r"(img|txt)_in|(time|vector|guidance)_in/(in|out)_layer",
            "final": r"final_layer/linear",
        },
        attention={
            "joint_attention": r"double_blocks_\d+/img_attn",
            "self_attention": r"single_blocks_\d+",
        },
        rounded_first="adaln",
        outputs={
            r"double_blocks_\d+/(img|txt)_mod/lin": (
                *(f"{name}_attn" for name in SHIFT_SCALE_GATE),
                *(f"{name}_mlp" for name in SHIFT_SCALE_GATE),
            ),
            r"single_blocks_\d+/modulation/lin": SHIFT_SCALE_GATE,
            r"final_layer/adaLN_modulation": ("shift", "scale"),
            r"double_blocks_\d+/(img|txt)_attn/qkv": ("q", "k", "v"),
            r"single_blocks_\d+/linear1": Segments(("q", "k", "v"), rest=("mlp",)),
        },
        inputs={r"single_blocks_\d+/linear2": Segments(("attention",), rest=("mlp",))},
        folds=(
            Fold(
                r"(double_blocks_\d+)/(img|txt)_attn/qkv",
                from_modulation(r"\1/\2_mod/lin", "_attn"),
            ),
            Fold(
                r"(double_blocks_\d+)/(img|txt)_mlp_0",
                from_modulation(r"\1/\2_mod/lin", "_mlp"),
            ),
            Fold(
                r"(double_blocks_\d+)/(?:img|txt)_attn/proj",
                (
                    Producer(r"\1/img_attn/qkv", "v"),
                    Producer(r"\1/txt_attn/qkv", "v"),
                ),
            ),
            Fold(r"(single_blocks_\d+)/linear1", from_modulation(r"\1/modulation/lin")),
            # The other channels of its input come out of a GELU.
            Fold(
                r"(single_blocks_\d+)/linear2",
                (Producer(r"\1/linear1", "v", inputs="attention"),),
            ),
            Fold(r"(final_layer)/linear", from_modulation(r"\1/adaLN_modulation")),
        ),
        # Not linear2: a part of its input has values of both signs.
        gelu_inputs=r"double_blocks_\d+/(img|txt)_mlp_2",
        examples=(
            SMALL_FLUX,
            {**SMALL_FLUX, "sample_size": [4, 8], "guidance_embed": False},
        ),
    ),
)
