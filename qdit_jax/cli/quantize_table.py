"""The table of `qdit quantize`: bits, bytes and error of every layer, and the totals."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from qdit_jax.files import PathLike, num_bytes
from qdit_jax.methods import LayerReport
from qdit_jax.ptq import plan
from qdit_jax.quant import effective_group_size
from qdit_jax.recipes import Recipe
from qdit_jax.types import Progress


class Table:
    """What a recipe does to parameters, as lines of text; abstract parameters will do.

    Attributes:
        plans: what is done to each layer, by its path.
    """

    def __init__(self, params: Any, recipe: Recipe) -> None:
        self.params = params
        self.recipe = recipe
        self.plans = {layer.path: layer for layer in plan(params, recipe)}
        self.width = max(map(len, ("layer", *self.plans)))  # of the first column

    def header(self, measured_on: str) -> str:
        """Returns the first line; the last column holds errors of `"weights"` or `"outputs"`."""
        return (
            f"{'layer':{self.width}}  {'K x N':>11}  {'weights':8}  {'inputs':8}  "
            f"{'bytes before':>12}  {'after':>10}  {measured_on}' signal to error, dB"
        )

    def row(self, path: str, errors: str = "-") -> str:
        """Returns a layer's line."""
        layer = self.plans[path]
        k, n = layer.shape
        return (
            f"{path:{self.width}}  {f'{k} x {n}':>11}  {short(layer.spec.weight, k):8}  "
            f"{short(layer.spec.act, k):8}  {layer.bytes_before:12,}  {layer.bytes_after:10,}  "
            f"{errors:>9}"
        )

    def told(self, event: Progress) -> Progress:
        """Returns the news with a finished layer as its line."""
        if not isinstance(event.layer, LayerReport):
            return event
        return dataclasses.replace(event, text=self.row(event.layer.path, errors(event.layer)))

    def totals(
        self, written: Any = None, folders: Mapping[str, PathLike] | None = None
    ) -> dict[str, Any]:
        """Returns bytes before and after: of the layers, of all parameters, and on disk.

        Args:
            written: the quantized parameters, if it was done; else the plan's bytes are counted.
            folders: the checkpoints `before` and `after`, once both are written.
        """
        layers = {
            "before": sum(layer.bytes_before for layer in self.plans.values()),
            "after": sum(layer.bytes_after for layer in self.plans.values()),
        }
        before = sum(map(nbytes, jax.tree.leaves(self.params)))
        after = before - layers["before"] + layers["after"]
        if written is not None:
            after = sum(map(nbytes, jax.tree.leaves(written)))
        disk = {side: num_bytes(path) for side, path in (folders or {}).items()}
        return {
            "recipe": self.recipe.name,
            "num_layers": len(self.plans),
            "layers": layers,
            "parameters": {"before": before, "after": after},
            **({"disk": disk} if disk else {}),
            "attention_operands_left": self.recipe.operands_left(self.params),
        }


def errors(layer: LayerReport) -> str:
    """Returns a layer's errors in dB as its line shows them."""
    warning = "" if layer.warning is None else f"  ! {layer.warning}"
    if layer.nearest_db is None:
        return f"{layer.error_db:.1f}".rjust(9) + warning
    kept = "  kept nearest" if layer.fell_back else ""
    return f"{layer.nearest_db:.1f} -> {layer.error_db:.1f}{kept}{warning}"


def short(spec: Any, num_channels: int) -> str:
    """Returns a spec in few letters, such as `4b g128` or `fp8_e4m3 g96`: the group size that the layer really has.

    `x2` stands for two levels of scales, `s` for symmetric integers.
    """
    if spec is None:
        return "-"
    size = effective_group_size(num_channels, spec.group_size)
    if spec.fmt is not None:
        return f"{spec.fmt.name} g{size}"
    levels = "x2" if getattr(spec, "scale_levels", 1) == 2 else ""
    return f"{spec.bits}b g{size}" + levels + ("s" if spec.symmetric else "")


def totals_text(found: Mapping[str, Any]) -> str:
    """Returns `totals` as lines: what the whole checkpoint did first, its layers after.

    A last line tells of attention operands that a broad pattern matches and leaves, if any.
    """
    names = {
        "parameters": "bytes of all parameters",
        "disk": "bytes on disk",
        "layers": f"{found['num_layers']} layers of these, bytes by the formula",
    }
    lines = [
        f"{text}: {found[name]['before']:,} -> {found[name]['after']:,} "
        f"({found[name]['before'] / max(found[name]['after'], 1):.2f}x smaller)"
        for name, text in names.items()
        if name in found
    ]
    if left := found["attention_operands_left"]:
        kinds = ", ".join(dict.fromkeys(path.rpartition("/")[2] for path in left))
        lines.append(
            f"attention operands left: {len(left)} ({kinds}); a pattern that matches layers too "
            "leaves them, --attention w16a8 quantizes them"
        )
    return "\n".join(lines)


def nbytes(leaf: Any) -> int:
    """Returns the bytes of an array, abstract or not."""
    return int(np.prod(leaf.shape, dtype=np.int64)) * np.dtype(leaf.dtype).itemsize
