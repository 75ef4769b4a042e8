"""The rows of Wan's networks and of its autoencoders."""

from __future__ import annotations

from qdit_jax.models.family import Family
from qdit_jax.models.folding import Fold, Producer

SMALL_WAN = {
    "sample_size": [2, 4, 4],
    "in_channels": 4,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 2,
    "ffn_width": 48,
    "freq_width": 32,
    "text_width": 12,
    "text_length": 6,
}
SMALL_WAN_VAE = {
    "base_dim": 4,
    "decoder_base_dim": 4,
    "z_dim": 2,
    "dim_mult": [1, 2],
    "num_res_blocks": 1,
    "temporal_downsample": [True],
    "latents_mean": [0.1, -0.2],
    "latents_std": [1.5, 2.0],
}
RESIDUAL_WAN_VAE = {
    "dim_mult": [2, 2],
    "in_channels": 12,
    "out_channels": 12,
    "residual": True,
    "patch_size": 2,
}
OF_EXPERT = "(?:(?:high|low)/)?"  # begins the paths of a network with two experts

WAN_FAMILIES = (
    Family(
        name="wan",
        network="qdit_jax.models.wan:Wan",
        block=rf"{OF_EXPERT}blocks_\d+",
        parts={
            "blocks": rf"{OF_EXPERT}blocks_\d+/(self_attn/(qkv|o)|cross_attn/(q|kv|o)|ffn_[02])",
            "adaln": rf"{OF_EXPERT}time_projection_1",
            "embedders": rf"{OF_EXPERT}(patch_embedding|(text|time)_embedding_[02])",
            "final": rf"{OF_EXPERT}head/head",
        },
        attention={
            "self_attention": rf"{OF_EXPERT}blocks_\d+/self_attn",
            "cross_attention": rf"{OF_EXPERT}blocks_\d+/cross_attn",
        },
        rounded_first="adaln",
        outputs={
            rf"{OF_EXPERT}blocks_\d+/self_attn/qkv": ("q", "k", "v"),
            rf"{OF_EXPERT}blocks_\d+/cross_attn/kv": ("k", "v"),
        },
        folds=(
            Fold(rf"({OF_EXPERT}blocks_\d+)/self_attn/o", (Producer(r"\1/self_attn/qkv", "v"),)),
            Fold(rf"({OF_EXPERT}blocks_\d+)/cross_attn/o", (Producer(r"\1/cross_attn/kv", "v"),)),
            Fold(
                rf"({OF_EXPERT}blocks_\d+)/cross_attn/q",
                (Producer(r"\1/norm3", weight="scale"),),
            ),
        ),
        gelu_inputs=rf"{OF_EXPERT}blocks_\d+/ffn_2",
        examples=(SMALL_WAN, {**SMALL_WAN, "depth": 1, "boundary": 950.0}),
    ),
    Family(
        "wan-vae",
        "qdit_jax.models.wan_vae:WanAutoencoder",
        is_diffusion=False,
        examples=(SMALL_WAN_VAE, {**SMALL_WAN_VAE, **RESIDUAL_WAN_VAE}),
    ),
)
