"""Parameter trees as plain arrays plus a JSON description, and back.

A quantized leaf is a dataclass: its array fields become arrays, its static fields JSON.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from qdit_jax.checkpoint.deferred import DeferredArray
from qdit_jax.quant import LEAVES, Leaf, formats, kernel_of_other, num_groups, packing
from qdit_jax.types import DERIVED, AnyArray, Params

# One sharding for all arrays, a function `(path, shape) -> sharding`, or None for no device yet.
Placement: TypeAlias = (
    jax.sharding.Sharding | Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None
)


def encode_params(params: Params) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns nested dicts of arrays, and a manifest `{path: description}` of every leaf."""
    arrays, manifest = {}, {}
    for path, leaf in flatten_dict(params, sep="/").items():
        name = type(leaf).__name__
        if name not in LEAVES:
            arrays[path] = leaf
            manifest[path] = {"type": "array", **shape_and_dtype(leaf)}
            continue
        held, static = split_fields(leaf)
        arrays |= {f"{path}/{field}": array for field, array in held.items()}
        described = {field: shape_and_dtype(array) for field, array in held.items()}
        manifest[path] = {"type": name, "arrays": described, **static}
    return unflatten_dict(arrays, sep="/"), manifest


def decode_params(arrays: Params, manifest: Mapping[str, Any]) -> Params:
    """Returns the parameter tree that `encode_params` took apart."""
    flat = flatten_dict(arrays, sep="/")
    params = {}
    for path, described in manifest.items():
        if described["type"] == "array":
            params[path] = flat[path]
            continue
        row = leaf_row(path, described)
        static = {
            field: row.statics[field](value) if field in row.statics else value
            for field, value in described.items()
            if field not in ("type", "arrays")
        }
        held = {field: flat[f"{path}/{field}"] for field in described["arrays"]}
        params[path] = row.cls(**held, **static)
    return unflatten_dict(params, sep="/")


def leaf_row(path: str, described: dict[str, Any]) -> Leaf:
    """Returns the row of a described leaf's type; raises `ValueError` for an unknown type."""
    if described["type"] not in LEAVES:
        raise ValueError(
            f"{path} is a {described['type']}, which this release does not know; it knows "
            f"{', '.join(LEAVES)}"
        )
    return LEAVES[described["type"]]


def abstract_arrays(manifest: dict[str, Any], sharding: Placement = None) -> dict[str, Any]:
    """Returns the nested dicts of `encode_params` with `jax.ShapeDtypeStruct`s in place of arrays."""
    flat = {}
    for path, described in manifest.items():
        fields = (
            {path: described}
            if described["type"] == "array"
            else {f"{path}/{field}": array for field, array in described["arrays"].items()}
        )
        for name, array in fields.items():
            shape, dtype = tuple(array["shape"]), np.dtype(array["dtype"])
            place = sharding(name, shape) if callable(sharding) else sharding
            flat[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    return unflatten_dict(flat, sep="/")


def abstract_params(manifest: dict[str, Any]) -> Params:
    """Returns the parameter tree of a manifest with shapes in place of arrays, on no device."""
    return decode_params(abstract_arrays(manifest), manifest)


def logical_shapes(manifest: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter as the network sees it, quantized or not.

    Raises:
        ValueError: if a `QTensor` is not what it says, or a kernel of other bits has another shape
            than its layer's.
    """
    leaves = {
        path: described
        for path, described in manifest.items()
        if described["type"] == "array" or leaf_row(path, described).role == "parameter"
    }
    for path, described in leaves.items():
        if described["type"] == "QTensor":
            check_packing(path, described)
    shapes = {path: tuple(described["shape"]) for path, described in leaves.items()}
    others = {path: found[0] for path in shapes if (found := kernel_of_other(path)) is not None}
    for path, own in others.items():
        if as_matrix(shapes[path]) != as_matrix(shapes[own]):
            raise ValueError(f"{path} has shape {shapes[path]}, and {own} has {shapes[own]}")
    return {path: shape for path, shape in shapes.items() if path not in others}


def as_matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of a kernel `[..., N]` as `(K, N)`."""
    return (math.prod(shape[:-1]), *shape[-1:])


def check_packing(path: str, described: dict[str, Any]) -> None:
    """Raises `ValueError` if the arrays of a `QTensor` are not those of its bits and shape."""
    arrays = described["arrays"]
    (rows, width), bits = described["shape"], described["bits"]
    count = num_groups(rows, described["group_size"])
    codes, scale = arrays["codes"], arrays["scale"]
    blocks = scale["shape"][-1]
    wanted = {"codes": [width, packing.packed_bytes(rows, bits)], "scale": [count, blocks]}
    if "packed_zero_point" in arrays:
        wanted["packed_zero_point"] = [packing.packed_bytes(count, bits), blocks]
    more = {"channel_scale": [blocks], "offset": [count, blocks], "codebook": [2**bits]}
    wanted |= {name: shape for name, shape in more.items() if name in arrays}
    for name, shape in wanted.items():
        if arrays[name]["shape"][-len(shape) :] != shape:
            raise ValueError(f"{path}/{name} is {arrays[name]['shape']}, its settings need {shape}")
    if "channel_scale" in arrays and scale["dtype"] != "uint8":
        raise ValueError(f"{path}/scale is {scale['dtype']}, two levels of scales need uint8")
    if width % blocks or codes["dtype"] != "uint8":
        raise ValueError(f"{path} holds {codes['dtype']} codes and {blocks} scales per group")


def split_fields(leaf: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the array fields and the JSON-able static fields of a quantized leaf."""
    held, static = {}, {}
    for field in dataclasses.fields(leaf):
        value = None if DERIVED.items() <= field.metadata.items() else getattr(leaf, field.name)
        if hasattr(value, "shape") and hasattr(value, "dtype"):
            held[field.name] = value
        elif value is not None:
            static[field.name] = to_json(value)
    return held, static


def to_json(value: object) -> object:
    """Returns a static field as a JSON value."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if isinstance(value, formats.Format):
        return value.name
    return list(value) if isinstance(value, tuple) else value


def shape_and_dtype(array: AnyArray | jax.ShapeDtypeStruct | DeferredArray) -> dict[str, Any]:
    return {"shape": list(array.shape), "dtype": np.dtype(array.dtype).name}
