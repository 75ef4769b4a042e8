"""AutoencoderKL: the diffusers layout with new or old attention names, and latent-diffusion's.

Dimensions: Z latent channels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qdit_convert.choices import Choices
from qdit_convert.plan import (
    Example,
    Leaf,
    Plan,
    affine,
    block_count,
    convolution,
    linear,
    norm,
    shape_of,
)
from qdit_convert.settings import AUTOENCODER, network_settings
from qdit_convert.tensors import StateDict, StoredTensor
from qdit_jax.errors import UserError

OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
AUTOENCODER_NAME = "AutoencoderKL"
FIELDS = (
    "in_channels",
    "out_channels",
    "latent_channels",
    "layers_per_block",
    "block_out_channels",
)
SCALING_FACTOR = 0.18215  # of the published models, whose configs lack it


def vae_plan(state: StateDict, choices: Choices, config: Mapping[str, Any] | None) -> Plan:
    """Returns the plan for an AutoencoderKL; `config` is its config.json, if there is one."""
    tensors = state.tensors
    found = _shape_config(tensors)
    settings = _checked_config(config or {}, found)
    groups = settings["norm_num_groups"]
    if (
        type(groups) is not int
        or groups < 1
        or any(w % groups for w in found["block_out_channels"])
    ):
        raise UserError(
            f"norm_num_groups={groups!r} does not divide the widths {list(found['block_out_channels'])}; "
            "a config.json beside the weights must say norm_num_groups."
        )
    notes: list[str] = []
    if config is None:
        notes.append(f"norm_num_groups assumed to be {groups}: no config.json says it")
    factors = _factors(settings, choices, found["latent_channels"], config is not None, notes)
    result = {**found, "norm_num_groups": groups, **factors}
    return Plan("vae", result, tuple(_leaves(tensors, result)), tuple(notes))


def _factors(
    settings: Mapping[str, Any],
    choices: Choices,
    latent_channels: int,
    has_config: bool,
    notes: list[str],
) -> dict[str, float]:
    """Returns scale and shift of a diffusion model's latents; `notes` say what is assumed.

    Raises:
        UserError: if neither the user nor the file says it, and the latents are not of the published
            kind with 4 channels.
    """
    said = {"scaling_factor": settings["scaling_factor"], "shift_factor": settings["shift_factor"]}
    if has_config and said["scaling_factor"] is not None:
        said["shift_factor"] = said["shift_factor"] or 0.0
    usual = {"scaling_factor": SCALING_FACTOR, "shift_factor": 0.0}
    found: dict[str, float] = {}
    for name, chosen in (
        ("scaling_factor", choices.scaling_factor),
        ("shift_factor", choices.shift_factor),
    ):
        option = f"--{name.replace('_', '-')}"
        if chosen is not None:
            if said[name] not in (None, chosen):
                notes.append(f"config.json says {name}={said[name]}; {chosen:g} taken, as asked")
            found[name] = float(chosen)
        elif said[name] is not None:
            found[name] = float(said[name])
        elif latent_channels != 4:
            raise UserError(
                f"nothing says the {name} of these {latent_channels}-channel latents, and such "
                f"autoencoders differ; pass --scaling-factor and --shift-factor (0 if it has none; "
                f"1.5305 and 0.0609 of Stable Diffusion 3, 0.3611 and 0.1159 of FLUX.1), or put its "
                f"config.json beside it: {option} is missing."
            )
        elif name == "scaling_factor" and (said["shift_factor"] or choices.shift_factor):
            raise UserError(
                f"the latents are shifted by {choices.shift_factor or said['shift_factor']:g}, but "
                "nothing says their scaling_factor, which goes with the shift; pass --scaling-factor."
            )
        else:
            found[name] = usual[name]
            other = "; SDXL's is 0.13025" if name == "scaling_factor" else ""
            where = "its config.json does not say it" if has_config else "no config.json says it"
            notes.append(
                f"{name} assumed to be {usual[name]:g}, as of Stable Diffusion 1: {where} ({option}"
                f"{other})"
            )
    if not math.isfinite(sum(found.values())) or found["scaling_factor"] <= 0:
        raise UserError(
            f"scaling_factor={found['scaling_factor']:g}, shift_factor={found['shift_factor']:g}: "
            "the first must be positive, both finite."
        )
    return found


def _shape_config(tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """Returns the fields of the model that follow from shapes."""
    num_blocks = block_count(tensors, "encoder.down_blocks.")
    if num_blocks == 0:
        raise UserError(
            "the encoder is missing (encoder.down_blocks.0.resnets.0.conv1.weight and so on)."
        )
    widths = [
        shape_of(tensors, f"encoder.down_blocks.{i}.resnets.0.conv1.weight", 4)[0]
        for i in range(num_blocks)
    ]
    return {
        "block_out_channels": tuple(widths),
        "layers_per_block": block_count(tensors, "encoder.down_blocks.0.resnets."),
        "in_channels": shape_of(tensors, "encoder.conv_in.weight", 4)[1],
        "out_channels": shape_of(tensors, "decoder.conv_out.weight", 4)[0],
        "latent_channels": shape_of(tensors, "decoder.conv_in.weight", 4)[1],
        "use_quant_conv": any(key.startswith("quant_conv.") for key in tensors),
        "use_post_quant_conv": any(key.startswith("post_quant_conv.") for key in tensors),
        "mid_block_add_attention": any(".mid_block.attentions." in key for key in tensors),
    }


def _checked_config(config: Mapping[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of a config.json that fits the weights."""
    settings = network_settings(config, AUTOENCODER, [AUTOENCODER_NAME])
    for key, known in BLOCKS.items():
        stated = config.get(key, known)
        if any(kind != known for kind in (stated if isinstance(stated, list) else [stated])):
            raise UserError(f"config.json says {key}={stated!r}; convert knows {known!r} only.")
    flags = ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention")
    for key in FIELDS + flags:
        stated = config.get(key)
        stated = tuple(stated) if isinstance(stated, list) else stated
        if stated is not None and stated != found[key]:
            says, has = (list(v) if isinstance(v, tuple) else v for v in (stated, found[key]))
            raise UserError(f"config.json says {key} = {says}, but the weights have {has}.")
    return settings


