"""The tree map that replaces parameters by quantized leaves."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from qdit_jax.models import OPERANDS_OF, TABLE
from qdit_jax.quant import entry_name

# `(path of the layer, name of its kernel or table, leaf) -> leaf`
WeightFn = Callable[[str, str, Any], Any]
# `path of the layer or operand -> activation quantizer, or None for none`
ActFn = Callable[[str], Any]
# `(path of the layer, leaf) -> further entries of the layer, by name`
BesideFn = Callable[[str, Any], Mapping[str, Any]]


def rewrite_layers(
    params: Any,
    paths: Iterable[str],
    *,
    weight_fn: WeightFn,
    act_fn: ActFn,
    beside_fn: BesideFn | None = None,
) -> Any:
    """Returns `params` with the weights and activation quantizers of some layers replaced.

    Nothing else changes and no array is copied.

    Args:
        paths: of layers, label tables and operands of attention products (which have no weights);
            `""` is a layer that is the whole network.
        weight_fn: called with each layer's kernel or table.
        act_fn: called with each path, before `weight_fn`.
        beside_fn: called with each layer's kernel or table as it is in `params`; its entries are
            placed beside it.
    """
    flat = dict(flatten_dict(params, keep_empty_nodes=True))
    keys = {"/".join(key): key for key in flat}  # not split again: names may contain a `/`
    for path in paths:
        name = weight_name(keys, path)
        quantizer = act_fn(path)
        if name is None:
            if quantizer is not None:  # beside the attention's layers
                place = entry_name(path.replace(OPERANDS_OF, "/"), "act_quant", operand=True)
                flat[tuple(place.split("/"))] = quantizer
            continue
        key, leaf = keys[name], flat[keys[name]]
        beside = {} if beside_fn is None else beside_fn(path, leaf)
        if quantizer is not None:
            beside = {**beside, "act_quant": quantizer}
        flat |= {(*key[:-1], entry): value for entry, value in beside.items()}
        flat[key] = weight_fn(path, name, leaf)
    return unflatten_dict(flat)


def weight_name(flat: Container[str], path: str) -> str | None:
    """Returns the key of a layer's kernel or table; None for operands of attention products."""
    names = (f"{path}/kernel" if path else "kernel", path + TABLE)
    return next((name for name in names if name in flat), None)
