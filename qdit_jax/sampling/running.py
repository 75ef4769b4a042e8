"""Parameters in the form in which a network runs longest: made once, before a sampling loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from qdit_jax.kernels import layer_numerics, ready
from qdit_jax.models import (
    Family,
    Linear,
    Network,
    NetworkModule,
    example_inputs,
    family_of,
    tapped,
    with_runs,
)
from qdit_jax.quant import OVER_TIME, QTensor
from qdit_jax.types import Params


def running_params(model: nn.Module, params: Params) -> Params:
    """Returns `params` of the same outputs, as a loop should take them.

    Kernels that `model` multiplies in 16 bits are stored in 16 bits, with their biases, and quantized ones
    with what their products would compute of them, which each call does otherwise; and long runs of equal
    blocks are stacked, to compile in the time of one, see `with_runs`.
    """
    family = known_family(model)
    if family is None:
        return params
    params = with_ready_kernels(model, with_narrow_kernels(model, params))
    # Bits over time name layers by their paths in the whole tree.
    if OVER_TIME in params or not isinstance(model, NetworkModule) or not model.scans_blocks:
        return params
    return with_runs(params, family.block, periods=model.block_periods())


def with_narrow_kernels(model: nn.Module, params: Params) -> Params:
    """Returns `params` with the kernels that `model` multiplies in 16 bits, and their biases, stored in 16 bits.

    Biases that are added in float32 stay as they are, and so do tables, quantized kernels, layers with a
    quantized input, and their biases.
    """
    flat = dict(flatten_dict(params, sep="/"))
    names = narrow_names(model, flat)
    for name in names:
        flat[name] = narrowed(jnp.asarray(flat[name]), model.dtype)  # type: ignore[attr-defined]
    return unflatten_dict(flat, sep="/") if names else params


def narrow_names(model: nn.Module, flat: Mapping[str, Any]) -> list[str]:
    """Returns the names of the parameters that `with_narrow_kernels` stores in 16 bits.

    Args:
        flat: the network's parameters, paths joined by `/`; what it lacks is left out.
    """
    dtype, found = getattr(model, "dtype", "float32"), list[str]()
    if dtype == "float32":
        return found
    for path, output_dtype in output_dtypes(model).items():
        kernel = flat.get(f"{path}/kernel")
        if kernel is None or isinstance(kernel, QTensor) or f"{path}/act_quant" in flat:
            continue
        found.append(f"{path}/kernel")
        if output_dtype == dtype and f"{path}/bias" in flat:
            found.append(f"{path}/bias")
    return found


def output_dtypes(model: Network) -> dict[str, str]:
    """Returns the dtype in which each layer without a quantized input adds its bias, from a trace of the network."""
    found = {}

    def look(path: str, layer: Linear, x: jax.Array, call: Callable[[], jax.Array]) -> jax.Array:
        found[path] = layer.output_dtype
        return call()

    with tapped(look):
        jax.eval_shape(model.init, jax.random.key(0), *example_inputs(model))  # type: ignore[attr-defined]
    return found


def with_ready_kernels(model: nn.Module, params: Params, *, platform: str | None = None) -> Params:
    """Returns `params` with the quantized kernels of layers as a loop should take them, see `kernels.ready`.

    `platform` is who computes, by default JAX's. Bits over time choose among kernels, which stay as they are.
    """
    if OVER_TIME in params:
        return params
    flat, found = flatten_dict(params, sep="/"), {}
    settings = getattr(model, "numerics", "simulated"), getattr(model, "implementation", None)
    for path, kernel in flat.items():
        if not isinstance(kernel, QTensor) or not path.endswith("/kernel"):
            continue
        act = flat.get(f"{path.removesuffix('kernel')}act_quant")
        numerics = layer_numerics(act, settings[0])
        dtype = getattr(model, "dtype", "float32")
        found[path] = ready(kernel, act, numerics, settings[1], platform=platform, dtype=dtype)
    if all(kernel is flat[path] for path, kernel in found.items()):
        return params
    return unflatten_dict({**flat, **found}, sep="/")


@jax.jit(static_argnames="dtype")
def narrowed(values: jax.Array, dtype: str) -> jax.Array:
    """Returns an array in `dtype`."""
    return values.astype(dtype)


def known_family(model: nn.Module) -> Family | None:
    """Returns the row of a network in the table of families; None for a caller's own network."""
    try:
        return family_of(model)
    except TypeError:
        return None
