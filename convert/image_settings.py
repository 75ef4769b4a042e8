"""The settings of config.json that are understood of Sana, Z-Image and FLUX.2."""

from __future__ import annotations

from qdit_convert.settings import ABOUT, COUNT, NULL, POSITIVE, only
from qdit_jax.diffusion import HARMLESS, Setting, Table

EPS = {"low": 0, "high": 1}
SCALE = {"low": 1e-6, "high": 1e6}
HEADS: Table = ABOUT | {
    "num_attention_heads": POSITIVE,
    "attention_head_dim": POSITIVE,
    "num_layers": POSITIVE,
    "in_channels": POSITIVE,
    "out_channels": POSITIVE,
}
SANA: Table = HEADS | {
    "num_cross_attention_heads": POSITIVE,
    "cross_attention_head_dim": POSITIVE,
    "cross_attention_dim": POSITIVE,
    "caption_channels": POSITIVE,
    "patch_size": POSITIVE,
    "sample_size": POSITIVE,
    "mlp_ratio": Setting("number", low=1e-6, high=1e6, optional=True),
    "attention_bias": Setting("bool", optional=True),
    "norm_eps": Setting("number", **EPS, default=1e-6),
    "norm_elementwise_affine": only("bool", False),
    "interpolation_scale": Setting("number", **SCALE, optional=True),
    "guidance_embeds": Setting("bool", optional=True),
    "guidance_embeds_scale": Setting("number", **SCALE, default=0.1),
    "qk_norm": Setting("any", (None, "rms_norm_across_heads")),
    "timestep_scale": Setting("number", **SCALE, default=1.0),
    "dropout": HARMLESS,  # of training
}
Z_IMAGE: Table = ABOUT | {
    "all_patch_size": Setting("list", optional=True),
    "all_f_patch_size": Setting("list", ([1], (1,)), optional=True, used=False),
    "in_channels": POSITIVE,
    "dim": POSITIVE,
    "n_layers": POSITIVE,
    "n_refiner_layers": POSITIVE,
    "n_heads": POSITIVE,
    "n_kv_heads": HARMLESS,  # which the network does not read: it has as many as of queries
    "norm_eps": Setting("number", **EPS, default=1e-5),
    "qk_norm": Setting("bool", optional=True),
    "cap_feat_dim": POSITIVE,
    "siglip_feat_dim": NULL,
    "rope_theta": Setting("number", low=1, high=1e9, default=256.0),
    "t_scale": Setting("number", **SCALE, default=1000.0),
    "axes_dims": Setting("list", optional=True),
    "axes_lens": Setting("list", optional=True),
}
FLUX2: Table = HEADS | {
    "num_layers": COUNT,
    "num_single_layers": COUNT,
    "patch_size": Setting("whole", (1,), optional=True, used=False),
    "joint_attention_dim": POSITIVE,
    "timestep_guidance_channels": POSITIVE,
    "mlp_ratio": Setting("number", low=1e-6, high=1e6, optional=True),
    "axes_dims_rope": Setting("list", optional=True),
    "rope_theta": Setting("number", low=1, high=1e9, default=2000),
    "eps": Setting("number", **EPS, default=1e-6),
    "guidance_embeds": Setting("bool", optional=True),
}
