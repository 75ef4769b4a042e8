"""The rows of further families that paint a text: Sana, Z-Image and FLUX.2."""

from __future__ import annotations

from qdit_jax.models.family import SHIFT_SCALE_GATE, Family
from qdit_jax.models.folding import Fold, Producer, Segments, from_modulation, ungated

SMALL_SANA = {
    "sample_size": 4,
    "in_channels": 4,
    "hidden_size": 24,
    "depth": 2,
    "num_heads": 3,
    "num_cross_heads": 2,
    "cross_width": 16,
    "mlp_width": 20,
    "text_width": 12,
    "text_length": 5,
}
SMALL_Z_IMAGE = {
    "sample_size": 4,
    "in_channels": 4,
    "hidden_size": 24,
    "depth": 2,
    "refiner_depth": 1,
    "num_heads": 2,
    "mlp_width": 32,
    "time_width": 16,
    "time_mlp_width": 20,
    "rope_axes": [4, 4, 4],
    "rope_lengths": [70, 8, 8],
    "text_width": 12,
    "text_length": 5,
}
SMALL_FLUX2 = {
    "sample_size": 3,
    "in_channels": 8,
    "out_channels": 8,
    "hidden_size": 16,
    "depth": 1,
    "single_depth": 2,
    "num_heads": 2,
    "mlp_width": 24,
    "rope_axes": [2, 2, 2, 2],
    "text_width": 12,
    "text_length": 5,
}
Z_BLOCK = r"(?:noise_refiner|context_refiner|layers)_\d+"
BOTH_BRANCHES = tuple(f"{name}_{branch}" for branch in ("attn", "mlp") for name in SHIFT_SCALE_GATE)


def scaled_norm(norm: str) -> tuple[Producer, ...]:
    """Returns the producer of an input that a norm with a scale and no bias makes."""
    return (Producer(norm, shifted=False, weight="scale"),)


