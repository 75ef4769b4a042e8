"""The facebook layout of DiT, which SiT shares.

Dimensions: N tokens, D width, C channels, p patch size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qdit_convert.choices import Choices
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
from qdit_convert.sizes import check_channels, check_heads, mlp_ratio, voted_width
from qdit_convert.tensors import StateDict, StoredTensor, shape_text
from qdit_convert.training_args import (
    SAYS,
    Arguments,
    check_input_size,
    check_process,
    check_sizes,
    read_arguments,
    said_classes,
    said_heads,
    says_repa,
    unknown_note,
)
from qdit_jax.errors import UserError
from qdit_jax.models import SIZES, published_config

PROJECTORS = "projectors."  # REPA's, from its hidden features to those of another encoder
# (depth, width) -> heads, as published.
PUBLISHED = {(depth, width): heads for depth, width, heads in SIZES.values()}


@dataclass(frozen=True)
class Sizes:
    """The sizes that follow from the shapes of a DiT, in any layout."""

    depth: int
    width: int
    patch_size: int
    in_channels: int
    out_channels: int
    mlp_width: int
    table_rows: int


def facebook_plan(state: StateDict, choices: Choices, velocity: bool) -> Plan:
    """Returns the plan for a DiT, or for a SiT if `velocity`."""
    tensors = state.tensors
    sizes = facebook_sizes(tensors)
    check_model(choices.model, sizes)
    said = read_arguments(state.hints)
    check_process(said, velocity)
    notes = check_sizes(said, sizes, choices.model)
    num_tokens = shape_of(tensors, "pos_embed", 3)[1]
    if choices.input_size is None:
        check_input_size(said, sizes, num_tokens)
    heads = said_heads(said, choices.num_heads, sizes.width)
    if choices.model is None and heads is not None:
        choices = replace(choices, num_heads=heads)
    classes = choices.num_classes
    stated = said_classes(said, sizes.table_rows) if classes is None else classes
    config = dit_config(sizes, num_heads(sizes, choices))
    config |= label_config(sizes.table_rows, stated)
    config |= {"input_size": input_size(num_tokens, sizes.patch_size, choices.input_size)}
    projectors = frozenset(key for key in tensors if key.startswith(PROJECTORS))
    config |= flow_config(choices, velocity, said, bool(projectors), notes)
    notes += overridden(said, choices, config)
    if projectors:
        notes.append(f"{len(projectors)} tensors ({PROJECTORS}*) are of training only: left out")
    notes += unknown_note(said)
    leaves = tuple(facebook_leaves(sizes, num_tokens))
    return Plan("dit", config, leaves, tuple(notes), projectors)


def flow_config(
    choices: Choices, velocity: bool, said: Arguments, projectors: bool, notes: list[str]
) -> dict[str, Any]:
    """Returns the fields of a velocity's time, and adds to `notes` where they come from.

    SiT's time is 0 at the noise; REPA's, whose files hold projectors, is 0 at the data, and its
    velocity points to the noise.
    """
    if not velocity:
        if choices.noise_time is not None:
            raise UserError(
                f"noise_time={choices.noise_time} is of a network that predicts a velocity; pass "
                "--family sit if this is one."
            )
        return {"velocity": False}
    if choices.noise_time not in (None, 0, 1):
        raise UserError(f"noise_time={choices.noise_time} is not understood; use 0 or 1.")
    noise_time = choices.noise_time
    repa = projectors or says_repa(said)
    if noise_time is None:
        noise_time = 1 if repa else 0
        reason = "as REPA trains" if repa else "as SiT trains"
        if not repa and said.get("path_type") is None and said.get("prediction") is None:
            reason += "; the file cannot tell: REPA's runs the other way, --noise-time 1"
        notes.append(f"time taken to be {noise_time} at noise, {1 - noise_time} at data ({reason})")
    return {
        "velocity": True,
        "noise_time": float(noise_time),
        "data_time": float(1 - noise_time),
    }


def overridden(said: Arguments, choices: Choices, config: Mapping[str, Any]) -> list[str]:
    """Returns notes on arguments of the file that the user's options override."""
    names = {"num_heads": choices.num_heads, "num_classes": choices.num_classes}
    names |= {"num_heads": choices.num_heads or (choices.model and config["num_heads"])}
    return [
        f"{SAYS} {said.names[name]}={said.get(name)}; {config[name]} taken, as asked"
        for name, chosen in names.items()
        if chosen is not None and said.get(name) not in (None, config[name])
    ]


