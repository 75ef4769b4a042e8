"""The table of `qdit quantize`: bits, bytes and error of every layer, and the totals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qdit_jax.files import PathLike, num_bytes
from qdit_jax.ptq import LayerPlan
from qdit_jax.quant import effective_group_size
from qdit_jax.recipes import Recipe

WEIGHT_RATIO = "weights' signal to error, dB"
OUTPUT_RATIO = "outputs' signal to error, dB"


def header(plans: Sequence[LayerPlan], ratio: str) -> str:
    """Returns the table's first line; `ratio` is what the last column holds."""
    width = path_width(plans)
    return (
        f"{'layer':{width}}  {'K x N':>11}  {'weights':8}  {'inputs':8}  {'bytes before':>12}  "
        f"{'after':>10}  {ratio}"
    )


def row(plan: LayerPlan, plans: Sequence[LayerPlan], ratio: str) -> str:
    """Returns a layer's line."""
    k, n = plan.shape
    return (
        f"{plan.path:{path_width(plans)}}  {f'{k} x {n}':>11}  {short(plan.spec.weight, k):8}  "
        f"{short(plan.spec.act, k):8}  {plan.bytes_before:12,}  {plan.bytes_after:10,}  {ratio:>9}"
    )


def path_width(plans: Sequence[LayerPlan]) -> int:
    return max([len("layer"), *(len(plan.path) for plan in plans)])


def short(spec: Any, num_channels: int) -> str:
    """Returns a spec in few letters, such as `4b g128`: the group size that the layer really has."""
    if spec is None:
        return "-"
    size = effective_group_size(num_channels, spec.group_size)
    return f"{spec.bits}b g{size}" + ("s" if spec.symmetric else "")


def totals(
    plans: Sequence[LayerPlan],
    params: Any,
    written: Any = None,
    folders: Mapping[str, PathLike] | None = None,
) -> dict[str, Any]:
    """Returns bytes before and after: of the layers, of all parameters, and on disk.

    Args:
        params: the parameters before quantizing; abstract ones will do.
        written: those after it, if it was done; else the plan's bytes are counted.
        folders: the checkpoints `before` and `after`, once both are written.
    """
    layers = {
        "before": sum(plan.bytes_before for plan in plans),
        "after": sum(plan.bytes_after for plan in plans),
    }
    whole = sum(map(nbytes, jax.tree.leaves(params)))
    after = whole - layers["before"] + layers["after"]
    if written is not None:
        after = sum(map(nbytes, jax.tree.leaves(written)))
    found = {
        "num_layers": len(plans),
        "layers": layers,
        "parameters": {"before": whole, "after": after},
    }
    if folders is not None:
        found["disk"] = {side: num_bytes(path) for side, path in folders.items()}
    return found


def totals_text(found: Mapping[str, Any]) -> str:
    """Returns `totals` as lines: what the whole checkpoint did first, its layers after."""
    names = {
        "parameters": "bytes of all parameters",
        "disk": "bytes on disk",
        "layers": f"{found['num_layers']} layers of these, bytes by the formula",
    }
    return "\n".join(
        f"{text}: {found[name]['before']:,} -> {found[name]['after']:,} "
        f"({found[name]['before'] / max(found[name]['after'], 1):.2f}x smaller)"
        for name, text in names.items()
        if name in found
    )


def left_text(recipe: Recipe, params: Any) -> str | None:
    """Returns a line on attention operands that a broad pattern matches and leaves, if any."""
    left = recipe.operands_left(params)
    if not left:
        return None
    kinds = ", ".join(dict.fromkeys(path.rpartition("/")[2] for path in left))
    return (
        f"attention operands left: {len(left)} ({kinds}); a pattern that matches layers too leaves "
        "them, --attention w16a8 quantizes them"
    )


def nbytes(leaf: Any) -> int:
    """Returns the bytes of an array, abstract or not."""
    return int(np.prod(leaf.shape, dtype=np.int64)) * np.dtype(leaf.dtype).itemsize
