"""Exact folds: a layer's input shifted and scaled by channel, at no cost when the model runs.

What makes the input is changed, and the layer takes the change back, so that the network computes
the same function; only what a quantizer sees differs. With input `x [.., K]`, kernel `W [K, N]`:

    x' = (x - shift) / scale,    W' = scale[:, None] * W,    b' = b + shift @ W

An input that is `norm * (1 + gamma) + beta`, gamma and beta from a modulation, takes the map through
the modulation's linear, one that is an affine norm through the norm's own scale and bias; an
attention's output is a mean of v with weights that sum to 1, so that
the map passes through v (in a joint attention through the v of both streams, and both outputs share it).

Some places take a scale and no shift: the input `act(gate) * value` of a gated MLP through the columns of
the value, a norm or modulation without a shift, the v of a linear attention. `Family.folds` lists a
network's places; one may reach a segment of an input only. An input that comes out of GELU lets
nothing through: for it, shift inside the quantizer (`ActSpec.shift`).

Dimensions: K input channels, N output channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float

from qdit_jax.models import Covered, Family, Producer, family_of_params, layers_of
from qdit_jax.quant import QTensor

Vectors = Mapping[str, Any]


def fold_inputs(params: Any, *, scale: Vectors | None = None, shift: Vectors | None = None) -> Any:
    """Returns `params` of the same function, where the named layers see `(x - shift) / scale`.

    Fold before quantizing, adaLN included.

    Args:
        scale, shift: `[K]` by layer path, such as `blocks_3/mlp/fc1`; a layer that one of the two
            leaves out has scale 1 or shift 0. Layers that read the same input share the map: name
            one of them, or give all that are named the same. Where a fold reaches some channels of
            the input only (`Family.covered`), the scale is 1 and the shift 0 in all others.

    Raises:
        ValueError: if a path is not a layer that a fold reaches, a vector does not fit or holds a
            zero scale or a value that is not finite, a fold takes no shift, or a layer concerned is
            quantized already.
    """
    scale, shift = scale or {}, shift or {}
    flat = dict(flatten_dict(params, sep="/"))
    family = family_of_params(params)
    for path in sorted({*scale, *shift}):
        sources = producers(path, family, flat)
        assert family is not None  # else there would be no producers
        readers = [layer for layer in layers_of(flat) if made_by(layer, family, flat) == sources]
        producing = [f"{source.layer}/{source.weight}" for source in sources]
        for name in (*(f"{reader}/kernel" for reader in readers), *producing):
            check_foldable(flat, path, name)
        shape = flat[f"{path}/kernel"].shape
        s, z = shared_map(path, readers, scale, shift, shape[0])
        if s is None:
            continue
        check_covered(path, family.covered(path, flat), s, z)
        for source in sources:
            made = family.segment(path, source.inputs, shape)
            rewrite_producer(flat, family, source, s[made], z[made])
        for reader in readers:
            rewrite_reader(flat, reader, s, z)
    return unflatten_dict(flat, sep="/")


def shared_map(
    path: str, readers: list[str], scale: Vectors, shift: Vectors, width: int
) -> tuple[Any, Any]:
    """Returns scale and shift `[K]` of the input that `readers` share; None for both where an
    earlier reader among those given has taken care of it.

    Raises:
        ValueError: if two readers are given different maps.
    """
    given = [reader for reader in readers if reader in scale or reader in shift]
    maps = [
        (
            vector(name, "scale", scale.get(name, np.ones(width)), width),
            vector(name, "shift", shift.get(name, np.zeros(width)), width),
        )
        for name in given
    ]
    if any(
        not np.array_equal(one, first) for m in maps for one, first in zip(m, maps[0], strict=True)
    ):
        raise ValueError(
            f"{' and '.join(given)} read the same input; give them the same scale and shift."
        )
    return maps[0] if path == min(given) else (None, None)


def rewrite_reader(
    flat: dict[str, Any], path: str, scale: Float[np.ndarray, " K"], shift: Float[np.ndarray, " K"]
) -> None:
    """Replaces the reading layer's kernel and bias in `flat`."""
    kernel = jnp.asarray(flat[f"{path}/kernel"])
    flat[f"{path}/kernel"] = (scale[:, None] * kernel).astype(kernel.dtype)
    bias = flat.get(f"{path}/bias")
    if bias is not None:
        moved = bias + jnp.matmul(shift, kernel, precision=jax.lax.Precision.HIGHEST)
        flat[f"{path}/bias"] = moved.astype(bias.dtype)
    elif np.any(shift):
        raise ValueError(f"{path} has no bias, which a shift of its input needs; scale it only.")


