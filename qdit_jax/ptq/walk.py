"""The tree map that replaces parameters by quantized leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from qdit_jax.models import OPERANDS_OF, TABLE
from qdit_jax.quant import with_leaf

# `(path of the layer, name of its kernel or table, leaf) -> leaf`
WeightFn = Callable[[str, str, Any], Any]
# `path of the layer or operand -> activation quantizer, or None for none`
ActFn = Callable[[str], Any]


def rewrite(params: Any, paths: Iterable[str], *, weight_fn: WeightFn, act_fn: ActFn) -> Any:
    """Returns `params` with the weights and activation quantizers of some layers replaced.

    Nothing else changes and no array is copied.

    Args:
        paths: of layers, label tables and operands of attention products (which have no weights).
        weight_fn: called with each layer's kernel or table.
        act_fn: called with each path.
    """
    flat = dict(flatten_dict(params, sep="/"))
    for path in paths:
        name = weight_name(flat, path)
        if (quantizer := act_fn(path)) is not None:
            place = path.replace(OPERANDS_OF, "/")  # beside the attention's layers
            flat = with_leaf(flat, place, "act_quant", quantizer, operand=name is None)
        if name is not None:
            flat[name] = weight_fn(path, name, flat[name])
    return unflatten_dict(flat, sep="/")


def weight_name(flat: dict[str, Any], path: str) -> str | None:
    """Returns the key of a layer's kernel or table; None for operands of attention products."""
    return next((name for name in (f"{path}/kernel", path + TABLE) if name in flat), None)
