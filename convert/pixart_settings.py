"""The settings of config.json that are understood of a diffusers PixArt."""

from __future__ import annotations

from qdit_convert.settings import ABOUT, NULL, POSITIVE, only
from qdit_jax.diffusion import HARMLESS, Setting, Table


def count(default: int) -> Setting:
    """Returns a setting that is a positive number, with diffusers' own default."""
    return Setting("whole", low=1, high=10_000_000, default=default)


PIXART: Table = ABOUT | {
    "num_attention_heads": count(16),
    "attention_head_dim": count(72),
    "num_layers": count(28),
    "in_channels": count(4),
    "out_channels": Setting("whole", low=1, high=10_000_000, default=8, optional=True),
    "patch_size": count(2),
    "sample_size": count(128),
    "cross_attention_dim": count(1152),
    "caption_channels": POSITIVE,
    "interpolation_scale": Setting("number", low=1e-6, high=1e6, optional=True),
    "use_additional_conditions": Setting("bool", optional=True),
    "activation_fn": only("text", "gelu-approximate"),
    "attention_bias": only("bool", True),
    "attention_type": only("text", "default"),
    "double_self_attention": only("bool", False),
    "norm_elementwise_affine": only("bool", False),
    "norm_eps": Setting("number", (1e-6,), used=False),
    "norm_type": only("text", "ada_norm_single"),
    "num_vector_embeds": NULL,
    "only_cross_attention": only("bool", False),
    "use_linear_projection": only("bool", False),
    "dropout": HARMLESS,  # of training
    "norm_num_groups": HARMLESS,  # of a norm that a network of patches does not have
    "num_embeds_ada_norm": HARMLESS,  # of a table that adaLN-single does not have
    "upcast_attention": HARMLESS,
}
