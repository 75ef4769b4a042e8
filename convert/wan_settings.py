"""The settings of Wan's config.json files that are understood, of networks and of its autoencoder."""

from __future__ import annotations

from qdit_convert.settings import ABOUT, POSITIVE, Setting, only
from qdit_jax.diffusion import HARMLESS, Table

EPS = Setting("number", low=0, high=1, default=1e-6)
NULL = Setting("any", (None,), used=False)
DIFFUSERS: Table = ABOUT | {
    "num_attention_heads": POSITIVE,
    "attention_head_dim": POSITIVE,
    "num_layers": POSITIVE,
    "in_channels": POSITIVE,
    "out_channels": POSITIVE,
    "text_dim": POSITIVE,
    "freq_dim": POSITIVE,
    "ffn_dim": POSITIVE,
    "patch_size": Setting("list"),
    "eps": EPS,
    "cross_attn_norm": only("bool", True),
    "qk_norm": only("text", "rms_norm_across_heads"),
    "image_dim": NULL,
    "added_kv_proj_dim": NULL,
    "pos_embed_seq_len": NULL,
    "rope_max_seq_len": HARMLESS,  # the length of a table of angles that are computed here
}
AUTHORS: Table = ABOUT | {
    "model_type": only("text", "t2v", "ti2v"),
    "patch_size": Setting("list"),
    "text_len": POSITIVE,
    "in_dim": POSITIVE,
    "out_dim": POSITIVE,
    "dim": POSITIVE,
    "ffn_dim": POSITIVE,
    "freq_dim": POSITIVE,
    "text_dim": POSITIVE,
    "num_heads": POSITIVE,
    "num_layers": POSITIVE,
    "eps": EPS,
    "window_size": only("any", [-1, -1]),
    "qk_norm": only("bool", True),
    "cross_attn_norm": only("bool", True),
}
AUTOENCODER: Table = ABOUT | {
    "base_dim": POSITIVE,
    "decoder_base_dim": POSITIVE,
    "z_dim": POSITIVE,
    "dim_mult": Setting("numbers"),
    "num_res_blocks": POSITIVE,
    "temperal_downsample": Setting("list"),
    "in_channels": POSITIVE,
    "out_channels": POSITIVE,
    "is_residual": Setting("bool"),
    "patch_size": POSITIVE,
    "latents_mean": Setting("numbers"),
    "latents_std": Setting("numbers"),
    "attn_scales": only("any", []),
    "clip_output": only("bool", True),
    "dropout": HARMLESS,  # of training
    "scale_factor_spatial": HARMLESS,  # these two follow from the levels
    "scale_factor_temporal": HARMLESS,
}
