"""Z-Image: the authors' single file, and diffusers' `ZImageTransformer2DModel`.

Dimensions: D width, p patch size, C channels of the latents, E channels of text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qdit_convert.choices import Choices
from qdit_convert.image_settings import Z_IMAGE
from qdit_convert.joint import (
    TEXT_NOTE,
    Naming,
    head_dim,
    layer,
    num_heads,
    rope_axes,
    sample_size,
)
from qdit_convert.plan import Example, Leaf, Plan, block_count, most_common, shape_of
from qdit_convert.settings import network_settings
from qdit_convert.tensors import StateDict, StoredTensor
from qdit_jax.errors import UserError

CLASS_NAME = "ZImageTransformer2DModel"
HEAD_DIM = 128  # of the published size
ROPE_AXES = (32, 48, 48)  # as published, of heads of 128 channels
ROPE_LENGTHS = (1536, 512, 512)  # as published
PATCH = 2  # as published
MULTIPLE = 32  # rows of text after padding
TEXT_LENGTH, TEXT_WIDTH = 512, 2560  # as published
# Beside the weights in the authors' file; the network does not read it.
LEFT = "norm_final.weight"
NORMS = re.compile(r"\.attention\.([qk]_norm|norm_[qk])\.weight$")
IN_DIFFUSERS = {
    "attention/qkv": "attention.to_q attention.to_k attention.to_v",
    "attention/out": "attention.to_out.0",
    "attention/q_norm": "attention.norm_q",
    "attention/k_norm": "attention.norm_k",
}
BLOCKS = ("noise_refiner", "context_refiner", "layers")


def in_original(path: str) -> tuple[str, ...]:
    """Returns the name of a layer's tensors in the authors' file."""
    name = re.sub(r"_(\d+)(?=/|$)", r".\1", path).replace("/", ".")
    number = 1 if name.startswith("final_layer") else 0  # SiLU stands before the last one
    return (name.replace("adaLN_modulation", f"adaLN_modulation.{number}"),)


def in_diffusers(patch_size: int) -> Naming:
    """Returns the function that names a layer's tensors in diffusers' file."""

    def naming(path: str) -> tuple[str, ...]:
        found = re.fullmatch(rf"({'|'.join(BLOCKS)})_(\d+)/(.+)", path)
        if found and found[3] in IN_DIFFUSERS:
            return tuple(f"{found[1]}.{found[2]}.{n}" for n in IN_DIFFUSERS[found[3]].split())
        (name,) = in_original(path)
        return (re.sub(r"^(x_embedder|final_layer)", rf"all_\1.{patch_size}-1", name),)

    return naming


@dataclass(frozen=True)
class Sizes:
    """The sizes that follow from the shapes of a Z-Image."""

    depth: int
    refiner_depth: int
    width: int
    patch_size: int
    in_channels: int
    mlp_width: int
    time_width: int
    time_mlp_width: int
    text_width: int
    head_dim: int | None


def original_plan(state: StateDict, choices: Choices, _: Mapping[str, Any] | None) -> Plan:
    """Returns the plan for the authors' file."""
    return plan_of(sizes_of(state.tensors, in_original, PATCH), choices, {}, in_original)


def diffusers_plan(state: StateDict, choices: Choices, config: Mapping[str, Any] | None) -> Plan:
    """Returns the plan for diffusers' file; `config` is its config.json, if there is one."""
    keys = (re.match(r"all_x_embedder\.(\d+)-1\.", key) for key in state.tensors)
    found = sorted({int(match[1]) for match in keys if match})
    if len(found) > 1:
        raise UserError(
            f"there are embedders of patches of {' and '.join(map(str, found))}; only one size is "
            "supported."
        )
    naming = in_diffusers(found[0] if found else PATCH)
    sizes = sizes_of(state.tensors, naming, found[0] if found else PATCH)
    settings = {} if config is None else checked(config, sizes)
    return plan_of(sizes, choices, settings, naming)