def _leaves(tensors: Mapping[str, StoredTensor], config: dict[str, Any]) -> list[Leaf]:
    widths, layers, Z = (
        config["block_out_channels"],
        config["layers_per_block"],
        config["latent_channels"],
    )
    leaves = [*_half("encoder", config["in_channels"], widths[0]), *_half("decoder", Z, widths[-1])]
    width = widths[0]
    for i, after in enumerate(widths):
        block = f"encoder.down_blocks.{i}"
        leaves += _resnets(block, [width] + [after] * (layers - 1), after)
        if i < len(widths) - 1:
            leaves += _conv(f"{block}.downsamplers.0.conv", after, after)
        width = after
    for i, after in enumerate(widths[::-1]):
        block = f"decoder.up_blocks.{i}"
        leaves += _resnets(block, [width] + [after] * layers, after)
        if i < len(widths) - 1:
            leaves += _conv(f"{block}.upsamplers.0.conv", after, after)
        width = after
    for half, out, last in (
        ("encoder", 2 * Z, widths[-1]),
        ("decoder", config["out_channels"], widths[0]),
    ):
        block = f"{half}.mid_block"
        leaves += _resnets(block, [widths[-1]] * 2, widths[-1])
        if config["mid_block_add_attention"]:
            leaves += _attention(f"{block}.attentions.0", widths[-1], tensors)
        leaves += norm(_path(f"{half}.conv_norm_out"), f"{half}.conv_norm_out", last)
        leaves += _conv(f"{half}.conv_out", last, out)
    if config["use_quant_conv"]:
        leaves += _conv("quant_conv", 2 * Z, 2 * Z, 1)
    if config["use_post_quant_conv"]:
        leaves += _conv("post_quant_conv", Z, Z, 1)
    return leaves


SMALL = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}


def vae_example() -> Example:
    """Returns a small autoencoder with its config.json."""
    config = {
        "_class_name": AUTOENCODER_NAME,
        "norm_num_groups": 4,
        "scaling_factor": 0.18215,
        **{name: list(v) if isinstance(v, tuple) else v for name, v in SMALL.items()},
    }
    return Example(tuple(_leaves({}, SMALL)), config=config)


def latent_diffusion_example() -> Example:
    """Returns a small autoencoder under latent-diffusion's names."""
    example, num_up = vae_example(), len(SMALL["block_out_channels"])
    leaves = [
        replace(leaf, sources=tuple(latent_diffusion_names(key, num_up) for key in leaf.sources))
        for leaf in example.leaves
    ]
    return replace(example, leaves=tuple(leaves))


def _half(half: str, channels: int, width: int) -> list[Leaf]:
    return _conv(f"{half}.conv_in", channels, width)


