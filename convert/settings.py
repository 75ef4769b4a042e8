"""The settings of diffusers' files that are understood: of networks and of whole pipelines.

A scheduler's are in `qdit_jax.diffusion.scheduler_settings`, a training script's arguments in
`qdit_convert.training_args`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qdit_jax.diffusion import HARMLESS, Setting, Table, understood
from qdit_jax.errors import UserError

CONFIG_FILE = "config.json"
CONFIG = f"{CONFIG_FILE} says"
INDEX = "model_index.json says"
QUANTIZATION = "quantization_config"
POSITIVE = Setting("whole", low=1, high=10_000_000, optional=True)
COUNT = replace(POSITIVE, low=0)  # of blocks of a kind, of which a network may have none
ABOUT = {
    name: HARMLESS
    for name in ("_class_name", "_diffusers_version", "_name_or_path", "_commit_hash")
}


def only(
    kind: str,
    *values: object,
    default: object = None,
    optional: bool = False,
    used: bool = False,
) -> Setting:
    """Returns a setting that must have one of `values`: our networks compute no other case."""
    return Setting(kind, values, default=default, optional=optional, used=used)


NULL = Setting("any", (None,), used=False)
TRANSFORMER: Table = ABOUT | {
    "num_attention_heads": POSITIVE,
    "attention_head_dim": POSITIVE,
    "num_layers": POSITIVE,
    "num_embeds_ada_norm": POSITIVE,
    "in_channels": POSITIVE,
    "out_channels": POSITIVE,
    "patch_size": POSITIVE,
    "sample_size": POSITIVE,
    "norm_eps": Setting("number", low=0, high=1, default=1e-5),
    "activation_fn": only("text", "gelu-approximate"),
    "attention_bias": only("bool", True),
    "attention_type": only("text", "default"),
    "caption_channels": NULL,
    "cross_attention_dim": NULL,
    "double_self_attention": only("bool", False),
    "interpolation_scale": NULL,
    "norm_elementwise_affine": only("bool", False),
    "norm_type": only("text", "ada_norm_zero"),
    "num_vector_embeds": NULL,
    "only_cross_attention": only("bool", False),
    "use_additional_conditions": only("bool", False, optional=True),
    "use_linear_projection": only("bool", False),
    "dropout": HARMLESS,  # of training
    "norm_num_groups": HARMLESS,  # of a norm that a network of patches does not have
    "upcast_attention": HARMLESS,
}
AUTOENCODER: Table = ABOUT | {
    "block_out_channels": Setting("list"),
    "in_channels": POSITIVE,
    "latent_channels": POSITIVE,
    "layers_per_block": POSITIVE,
    "mid_block_add_attention": Setting("bool", optional=True),
    "norm_num_groups": Setting("any", default=32),
    "out_channels": POSITIVE,
    "scaling_factor": Setting("number", low=1e-9, optional=True),
    "shift_factor": Setting("number", optional=True),
    "use_post_quant_conv": Setting("bool", optional=True),
    "use_quant_conv": Setting("bool", optional=True),
    "act_fn": only("text", "silu"),
    "down_block_types": Setting("any", used=False),  # checked one by one
    "up_block_types": Setting("any", used=False),
    "latents_mean": NULL,
    "latents_std": NULL,
    "force_upcast": HARMLESS,  # of half precision
    "sample_size": HARMLESS,  # of tiles
}
PIPELINE: Table = ABOUT  # of every class; `qdit_convert.pipelines` adds each one's own


def network_settings(
    config: Mapping[str, Any], table: Table, class_names: Sequence[str] = ()
) -> dict[str, Any]:
    """Returns what a network's config.json says.

    Args:
        class_names: those that its `_class_name` may have, if it has one, the usual one first.

    Raises:
        UserError: if it is of another class, or naming a setting and its value, if it is not understood.
    """
    name = config.get("_class_name")
    if class_names and name is not None and name not in class_names:
        article = "an" if class_names[0][0] in "AEIOU" else "a"
        raise UserError(
            f"{CONFIG_FILE} is of a {name}, but the weights are of {article} {class_names[0]}."
        )
    check_quantization(config.get(QUANTIZATION))
    plain = {name: value for name, value in config.items() if name != QUANTIZATION}
    return understood(CONFIG, plain, table)


def check_quantization(said: object) -> None:
    """Raises `UserError` for weights that a config.json says are quantized in a way that is not read.

    What is read, the tensors tell by themselves.
    """
    if said is None:
        return
    method = said.get("quant_method") if isinstance(said, Mapping) else said
    if not isinstance(said, Mapping) or method != "nunchaku_lite":
        raise UserError(
            f"{CONFIG} the weights are quantized by {method!r}, which convert does not read; it reads "
            "nunchaku_lite's and ComfyUI's (docs/formats-of-others.md)."
        )
    layers = said.get("svdq_w4a4")
    if isinstance(layers, Mapping) and layers.get("act_unsigned"):
        raise UserError(f"{CONFIG} act_unsigned=True of svdq_w4a4, which convert does not read.")
    layers = said.get("awq_w4a16")
    if isinstance(layers, Mapping) and layers.get("group_size", 64) != 64:
        raise UserError(
            f"{CONFIG} group_size={layers['group_size']!r} of awq_w4a16; convert reads groups of 64, the "
            "only ones that its kernels have."
        )