def checked(config: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """Returns the settings of a config.json that fits the weights.

    Raises:
        UserError: if it is of another class, is not understood, or contradicts the weights.
    """
    settings = network_settings(config, Z_IMAGE, [CLASS_NAME])
    patches = settings["all_patch_size"]
    stated = {
        "all_patch_size": (patches and list(patches), [sizes.patch_size]),
        "in_channels": (settings["in_channels"], sizes.in_channels),
        "dim": (settings["dim"], sizes.width),
        "n_layers": (settings["n_layers"], sizes.depth),
        "n_refiner_layers": (settings["n_refiner_layers"], sizes.refiner_depth),
        "cap_feat_dim": (settings["cap_feat_dim"], sizes.text_width),
        "qk_norm": (settings["qk_norm"], sizes.head_dim is not None),
    }
    for key, (says, has) in stated.items():
        if says is not None and says != has:
            raise UserError(f"config.json says {key} = {says}, but the weights have {has}.")
    return settings


def plan_of(sizes: Sizes, choices: Choices, settings: Mapping[str, Any], naming: Naming) -> Plan:
    """Returns the plan of a network of these sizes."""
    notes: list[str] = []
    stated = choices.num_heads or settings.get("n_heads")
    heads = num_heads(sizes.width, stated, sizes.head_dim, HEAD_DIM, notes)
    axes = choices.rope_axes or settings.get("axes_dims")
    lengths = rope_lengths(settings.get("axes_lens"), notes)
    limit = 2**16
    config = {
        "sample_size": sample_size(choices.input_size, None, limit, sizes.patch_size, notes),
        "patch_size": sizes.patch_size,
        "in_channels": sizes.in_channels,
        "hidden_size": sizes.width,
        "depth": sizes.depth,
        "refiner_depth": sizes.refiner_depth,
        "num_heads": heads,
        "mlp_width": sizes.mlp_width,
        "time_width": sizes.time_width,
        "time_mlp_width": sizes.time_mlp_width,
        "time_unit": float(settings.get("t_scale", 1000.0)),
        "norm_eps": float(settings.get("norm_eps", 1e-5)),
        "qk_norm": sizes.head_dim is not None,
        "rope_axes": rope_axes(sizes.width // heads, ROPE_AXES, axes, notes),
        "rope_lengths": lengths,
        "rope_base": float(settings.get("rope_theta", 256.0)),
        "text_width": sizes.text_width,
        "text_length": min(TEXT_LENGTH, (lengths[0] - 2) // MULTIPLE * MULTIPLE),
    }
    notes.append(TEXT_NOTE.format(config["text_length"]))
    leaves = tuple(leaves_of(sizes, naming))
    return Plan("z-image", config, leaves, tuple(notes), frozenset([LEFT]))


def rope_lengths(said: Any, notes: list[str]) -> tuple[int, ...]:
    """Returns how many positions each coordinate has; `notes` say an assumption."""
    if said is None:
        notes.append(f"rope_lengths taken to be {ROPE_LENGTHS}, as published")
        return ROPE_LENGTHS
    lengths = tuple(said)
    if len(lengths) != 3 or any(type(n) is not int or n < 1 for n in lengths):
        raise UserError(f"config.json says axes_lens={list(lengths)}; give three positive numbers.")
    if lengths[0] < MULTIPLE + 2:
        raise UserError(
            f"config.json says axes_lens={list(lengths)}: a text of {MULTIPLE} rows and an image need "
            f"{MULTIPLE + 2} positions of the first."
        )
    return lengths


def sizes_of(tensors: Mapping[str, StoredTensor], naming: Naming, patch_size: int) -> Sizes:
    """Returns the sizes of the network from its shapes."""

    def shape(path: str) -> tuple[int, ...]:
        return shape_of(tensors, f"{naming(path)[0]}.weight", 2)

    depth, refiner, other = (
        block_count(tensors, f"{name}.") for name in ("layers", "noise_refiner", "context_refiner")
    )
    if not depth or not refiner or refiner != other:
        raise UserError(
            f"there are {depth} layers, {refiner} blocks of noise_refiner and {other} of "
            "context_refiner; a Z-Image has some of each, and as many of the last two."
        )
    width, features = shape("x_embedder")[0], shape("final_layer/linear")[0]
    if features % patch_size**2:
        raise UserError(
            f"a patch has {features} channels, which are no multiple of its {patch_size}x{patch_size} "
            "latents."
        )
    (norm,) = shape_of(tensors, f"{naming('cap_embedder_0')[0]}.weight", 1)
    (time_mlp_width, _), (time_width, _) = shape("t_embedder/mlp_0"), shape("t_embedder/mlp_2")
    return Sizes(
        depth=depth,
        refiner_depth=refiner,
        width=width,
        patch_size=patch_size,
        in_channels=features // patch_size**2,
        mlp_width=shape("layers_0/feed_forward/w1")[0],
        time_width=time_width,
        time_mlp_width=time_mlp_width,
        text_width=most_common([shape("cap_embedder_1")[1], norm, TEXT_WIDTH]),
        head_dim=head_dim(tensors, NORMS),
    )


def leaves_of(sizes: Sizes, naming: Naming) -> list[Leaf]:
    """Returns the leaves of the network, under the names of either layout."""
    D, A, features = sizes.width, sizes.time_width, sizes.patch_size**2 * sizes.in_channels
    leaves: list[Leaf] = []

    def add(path: str, rows: int, columns: int, bias: bool = True) -> None:
        leaves.extend(layer(path, naming(path), (rows, columns), bias=bias))

    def add_norm(path: str, width: int) -> None:
        leaves.append(Leaf(f"{path}/scale", (f"{naming(path)[0]}.weight",), ((width,),)))

    leaves += [Leaf(name, (name,), ((1, D),)) for name in ("x_pad_token", "cap_pad_token")]
    add("x_embedder", D, features)
    add_norm("cap_embedder_0", sizes.text_width)
    add("cap_embedder_1", D, sizes.text_width)
    add("t_embedder/mlp_0", sizes.time_mlp_width, 256)
    add("t_embedder/mlp_2", A, sizes.time_mlp_width)
    counts = (sizes.refiner_depth, sizes.refiner_depth, sizes.depth)
    for name, count in zip(BLOCKS, counts, strict=True):
        for block in (f"{name}_{i}" for i in range(count)):
            if name != "context_refiner":
                add(f"{block}/adaLN_modulation", 4 * D, A)
            add(f"{block}/attention/qkv", 3 * D, D, bias=False)
            add(f"{block}/attention/out", D, D, bias=False)
            for norm in ("q_norm", "k_norm") if sizes.head_dim else ():
                add_norm(f"{block}/attention/{norm}", sizes.head_dim or 0)
            add(f"{block}/feed_forward/w1", sizes.mlp_width, D, bias=False)
            add(f"{block}/feed_forward/w2", D, sizes.mlp_width, bias=False)
            add(f"{block}/feed_forward/w3", sizes.mlp_width, D, bias=False)
            for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
                add_norm(f"{block}/{norm}", D)
    add("final_layer/adaLN_modulation", D, A)
    add("final_layer/linear", features, D)
    return leaves


SMALL = Sizes(
    depth=2,
    refiner_depth=1,
    width=24,
    patch_size=2,
    in_channels=4,
    mlp_width=64,
    time_width=24,
    time_mlp_width=32,
    text_width=TEXT_WIDTH,
    head_dim=12,
)


def original_example() -> Example:
    """Returns a small Z-Image in the authors' layout."""
    choices = {"rope_axes": (4, 4, 4), "input_size": 4}
    return Example(tuple(leaves_of(SMALL, in_original)), choices)


def diffusers_example() -> Example:
    """Returns a small Z-Image in diffusers' layout with its config.json."""
    config = {
        "_class_name": CLASS_NAME,
        "dim": 24,
        "n_heads": 2,
        "axes_dims": [4, 4, 4],
        "axes_lens": [128, 32, 32],
    }
    return Example(tuple(leaves_of(SMALL, in_diffusers(2))), {"input_size": 4}, config=config)