def _path(key: str) -> str:
    """Returns the path of a layer: a number joins the name before it."""
    return re.sub(r"\.(\d+)", r"_\1", key).replace(".", "/")


def _conv(key: str, before: int, after: int, size: int = 3) -> list[Leaf]:
    return affine(_path(key), key, (after, before, size, size), convolution)


def _resnets(block: str, befores: list[int], after: int) -> list[Leaf]:
    leaves = []
    for i, before in enumerate(befores):
        key = f"{block}.resnets.{i}"
        leaves += norm(_path(f"{key}.norm1"), f"{key}.norm1", before)
        leaves += _conv(f"{key}.conv1", before, after)
        leaves += norm(_path(f"{key}.norm2"), f"{key}.norm2", after)
        leaves += _conv(f"{key}.conv2", after, after)
        if before != after:
            leaves += _conv(f"{key}.conv_shortcut", before, after, 1)
    return leaves


def _attention(key: str, width: int, tensors: Mapping[str, StoredTensor]) -> list[Leaf]:
    """Returns the leaves of the attention, whose layers may be linear or 1x1 convolutions."""
    leaves = norm(_path(f"{key}.group_norm"), f"{key}.group_norm", width)
    for name, old in OLD_ATTENTION.items():
        source = old if f"{key}.{old}.weight" in tensors else name
        kernel, bias = affine(_path(f"{key}.{name}"), f"{key}.{source}", (width, width), linear)
        leaves += [replace(kernel, shapes=((width, width), (width, width, 1, 1))), bias]
    return leaves


def from_latent_diffusion(state: StateDict) -> StateDict:
    """Returns `state` under diffusers' names instead of latent-diffusion's."""
    num_up = block_count(state.tensors, "decoder.up.")
    renamed = {
        _renamed(key, r"^decoder\.up", "decoder.up_blocks", num_up, LATENT_DIFFUSION): value
        for key, value in state.tensors.items()
    }
    return replace(state, tensors=renamed)


def in_latent_diffusion_names(text: str, state: StateDict) -> str:
    """Returns `text` with the file's own names instead of diffusers'."""
    return latent_diffusion_names(text, block_count(state.tensors, "decoder.up_blocks."))


def latent_diffusion_names(text: str, num_up: int) -> str:
    """Returns `text` with diffusers' names of an autoencoder put into latent-diffusion's."""
    return _renamed(text, r"\bdecoder\.up_blocks", "decoder.up", num_up, TO_LATENT_DIFFUSION)


def _renamed(
    text: str, up_blocks: str, into: str, num_up: int, names: tuple[tuple[str, str], ...]
) -> str:
    """Returns `text` with the decoder's blocks `up_blocks` called `into`, then `names` replaced.

    The two layouts number these blocks in opposite directions.
    """
    text = re.sub(
        rf"{up_blocks}\.(\d+)\b", lambda m: f"{into}.{num_up - 1 - int(m.group(1))}", text
    )
    for pattern, name in names:
        text = re.sub(pattern, name, text)
    return text


TO_LATENT_DIFFUSION = (
    (r"\bencoder\.down_blocks\b", "encoder.down"),
    (r"\.mid_block\.resnets\.0\b", ".mid.block_1"),
    (r"\.mid_block\.resnets\.1\b", ".mid.block_2"),
    (r"\.mid_block\.attentions\.0\.group_norm\b", ".mid.attn_1.norm"),
    (r"\.mid_block\.attentions\.0\.to_([qkv])\b", r".mid.attn_1.\1"),
    (r"\.mid_block\.attentions\.0\.to_out\.0\b", ".mid.attn_1.proj_out"),
    (r"\.resnets\.", ".block."),
    (r"\.downsamplers\.0\.conv\b", ".downsample.conv"),
    (r"\.upsamplers\.0\.conv\b", ".upsample.conv"),
    (r"\.conv_shortcut\b", ".nin_shortcut"),
    (r"coder\.conv_norm_out\b", "coder.norm_out"),
)
LATENT_DIFFUSION = (
    (r"^encoder\.down\.", "encoder.down_blocks."),
    (r"(blocks\.\d+)\.block\.", r"\1.resnets."),
    (r"\.downsample\.conv\.", ".downsamplers.0.conv."),
    (r"\.upsample\.conv\.", ".upsamplers.0.conv."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"coder\.norm_out\.", "coder.conv_norm_out."),
)