TEXT_TO_IMAGE_ROWS = (
    Family(
        name="sana",
        network="qdit_jax.models.sana:Sana",
        block=r"blocks_\d+",
        parts={
            "blocks": (
                r"blocks_\d+/(attn/(qkv|proj)|cross_attn/(q_linear|kv_linear|proj)|"
                r"mlp/(inverted_conv|point_conv))"
            ),
            "adaln": "t_block",
            "embedders": r"x_embedder/proj|(t|guidance)_embedder/mlp_\d|y_embedder/y_proj/fc\d",
            "final": r"final_layer/linear",
        },
        # The weights of the linear attention are no softmax: its operands are not quantized.
        attention={"cross_attention": r"blocks_\d+/cross_attn"},
        rounded_first="adaln",
        outputs={
            "t_block": BOTH_BRANCHES,
            r"blocks_\d+/attn/qkv": ("q", "k", "v"),
            r"blocks_\d+/cross_attn/kv_linear": ("k", "v"),
            r"blocks_\d+/mlp/depth_conv": ("value", "gate"),
        },
        # The modulation is shared by all blocks, and so is the norm that kv_linear reads; q_linear reads
        # the residual stream. Weights of the linear attention may all be 0, so that no shift passes
        # through its v.
        folds=(
            Fold(r"(blocks_\d+)/attn/proj", (Producer(r"\1/attn/qkv", "v", shifted=False),)),
            Fold(
                r"(blocks_\d+)/mlp/point_conv",
                (Producer(r"\1/mlp/depth_conv", "value", shifted=False, weight="filter"),),
            ),
            Fold(r"(blocks_\d+)/cross_attn/proj", (Producer(r"\1/cross_attn/kv_linear", "v"),)),
        ),
        examples=(
            SMALL_SANA,
            {**SMALL_SANA, "qk_norm": True, "guidance_embed": True, "guidance_unit": 0.1},
            {**SMALL_SANA, "patch_size": 2, "interpolation_scale": 2.0, "learn_sigma": True},
        ),
    ),
    Family(
        name="z-image",
        network="qdit_jax.models.z_image:ZImage",
        block=Z_BLOCK,
        parts={
            "blocks": rf"{Z_BLOCK}/(attention/(qkv|out)|feed_forward/w[123])",
            "adaln": r"((noise_refiner|layers)_\d+|final_layer)/adaLN_modulation",
            "embedders": r"x_embedder|cap_embedder_1|t_embedder/mlp_\d",
            "final": r"final_layer/linear",
        },
        attention={"self_attention": rf"{Z_BLOCK}/attention"},
        rounded_first="adaln",
        outputs={
            r"(noise_refiner|layers)_\d+/adaLN_modulation": (
                *(f"{name}_attn" for name in SHIFT_SCALE_GATE[1:]),
                *(f"{name}_mlp" for name in SHIFT_SCALE_GATE[1:]),
            ),
            rf"{Z_BLOCK}/attention/qkv": ("q", "k", "v"),
        },
        # Norms and modulations have no shift to take one up, a norm in every kind of block a scale.
        folds=(
            Fold(rf"({Z_BLOCK})/attention/qkv", scaled_norm(r"\1/attention_norm1")),
            Fold(rf"({Z_BLOCK})/attention/out", (Producer(r"\1/attention/qkv", "v"),)),
            Fold(rf"({Z_BLOCK})/feed_forward/w[13]", scaled_norm(r"\1/ffn_norm1")),
            Fold(rf"({Z_BLOCK})/feed_forward/w2", ungated(r"\1/feed_forward/w3")),
            Fold(
                r"(final_layer)/linear",
                (Producer(r"\1/adaLN_modulation", offset=1.0, shifted=False),),
            ),
        ),
        examples=(
            SMALL_Z_IMAGE,
            {**SMALL_Z_IMAGE, "sample_size": [2, 6], "patch_size": 1, "qk_norm": False},
        ),
    ),
    Family(
        name="flux2",
        network="qdit_jax.models.flux2:Flux2",
        block=r"(double|single)_blocks_\d+",
        parts={
            "blocks": r"double_blocks_\d+/(img|txt)_(attn/(qkv|proj)|mlp_[02])"
            r"|single_blocks_\d+/linear[12]",
            "adaln": r"(double_stream_modulation_(img|txt)|single_stream_modulation)/lin"
            r"|final_layer/adaLN_modulation",
            "embedders": r"(img|txt)_in|(time|guidance)_in/(in|out)_layer",
            "final": r"final_layer/linear",
        },
        attention={
            "joint_attention": r"double_blocks_\d+/img_attn",
            "self_attention": r"single_blocks_\d+",
        },
        rounded_first="adaln",
        outputs={
            r"double_stream_modulation_(img|txt)/lin": BOTH_BRANCHES,
            "single_stream_modulation/lin": SHIFT_SCALE_GATE,
            r"final_layer/adaLN_modulation": ("shift", "scale"),
            r"double_blocks_\d+/(img|txt)_attn/qkv": ("q", "k", "v"),
            r"double_blocks_\d+/(img|txt)_mlp_0": ("gate", "value"),
            r"single_blocks_\d+/linear1": Segments(("q", "k", "v"), rest=("gate", "value")),
        },
        inputs={r"single_blocks_\d+/linear2": Segments(("attention",), rest=("mlp",))},
        # Blocks of a kind share one modulation: nothing passes through it.
        folds=(
            Fold(
                r"(double_blocks_\d+)/(?:img|txt)_attn/proj",
                (
                    Producer(r"\1/img_attn/qkv", "v"),
                    Producer(r"\1/txt_attn/qkv", "v"),
                ),
            ),
            Fold(r"(double_blocks_\d+/(?:img|txt)_mlp)_2", ungated(r"\1_0", "value")),
            Fold(
                r"(single_blocks_\d+)/linear2",
                (
                    Producer(r"\1/linear1", "v", inputs="attention"),
                    Producer(r"\1/linear1", "value", shifted=False, inputs="mlp"),
                ),
            ),
            Fold(r"(final_layer)/linear", from_modulation(r"\1/adaLN_modulation")),
        ),
        examples=(
            SMALL_FLUX2,
            {**SMALL_FLUX2, "sample_size": [3, 2], "guidance_embed": True, "time_channels": 32},
        ),
    ),
)
