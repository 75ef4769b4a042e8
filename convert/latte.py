"""The authors' layout of Latte for classes: DiT's names and a table of temporal positions.

A file without a label table is of a network that was trained without labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qdit_convert.choices import Choices
from qdit_convert.dit import (
    SMALL,
    Sizes,
    dit_config,
    facebook_leaves,
    facebook_sizes,
    input_size,
    label_config,
)
from qdit_convert.plan import Example, Leaf, Plan, block_count, shape_of
from qdit_convert.tensors import StateDict, StoredTensor, shape_text
from qdit_convert.training_args import (
    check_process,
    check_sizes,
    read_arguments,
    said_classes,
    said_heads,
    unknown_note,
)
from qdit_convert.video import heads_of
from qdit_jax.errors import UserError

TEMPORAL = "temp_embed"
LABELS = "y_embedder.embedding_table.weight"
TEXT = "text_embedding_projection."  # of a network for a vector of text, which no family here is


def is_latte(state: StateDict) -> bool:
    """Returns whether a file in the names of DiT is a Latte."""
    return TEMPORAL in state.tensors


def latte_plan(state: StateDict, choices: Choices, _: Mapping[str, Any] | None) -> Plan:
    """Returns the plan for a Latte with or without labels."""
    tensors = state.tensors
    if any(key.startswith(TEXT) for key in tensors):
        raise UserError(
            f"the file is of a Latte that takes a vector of text ({TEXT}*), which convert does not "
            "support; it reads the text-to-video network of diffusers."
        )
    sizes = latte_sizes(tensors)
    said = read_arguments(state.hints)
    check_process(said, velocity=False)
    notes = check_sizes(said, sizes, None)
    heads = heads_of(
        sizes.depth,
        sizes.width,
        choices.num_heads,
        said_heads(said, choices.num_heads, sizes.width),
    )
    frames = shape_of(tensors, TEMPORAL, 3)[1]
    num_tokens = shape_of(tensors, "pos_embed", 3)[1]
    config = dit_config(sizes, heads)
    config = {k: v for k, v in config.items() if k in LATTE_FIELDS}
    config |= {"num_frames": frames}
    config |= {"input_size": latte_size(choices.input_size, frames, num_tokens, sizes.patch_size)}
    config |= label_fields(sizes, choices, said_classes(said, sizes.table_rows))
    if not sizes.table_rows:
        notes.append("there is no label table: a network without labels, and without guidance")
    notes += unknown_note(said)
    return Plan("latte", config, tuple(latte_leaves(sizes, num_tokens, frames)), tuple(notes))


LATTE_FIELDS = frozenset(
    ["patch_size", "in_channels", "hidden_size", "depth", "num_heads", "mlp_ratio", "learn_sigma"]
)


def latte_sizes(tensors: Mapping[str, StoredTensor]) -> Sizes:
    """Returns the sizes of the network; `table_rows` is 0 without labels."""
    if block_count(tensors, "blocks.") % 2:
        raise UserError("the number of blocks is odd: blocks of space and of time alternate.")
    if LABELS in tensors:
        return facebook_sizes(tensors)
    none = StoredTensor((1, 0), next(iter(tensors.values())).dtype, lambda: None)  # type: ignore[arg-type,return-value]
    return replace(facebook_sizes({**tensors, LABELS: none}), table_rows=0)


def label_fields(sizes: Sizes, choices: Choices, said: int | None) -> dict[str, Any]:
    """Returns the number of classes, 0 without a label table, and whether there is a null class."""
    if sizes.table_rows:
        return label_config(
            sizes.table_rows, said if choices.num_classes is None else choices.num_classes
        )
    if choices.num_classes is not None:
        raise UserError(
            f"num_classes={choices.num_classes}, but the file has no label table; leave out --num-classes."
        )
    return {"num_classes": 0, "null_class": False}


def latte_size(
    stated: int | tuple[int, ...] | None, frames: int, num_tokens: int, patch: int
) -> int | tuple[int, int]:
    """Returns rows and columns (one number when equal) that make the positions of the file."""
    if isinstance(stated, tuple) and len(stated) == 3:
        if stated[0] != frames:
            raise UserError(
                f"input_size={shape_text(stated)}, but the file has positions of {frames} frames."
            )
        stated = stated[1:]
    if stated is None and math.isqrt(num_tokens) ** 2 != num_tokens:
        raise UserError(
            f"{num_tokens} positions make no square; pass --input-size ROWS COLUMNS of the latent."
        )
    return input_size(num_tokens, patch, stated)


def latte_leaves(sizes: Sizes, num_tokens: int, frames: int) -> list[Leaf]:
    """Returns the leaves: DiT's, and the positions in time."""
    leaves = facebook_leaves(sizes, num_tokens)
    if not sizes.table_rows:
        leaves = [leaf for leaf in leaves if leaf.sources != (LABELS,)]
    return [*leaves, Leaf(TEMPORAL, (TEMPORAL,), ((1, frames, sizes.width),))]


def latte_example() -> Example:
    """Returns a small Latte with labels."""
    return Example(tuple(latte_leaves(SMALL, num_tokens=4, frames=3)), {"num_heads": 2})