def facebook_sizes(tensors: Mapping[str, StoredTensor]) -> Sizes:
    """Returns the sizes of the network; a single wrong shape is outvoted, to be named later."""
    depth = block_count(tensors, "blocks.")
    if depth == 0:
        raise UserError("there are no blocks (blocks.0.attn.qkv.weight and so on).")
    _, in_channels, patch_size, _ = shape_of(tensors, "x_embedder.proj.weight", 4)
    votes = {
        "x_embedder.proj.weight": (0, 4),
        "t_embedder.mlp.2.weight": (0, 2),
        "final_layer.linear.weight": (1, 2),
        "y_embedder.embedding_table.weight": (1, 2),
        "pos_embed": (2, 3),
        "blocks.0.attn.proj.weight": (0, 2),
    }
    width = voted_width(tensors, votes)
    mlp = [t.shape[0] for k, t in tensors.items() if k.endswith(".mlp.fc1.weight") and t.shape]
    return Sizes(
        depth=depth,
        width=width,
        patch_size=patch_size,
        in_channels=in_channels,
        out_channels=out_channels(shape_of(tensors, "final_layer.linear.weight", 2)[0], patch_size),
        mlp_width=most_common([*mlp, 4 * width]),
        table_rows=shape_of(tensors, "y_embedder.embedding_table.weight", 2)[0],
    )


def facebook_leaves(sizes: Sizes, num_tokens: int) -> list[Leaf]:
    """Returns the 12 + 10 * depth leaves."""
    D, p, mlp = sizes.width, sizes.patch_size, sizes.mlp_width
    table = "y_embedder.embedding_table.weight"
    leaves = [
        Leaf("pos_embed", ("pos_embed",), ((1, num_tokens, D),)),
        *affine("x_embedder/proj", "x_embedder.proj", (D, sizes.in_channels, p, p), convolution),
        *affine("t_embedder/mlp_0", "t_embedder.mlp.0", (D, 256)),
        *affine("t_embedder/mlp_2", "t_embedder.mlp.2", (D, D)),
        Leaf("y_embedder/embedding_table", (table,), ((sizes.table_rows, D),)),
    ]
    for i in range(sizes.depth):
        new, old = f"blocks_{i}", f"blocks.{i}"
        leaves += affine(f"{new}/adaLN_modulation", f"{old}.adaLN_modulation.1", (6 * D, D))
        leaves += affine(f"{new}/attn/qkv", f"{old}.attn.qkv", (3 * D, D))
        leaves += affine(f"{new}/attn/proj", f"{old}.attn.proj", (D, D))
        leaves += affine(f"{new}/mlp/fc1", f"{old}.mlp.fc1", (mlp, D))
        leaves += affine(f"{new}/mlp/fc2", f"{old}.mlp.fc2", (D, mlp))
    out = p * p * sizes.out_channels
    leaves += affine("final_layer/adaLN_modulation", "final_layer.adaLN_modulation.1", (2 * D, D))
    leaves += affine("final_layer/linear", "final_layer.linear", (out, D))
    return leaves


SMALL = Sizes(
    depth=2, width=16, patch_size=2, in_channels=4, out_channels=8, mlp_width=64, table_rows=11
)


def facebook_example() -> Example:
    """Returns a small DiT, which may be a SiT as well."""
    return Example(tuple(facebook_leaves(SMALL, num_tokens=4)), {"num_heads": 2})


def sit_example() -> Example:
    """Returns a small SiT with its training arguments."""
    said = {"path_type": "Linear", "prediction": "velocity"}
    return replace(facebook_example(), hints=said)


def dit_config(sizes: Sizes, heads: int) -> dict[str, Any]:
    """Returns the fields of the model that follow from `sizes`."""
    C, out = sizes.in_channels, sizes.out_channels
    check_channels(C, out)
    check_heads(sizes.width, heads)
    return {
        "patch_size": sizes.patch_size,
        "in_channels": C,
        "hidden_size": sizes.width,
        "depth": sizes.depth,
        "num_heads": heads,
        "mlp_ratio": mlp_ratio(sizes.mlp_width, sizes.width),
        "learn_sigma": out == 2 * C,
        "frequency_shift": 0,
        "mlp_norm_eps": 1e-6,
        "velocity": False,
    }


