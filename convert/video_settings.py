"""The settings of config.json that are understood of networks for videos."""

from __future__ import annotations

from qdit_convert.settings import ABOUT, NULL, POSITIVE, only
from qdit_jax.diffusion import HARMLESS, Setting, Table

# Of diffusers' LatteTransformer3DModel.
LATTE: Table = ABOUT | {
    "num_attention_heads": POSITIVE,
    "attention_head_dim": POSITIVE,
    "num_layers": POSITIVE,
    "in_channels": POSITIVE,
    "out_channels": POSITIVE,
    "patch_size": POSITIVE,
    "sample_size": POSITIVE,
    "video_length": POSITIVE,
    "caption_channels": POSITIVE,
    "cross_attention_dim": POSITIVE,
    "norm_eps": Setting("number", low=0, high=1, default=1e-5),
    "activation_fn": only("text", "geglu", "gelu-approximate", "gelu", default="geglu", used=True),
    "attention_bias": only("bool", True),
    "norm_type": only("text", "ada_norm_single"),
    "norm_elementwise_affine": only("bool", False),
    "attention_type": only("text", "default"),
    "double_self_attention": only("bool", False),
    "only_cross_attention": only("bool", False),
    "num_vector_embeds": NULL,
    "use_linear_projection": only("bool", False),
    "dropout": HARMLESS,  # of training
    "num_embeds_ada_norm": HARMLESS,  # of a norm that adaLN-single does not have
    "norm_num_groups": HARMLESS,
    "upcast_attention": HARMLESS,
}
WITHOUT_BEARING = """
architectures class_dropout_prob drop_path enable_flash_attn enable_layernorm_kernel
enable_sequence_parallelism freeze_y_embedder only_train_temporal torch_dtype transformers_version
force_huggingface from_pretrained freeze_y_embedding
"""
# Of Open-Sora 1.2's STDiT3Config.
STDIT3: Table = (
    ABOUT
    | dict.fromkeys(WITHOUT_BEARING.split(), HARMLESS)
    | {
        "model_type": only("text", "STDiT3"),
        "depth": POSITIVE,
        "hidden_size": POSITIVE,
        "num_heads": POSITIVE,
        "mlp_ratio": Setting("number", low=1e-6, optional=True),
        "patch_size": Setting("list", optional=True),
        "in_channels": POSITIVE,
        "caption_channels": POSITIVE,
        "model_max_length": POSITIVE,
        "input_size": Setting("list", optional=True),
        "input_sq_size": Setting("whole", low=1, high=1_000_000, default=512),
        "pred_sigma": Setting("bool", optional=True),
        "qk_norm": Setting("bool", optional=True),
        "skip_y_embedder": only("bool", False),
    }
)
