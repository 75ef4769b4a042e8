"""Exact folds: a layer's input shifted and scaled by channel, at no cost when the model runs.

What makes the input is changed, and the layer takes the change back, so that the network computes
the same function; only what a quantiser sees differs. With input `x [.., K]`, kernel `W [K, N]`:

    x' = (x - shift) / scale,    W' = scale[:, None] * W,    b' = b + shift @ W

The inputs of qkv, fc1 and the final linear are `norm * (1 + gamma) + beta`, with gamma and beta from
adaLN; that of proj is a mean of v with weights that sum to 1. Both maps pass through those linears.
The input of fc2 comes out of GELU, which lets nothing through: for it, shift inside the quantiser
(`ActSpec.shift`).

Dimensions: K input channels, N output channels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from qdit_jax.quant import QTensor

MODULATED = {"attn/qkv": 0, "mlp/fc1": 3, "linear": 0}
Vectors = Mapping[str, Any]


class Producer(NamedTuple):
    """Columns of a linear layer that make another layer's input.

    Attributes:
        path: of the linear layer.
        chunk: which chunk of `K` columns.
        offset: added to those columns where they are used: 1 for gamma.
        shifted: whether the shift is taken off here.
    """

    path: str
    chunk: int
    offset: float
    shifted: bool


def fold_inputs(params: Any, *, scale: Vectors | None = None, shift: Vectors | None = None) -> Any:
    """Returns `params` of the same function, where the named layers see `(x - shift) / scale`.

    Fold before quantising, adaLN included.

    Args:
        scale, shift: `[K]` by layer path, such as `blocks_3/mlp/fc1`; a layer that one of the two
            leaves out has scale 1 or shift 0.

    Raises:
        ValueError: if a path is not a layer that a fold reaches, a vector does not fit or holds a
            zero scale or a value that is not finite, or a layer concerned is quantised already.
    """
    scale, shift = scale or {}, shift or {}
    flat = dict(flatten_dict(params, sep="/"))
    for path in sorted({*scale, *shift}):
        sources = producers(path)
        for name in (path, *(source.path for source in sources)):
            check_foldable(flat, path, name)
        width = flat[f"{path}/kernel"].shape[0]
        s = vector(path, "scale", scale.get(path, np.ones(width)), width)
        z = vector(path, "shift", shift.get(path, np.zeros(width)), width)
        for source in sources:
            rewrite_producer(flat, source, s, z)
        kernel, bias = flat[f"{path}/kernel"], flat[f"{path}/bias"]
        flat[f"{path}/kernel"] = (s[:, None] * kernel).astype(kernel.dtype)
        flat[f"{path}/bias"] = (bias + z @ kernel).astype(bias.dtype)
    return unflatten_dict(flat, sep="/")


def foldable(path: str) -> bool:
    """Returns whether `fold_inputs` reaches the input of the layer `path`."""
    return (
        re.fullmatch(r"blocks_\d+/(attn/(qkv|proj)|mlp/fc1)|final_layer/linear", path) is not None
    )


def producers(path: str) -> list[Producer]:
    """Returns the columns that make the input of the layer `path`."""
    if not foldable(path):
        raise ValueError(
            f"no fold reaches the input of {path!r}; use the path of a qkv, proj or fc1 such as "
            "'blocks_0/attn/qkv', or 'final_layer/linear'."
        )
    block, _, layer = path.partition("/")
    if layer == "attn/proj":
        return [Producer(f"{block}/attn/qkv", 2, 0.0, True)]
    adaln, first = f"{block}/adaLN_modulation", MODULATED[layer]
    return [Producer(adaln, first, 0.0, True), Producer(adaln, first + 1, 1.0, False)]


def rewrite_producer(
    flat: dict[str, Any],
    producer: Producer,
    scale: Float[Array, " K"],
    shift: Float[Array, " K"],
) -> None:
    """Replaces the producer's kernel and bias in `flat`; arrays are not written to."""
    width = scale.shape[0]
    columns = slice(producer.chunk * width, (producer.chunk + 1) * width)
    kernel, bias = (jnp.asarray(flat[f"{producer.path}/{name}"]) for name in ("kernel", "bias"))
    taken = shift if producer.shifted else 0.0
    moved = (bias[columns] + producer.offset - taken) / scale - producer.offset
    flat[f"{producer.path}/bias"] = bias.at[columns].set(moved.astype(bias.dtype))
    scaled = (kernel[:, columns] / scale).astype(kernel.dtype)
    flat[f"{producer.path}/kernel"] = kernel.at[:, columns].set(scaled)


def check_foldable(flat: Mapping[str, Any], path: str, name: str) -> None:
    """Raises `ValueError` if the layer `name`, which a fold at `path` changes, cannot be changed."""
    kernel = flat.get(f"{name}/kernel")
    if kernel is None:
        raise ValueError(f"the fold at {path!r} changes {name!r}, which the params lack.")
    if isinstance(kernel, QTensor) or f"{name}/act_quant" in flat:
        raise ValueError(
            f"the fold at {path!r} changes {name!r}, which is quantised; fold first, then quantise."
        )


def vector(path: str, name: str, values: Any, width: int) -> Float[Array, " K"]:
    """Returns `values` as an array; raises `ValueError` if they are no usable `name` of a layer."""
    values = np.asarray(values)
    if values.shape != (width,):
        raise ValueError(
            f"{name} of {path} has shape {values.shape}; give one value a channel, ({width},)."
        )
    if not np.isfinite(values).all() or (name == "scale" and (values == 0).any()):
        rule = "finite and not 0" if name == "scale" else "finite"
        raise ValueError(f"{name} of {path} must be {rule} in every channel.")
    return jnp.asarray(values, jnp.result_type(float))
