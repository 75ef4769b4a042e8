"""The settings of config.json files of networks with joint attention that are understood."""

from __future__ import annotations

from qdit_convert.settings import ABOUT, COUNT, POSITIVE
from qdit_jax.diffusion import Setting, Table

NETWORK: Table = ABOUT | {
    "num_attention_heads": POSITIVE,
    "attention_head_dim": POSITIVE,
    "num_layers": POSITIVE,
    "in_channels": POSITIVE,
    "out_channels": POSITIVE,
    "joint_attention_dim": POSITIVE,
    "pooled_projection_dim": POSITIVE,
}
SD3: Table = NETWORK | {
    "patch_size": POSITIVE,
    "sample_size": POSITIVE,
    "caption_projection_dim": POSITIVE,
    "pos_embed_max_size": POSITIVE,
    "dual_attention_layers": Setting("list", optional=True),
    "qk_norm": Setting("any", (None, "rms_norm")),
}
FLUX: Table = NETWORK | {
    "num_layers": COUNT,
    "num_single_layers": COUNT,
    "patch_size": Setting("whole", (1,), optional=True, used=False),
    "guidance_embeds": Setting("bool", optional=True),
    "axes_dims_rope": Setting("list", optional=True),
}
