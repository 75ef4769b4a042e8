"""The authors' layout of LightningDiT: DiT's names, with norms, a gated MLP and stored rope tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qdit_convert.choices import Choices
from qdit_convert.dit import (
    SMALL,
    input_size,
    label_config,
    out_channels,
)
from qdit_convert.plan import (
    Example,
    Leaf,
    Plan,
    affine,
    block_count,
    convolution,
    most_common,
    shape_of,
)
from qdit_convert.sizes import check_channels
from qdit_convert.tensors import StateDict, StoredTensor
from qdit_convert.training_args import Arguments, unknown_note
from qdit_jax.diffusion import shown
from qdit_jax.errors import UserError

OWN = ("feat_rope.", "blocks.0.mlp.w12.", "blocks.0.norm1.", "blocks.0.attn.q_norm.")
HEADS = 16  # of the published XL and 1p0B sizes, from width 1152 on
LATENTS = (
    "latents are those of an autoencoder (VA-VAE) less a mean and over a deviation per channel, which "
    "the file does not hold: undo that before you decode"
)


@dataclass(frozen=True)
class Shape:
    """What the shapes of the tensors tell of a LightningDiT."""

    depth: int
    width: int
    patch_size: int
    in_channels: int
    out_channels: int
    mlp_width: int
    table_rows: int
    rms_norm: bool
    qk_norm: bool
    shifts: bool
    head_width: int | None
    rope: bool


def is_lightning(state: StateDict) -> bool:
    """Returns whether a file in the names of DiT has what only a LightningDiT has."""
    return any(key.startswith(OWN) for key in state.tensors)


def lightning_plan(state: StateDict, choices: Choices, _: Mapping[str, Any] | None) -> Plan:
    """Returns the plan for a LightningDiT."""
    shape = lightning_shape(state.tensors)
    heads, notes = lightning_heads(shape, choices.num_heads)
    num_tokens = shape_of(state.tensors, "pos_embed", 3)[1]
    config = {
        "input_size": input_size(num_tokens, shape.patch_size, choices.input_size),
        "patch_size": shape.patch_size,
        "in_channels": shape.in_channels,
        "hidden_size": shape.width,
        "depth": shape.depth,
        "num_heads": heads,
        "mlp_width": shape.mlp_width,
        "learn_sigma": shape.out_channels == 2 * shape.in_channels,
        "rms_norm": shape.rms_norm,
        "rope": shape.rope,
        "qk_norm": shape.qk_norm,
        "shifts": shape.shifts,
        **label_config(shape.table_rows, choices.num_classes),
    }
    hints = tuple(f"{key}={shown(value)}" for key, value in state.hints.items())
    notes += [LATENTS, *unknown_note(Arguments({}, {}, hints))]
    leaves = lightning_leaves(shape, num_tokens, shape.width // heads)
    return Plan("lightningdit", config, tuple(leaves), tuple(notes))


def lightning_shape(tensors: Mapping[str, StoredTensor]) -> Shape:
    """Returns what shapes tell; a single wrong one is outvoted, to be named later."""
    depth = block_count(tensors, "blocks.")
    if depth == 0:
        raise UserError("there are no blocks (blocks.0.attn.qkv.weight and so on).")
    _, channels, patch, _ = shape_of(tensors, "x_embedder.proj.weight", 4)
    block = "blocks.0"
    if not any(".mlp.w12." in key for key in tensors):
        raise UserError(
            "its MLPs are not gated (no blocks.*.mlp.w12.*): a LightningDiT without SwiGLU, which was "
            "never published, is not supported."
        )
    widths = ("x_embedder.proj.weight", "t_embedder.mlp.2.weight", f"{block}.attn.proj.weight")
    width = most_common([tensors[key].shape[0] for key in widths if key in tensors])
    mlp = [t.shape[0] for k, t in tensors.items() if k.endswith(".mlp.w12.weight") and t.shape]
    adaln = [
        t.shape[0]
        for key, t in tensors.items()
        if key.startswith("blocks.") and key.endswith(".adaLN_modulation.1.weight") and t.shape
    ]
    out = out_channels(shape_of(tensors, "final_layer.linear.weight", 2)[0], patch)
    check_channels(channels, out)
    told = [
        tensors[key].shape[-1]
        for key in ("feat_rope.freqs_cos", "feat_rope.freqs_sin", f"{block}.attn.q_norm.weight")
        if key in tensors and tensors[key].shape and width % tensors[key].shape[-1] == 0
    ]
    return Shape(
        depth=depth,
        width=width,
        patch_size=patch,
        in_channels=channels,
        out_channels=out,
        mlp_width=most_common([*mlp, 4 * width]) // 2,
        table_rows=shape_of(tensors, "y_embedder.embedding_table.weight", 2)[0],
        rms_norm=any(".norm1." in key for key in tensors),
        qk_norm=any(".attn.q_norm." in key for key in tensors),
        shifts=most_common([*adaln, 6 * width]) != 4 * width,
        head_width=most_common(told) if told else None,
        rope=any(key.startswith("feat_rope.") for key in tensors),
    )


def lightning_heads(shape: Shape, asked: int | None) -> tuple[int, list[str]]:
    """Returns the number of heads, and notes on where it comes from.

    Raises:
        UserError: if nothing tells it, or `asked` is another than the tables'.
    """
    told = shape.width // shape.head_width if shape.head_width else None
    if asked is not None and (told not in (None, asked) or asked < 1 or shape.width % asked):
        heads = "" if told is None else f", and its tables are those of {told} heads"
        raise UserError(f"num_heads={asked} does not fit: the width is {shape.width}{heads}.")
    if asked is None and told is None:
        if shape.width < 1152:
            raise UserError(
                "shapes cannot tell the number of attention heads without rope tables; pass --num-heads."
            )
        return HEADS, [f"num_heads={HEADS} taken, as of the published networks"]
    found = asked or told
    assert found is not None
    return found, []


def lightning_leaves(shape: Shape, num_tokens: int, head_width: int) -> list[Leaf]:
    """Returns the leaves of the network."""
    D, p, mlp = shape.width, shape.patch_size, shape.mlp_width
    table = "y_embedder.embedding_table.weight"
    leaves = [
        Leaf("pos_embed", ("pos_embed",), ((1, num_tokens, D),)),
        *affine("x_embedder/proj", "x_embedder.proj", (D, shape.in_channels, p, p), convolution),
        *affine("t_embedder/mlp_0", "t_embedder.mlp.0", (D, 256)),
        *affine("t_embedder/mlp_2", "t_embedder.mlp.2", (D, D)),
        Leaf("y_embedder/embedding_table", (table,), ((shape.table_rows, D),)),
    ]
    if shape.rope:
        leaves += [
            Leaf(f"feat_rope/{name}", (f"feat_rope.{name}",), ((num_tokens, head_width),))
            for name in ("freqs_cos", "freqs_sin")
        ]
    for i in range(shape.depth):
        leaves += block_leaves(shape, f"blocks_{i}", f"blocks.{i}", head_width, mlp)
    leaves += scale("final_layer/norm_final", "final_layer.norm_final", D) if shape.rms_norm else []
    leaves += affine("final_layer/adaLN_modulation", "final_layer.adaLN_modulation.1", (2 * D, D))
    leaves += affine("final_layer/linear", "final_layer.linear", (p * p * shape.out_channels, D))
    return leaves


def block_leaves(shape: Shape, new: str, old: str, head_width: int, mlp: int) -> list[Leaf]:
    """Returns the leaves of one block."""
    D = shape.width
    leaves = affine(
        f"{new}/adaLN_modulation", f"{old}.adaLN_modulation.1", ((6 if shape.shifts else 4) * D, D)
    )
    if shape.rms_norm:
        leaves += scale(f"{new}/norm1", f"{old}.norm1", D) + scale(
            f"{new}/norm2", f"{old}.norm2", D
        )
    leaves += affine(f"{new}/attn/qkv", f"{old}.attn.qkv", (3 * D, D))
    if shape.qk_norm:
        for name in ("q_norm", "k_norm"):
            leaves += scale(f"{new}/attn/{name}", f"{old}.attn.{name}", head_width)
    leaves += affine(f"{new}/attn/proj", f"{old}.attn.proj", (D, D))
    leaves += affine(f"{new}/mlp/w12", f"{old}.mlp.w12", (2 * mlp, D))
    leaves += affine(f"{new}/mlp/w3", f"{old}.mlp.w3", (D, mlp))
    return leaves


def scale(path: str, key: str, width: int) -> list[Leaf]:
    """Returns the leaf of an RMS norm."""
    return [Leaf(f"{path}/scale", (f"{key}.weight",), ((width,),))]


def lightning_example() -> Example:
    """Returns a small LightningDiT with everything but q/k norms."""
    shape = Shape(
        depth=2,
        width=SMALL.width,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        mlp_width=24,
        table_rows=11,
        rms_norm=True,
        qk_norm=False,
        shifts=True,
        head_width=8,
        rope=True,
    )
    return Example(tuple(lightning_leaves(shape, 4, 8)))
