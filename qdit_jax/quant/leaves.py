"""The table of what a parameter tree may hold beside arrays: each leaf's type, and where it stands.

A row is all that a new leaf needs: the codec writes and reads it, `Linear` applies it, and whoever
builds a tree puts it in its place with `with_leaf`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from qdit_jax.quant import formats
from qdit_jax.quant.act import ActQuant
from qdit_jax.quant.input_maps import InputMap, LowRank, Rotation
from qdit_jax.quant.over_time import BitsOverTime
from qdit_jax.quant.qtensor import QTensor
from qdit_jax.quant.specs import ActSpec

# What a leaf does in its layer, `x` being the layer's input and `y` its output:
#   parameter  stands in place of an array of the network
#   quantizer  `leaf(x)` is what the kernel is multiplied with
#   input      `x = leaf(x)`, before the quantizer
#   output     `y = y + leaf(x)`, with `x` after the input leaves; the quantizer sees `leaf.rest(x)`
#   schedule   in no layer, but at the root of the tree: the denoiser reads it at every timestep
Role = Literal["parameter", "quantizer", "input", "output", "schedule"]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A row of the table.

    Attributes:
        cls: a dataclass and pytree; its fields are arrays and static values.
        role: what it does in its layer, see `Role`.
        slot: the name of its entry beside a layer's `kernel`; None for a parameter or schedule.
        operand_suffix: of its entry for an operand of an attention product; None if operands have
            no such entry.
        statics: how static fields that are no plain JSON values are read back.
    """

    cls: type
    role: Role
    slot: str | None = None
    operand_suffix: str | None = None
    statics: Mapping[str, Callable[[Any], Any]] = dataclasses.field(default_factory=dict)


# By the name that a checkpoint's `model.json` gives the type.
LEAVES: dict[str, Leaf] = {
    "QTensor": Leaf(QTensor, "parameter", statics={"fmt": formats.by_name, "shape": tuple}),
    "ActQuant": Leaf(
        ActQuant, "quantizer", "act_quant", "_quant", statics={"spec": ActSpec.from_json}
    ),
    # The order of two input leaves is the order in which they work.
    "InputMap": Leaf(InputMap, "input", "input_map"),
    "Rotation": Leaf(Rotation, "input", "rotation"),
    "LowRank": Leaf(LowRank, "output", "low_rank"),
    "BitsOverTime": Leaf(BitsOverTime, "schedule", statics={"bits": tuple, "weight_bits": tuple}),
}


def slots(role: Role) -> list[str]:
    """Returns the names of the entries beside a kernel with that role, in the table's order."""
    return [leaf.slot for leaf in LEAVES.values() if leaf.role == role and leaf.slot is not None]


def with_leaf(
    flat: Mapping[str, Any], path: str, slot: str, leaf: Any, *, operand: bool = False
) -> dict[str, Any]:
    """Returns the flat tree `flat` (paths joined by `/`) with `leaf` in a slot of the layer `path`.

    Args:
        slot: such as `"act_quant"`.
        operand: `path` is an operand of an attention product, such as `blocks_0/attn/q`.

    Raises:
        ValueError: if there is no such slot, or operands have none.
    """
    return {**flat, entry_name(path, slot, operand=operand): leaf}


def entry_name(path: str, slot: str, *, operand: bool = False) -> str:
    """Returns the key of a slot in a flat tree; see `with_leaf`."""
    rows = {leaf.slot: leaf for leaf in LEAVES.values() if leaf.slot is not None}
    if slot not in rows:
        raise ValueError(f"slot={slot!r} of {path} is not known; use one of {', '.join(rows)}.")
    if not operand:
        return f"{path}/{slot}"
    if (suffix := rows[slot].operand_suffix) is None:
        raise ValueError(f"slot={slot!r}: {path} is an operand of a product and has none.")
    return path + suffix