def producers(path: str, family: Family | None, flat: Mapping[str, Any]) -> list[Producer]:
    """Returns the columns that make the input of the layer `path`.

    Args:
        flat: the network's parameters, paths joined by `/`.

    Raises:
        ValueError: if there are none.
    """
    found = [] if family is None else made_by(path, family, flat)
    if not found:
        known = "" if family is None else f"; it has: {', '.join(f.layers for f in family.folds)}"
        raise ValueError(
            f"no fold reaches the input of {path!r}; use the path of a layer that the family's "
            f"folds name{known}."
        )
    return found


def made_by(path: str, family: Family, flat: Mapping[str, Any]) -> list[Producer]:
    """Returns the columns that make the input of a layer, or segments of it; empty if none do."""
    fold = family.fold_of(path, flat)
    return [] if fold is None else list(fold.producers)


def check_covered(
    path: str, covered: Covered, scale: Float[np.ndarray, " K"], shift: Float[np.ndarray, " K"]
) -> None:
    """Raises `ValueError` if a map changes channels that the fold of `path` does not reach."""
    maps = (("scale", scale, 1, covered.scale), ("shift", shift, 0, covered.shift))
    for name, values, neutral, reached in maps:
        if not np.any(values[~reached] != neutral):
            continue
        if not reached.any():
            raise ValueError(
                f"the fold of {path!r} takes a scale and no shift; leave the shift out, or apply it at "
                "run time."
            )
        first, last = np.flatnonzero(reached)[[0, -1]]
        raise ValueError(
            f"the fold of {path!r} takes a {name} of input channels {first} to {last} only; give "
            f"{neutral} in all others."
        )


def rewrite_producer(
    flat: dict[str, Any],
    family: Family,
    producer: Producer,
    scale: Float[np.ndarray, " K"],
    shift: Float[np.ndarray, " K"],
) -> None:
    """Replaces the producer's weight, and its bias if any, in `flat`; arrays are not written to."""
    weight_name, bias_name = (f"{producer.layer}/{name}" for name in (producer.weight, "bias"))
    weight = jnp.asarray(flat[weight_name])
    columns = family.chunk(producer.layer, producer.output, weight.shape)
    scaled = (weight[..., columns] / scale).astype(weight.dtype)
    flat[weight_name] = weight.at[..., columns].set(scaled)
    if bias_name in flat:
        bias = jnp.asarray(flat[bias_name])
        taken = shift if producer.shifted else 0.0
        moved = (bias[columns] + producer.offset - taken) / scale - producer.offset
        flat[bias_name] = bias.at[columns].set(moved.astype(bias.dtype))
    elif producer.offset or (producer.shifted and np.any(shift)):
        raise ValueError(f"{producer.layer} has no bias, which takes up a fold's shift or offset.")


def check_foldable(flat: Mapping[str, Any], path: str, name: str) -> None:
    """Raises `ValueError` if the weight `name`, which a fold at `path` changes, cannot be changed."""
    weight, layer = flat.get(name), name.rpartition("/")[0]
    if weight is None:
        raise ValueError(f"the fold at {path!r} changes {layer!r}, which the params lack.")
    if isinstance(weight, QTensor) or f"{layer}/act_quant" in flat:
        raise ValueError(
            f"the fold at {path!r} changes {layer!r}, which is quantized; fold first, then quantize."
        )


def vector(path: str, name: str, values: Any, width: int) -> Float[np.ndarray, " K"]:
    """Returns `values` as an array; raises `ValueError` if they are no usable `name` of a layer."""
    values = np.asarray(values)
    if values.shape != (width,):
        raise ValueError(
            f"{name} of {path} has shape {values.shape}; give one value per channel, ({width},)."
        )
    if not np.isfinite(values).all() or (name == "scale" and (values == 0).any()):
        rule = "finite and not 0" if name == "scale" else "finite"
        raise ValueError(f"{name} of {path} must be {rule} in every channel.")
    return np.asarray(values, jnp.result_type(float))