def out_channels(features: int, patch_size: int) -> int:
    """Returns the output channels of a final layer with `features` rows."""
    if features % patch_size**2:
        raise UserError(
            f"the final layer has {features} rows, which patches of {patch_size}x{patch_size} do not divide."
        )
    return features // patch_size**2


def check_model(model: str | None, sizes: Sizes) -> None:
    """Raises `UserError` if `model` is unknown, or another size than the file's."""
    if model is None:
        return
    try:
        said = published_config(model)
    except ValueError as error:
        raise UserError(str(error)) from None
    if (said["depth"], said["hidden_size"], said["patch_size"]) != (
        sizes.depth,
        sizes.width,
        sizes.patch_size,
    ):
        raise UserError(
            f"{model} has {said['depth']} blocks of width {said['hidden_size']} and patches of "
            f"{said['patch_size']}, but the file has {sizes.depth} blocks of width {sizes.width} and "
            f"patches of {sizes.patch_size}."
        )


def num_heads(sizes: Sizes, choices: Choices) -> int:
    """Returns the number of heads: as published for this size, or the user's option."""
    published = PUBLISHED.get((sizes.depth, sizes.width))
    if choices.num_heads is None and published is None:
        raise UserError(
            f"{sizes.depth} blocks of width {sizes.width} is not a published size, and shapes cannot tell the "
            "number of attention heads; pass --num-heads."
        )
    if choices.num_heads is not None and choices.num_heads < 1:
        raise UserError(f"num_heads={choices.num_heads} is not a number of heads; use 1 or more.")
    if choices.model and choices.num_heads not in (None, published):
        raise UserError(
            f"{choices.model} has {published} heads, but num_heads={choices.num_heads}."
        )
    heads = choices.num_heads or published
    assert heads is not None
    return heads


def label_config(rows: int, num_classes: int | None) -> dict[str, Any]:
    """Returns the number of classes, and whether the table ends with the null class.

    Without `num_classes`, a table of 1000 rows is ImageNet without the null class; any other is
    taken to have one, as in every published training.
    """
    if num_classes is None:
        num_classes = rows if rows == 1000 else rows - 1
        if rows == 1:
            raise UserError(
                "the label table has 1 row, which leaves no class if it is the null class; pass "
                "--num-classes 1 if it is a class, and there is no null class."
            )
    if num_classes not in (rows, rows - 1) or num_classes < 1:
        fits = f"{rows - 1} (the last row is the null class) or {rows}" if rows > 1 else f"{rows}"
        raise UserError(
            f"the label table has {rows} rows, which num_classes={num_classes} does not fit; "
            f"--num-classes can be {fits}."
        )
    return {"num_classes": num_classes, "null_class": num_classes == rows - 1}


def rows_and_columns(size: int | tuple[int, ...]) -> tuple[int, int]:
    """Returns the rows and columns of a picture's latent; raises `UserError` for more numbers."""
    if isinstance(size, int):
        return size, size
    if len(size) != 2:
        raise UserError(
            f"input_size={shape_text(size)} has {len(size)} numbers; this network takes rows, or "
            "rows and columns."
        )
    return size[0], size[1]


def input_size(
    num_tokens: int, patch: int, stated: int | tuple[int, ...] | None
) -> int | tuple[int, int]:
    """Returns the latent's rows and columns (one number when equal) for `num_tokens` patches."""
    if stated is None:
        side = math.isqrt(num_tokens)
        if side * side != num_tokens:
            raise UserError(
                f"{num_tokens} positions make no square; pass --input-size ROWS COLUMNS of the latent."
            )
        return side * patch
    rows, columns = rows_and_columns(stated)
    if (
        rows < 1
        or columns < 1
        or (rows % patch or columns % patch or rows * columns != num_tokens * patch**2)
    ):
        raise UserError(
            f"input_size={shape_text((rows, columns))} in patches of {patch} does not make the "
            f"{num_tokens} positions of the file."
        )
    return rows if rows == columns else (rows, columns)
