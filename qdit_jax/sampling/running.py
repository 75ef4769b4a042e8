"""Parameters as a network multiplies them, made once before a loop and not in each of its steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from qdit_jax.models import family_of, rows_per_sample
from qdit_jax.quant import QTensor
from qdit_jax.types import Params


def running_params(model: nn.Module, params: Params) -> Params:
    """Returns `params` with the kernels that `model` multiplies in 16 bits stored in 16 bits.

    The network's output is the same: those kernels are cast at every call otherwise. Quantized
    kernels, those of layers with a quantized input, biases and tables stay as they are.
    """
    dtype = getattr(model, "dtype", "float32")
    if dtype == "float32" or not is_of_a_family(model):
        return params
    flat = dict(flatten_dict(params, sep="/"))
    for path in rows_per_sample(model):
        kernel = flat.get(f"{path}/kernel")
        if kernel is None or isinstance(kernel, QTensor) or f"{path}/act_quant" in flat:
            continue
        flat[f"{path}/kernel"] = narrowed(jnp.asarray(kernel), dtype)
    return unflatten_dict(flat, sep="/")


@jax.jit(static_argnames="dtype")
def narrowed(kernel: jax.Array, dtype: str) -> jax.Array:
    """Returns a kernel in `dtype`."""
    return kernel.astype(dtype)


def is_of_a_family(model: nn.Module) -> bool:
    """Returns whether `model` is in the table of families, whose layers can be told by a trace."""
    try:
        family_of(model)
    except TypeError:
        return False
    return True
