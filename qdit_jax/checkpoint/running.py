"""The dtype that a checkpoint's network computes in, and weights unpacked: how it runs, not what it is."""

from __future__ import annotations

import dataclasses

import jax

from qdit_jax.checkpoint.description import Checkpoint
from qdit_jax.models import check_dtype
from qdit_jax.quant import OVER_TIME, expanded_params
from qdit_jax.types import Params


def default_dtype() -> str:
    """Returns the dtype that suits JAX's default backend: bfloat16 on accelerators, else float32."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def with_dtype(checkpoint: Checkpoint, dtype: str | None) -> Checkpoint:
    """Returns the checkpoint with a network that computes in `dtype`; None leaves it as it is.

    Raises:
        ValueError: if the dtype is not one of `models.DTYPES`, or the network has no choice.
    """
    if dtype is None:
        return checkpoint
    check_dtype(dtype)
    if hasattr(checkpoint.model, "dtype"):
        return dataclasses.replace(checkpoint, model=checkpoint.model.clone(dtype=dtype))
    if dtype != "float32":
        kind = type(checkpoint.model).__name__
        raise ValueError(f"dtype={dtype!r}: a {kind} computes in float32 only; use that.")
    return checkpoint


def with_expanded_weights(checkpoint: Checkpoint) -> Checkpoint:
    """Returns the checkpoint with a byte per integer code, which no product has to unpack.

    Outputs are the same, to the bit; weights of 4 bits take twice the memory. To run, not to be saved: a
    file of it would hold 8 bits. See `quant.expanded`.

    Raises:
        ValueError: if the checkpoint is in full precision, no weights are integers of fewer than 8 bits,
            or bits of weights change over time.
    """
    if checkpoint.recipe is None:
        raise ValueError("expand='load' has no effect: the checkpoint is in full precision.")
    table = checkpoint.params.get(OVER_TIME)
    if table is not None and table.weight_bits is not None:
        raise ValueError(
            "expand='load' is not supported where bits of weights change over time; use 'per-call'."
        )
    params = expanded_params(checkpoint.params)
    if num_bytes(params) == num_bytes(checkpoint.params):
        raise ValueError(
            f"expand='load' has no effect on {checkpoint.recipe.name}: it has no integer weights of "
            "fewer than 8 bits."
        )
    return dataclasses.replace(checkpoint, params=params)


def num_bytes(params: Params) -> int:
    """Returns the bytes that all arrays hold."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def dtype_of(checkpoint: Checkpoint) -> str:
    """Returns the dtype that the checkpoint's network computes in."""
    return getattr(checkpoint.model, "dtype", "float32")
