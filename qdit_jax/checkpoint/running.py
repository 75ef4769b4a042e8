"""The dtype that a checkpoint's network computes in, and weights unpacked: how it runs, not what it is."""

from __future__ import annotations

import dataclasses

import jax

from qdit_jax.checkpoint.description import Checkpoint
from qdit_jax.models import check_dtype
from qdit_jax.quant import OVER_TIME, QTensor, expanded_params, is_packed


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
        raise ValueError(
            "expanding weights (--expand load) has no effect: the checkpoint is in full precision."
        )
    table = checkpoint.params.get(OVER_TIME)
    if table is not None and table.weight_bits is not None:
        raise ValueError(
            "expanding weights (--expand load) is not supported where their bits change over time; leave "
            "it out."
        )
    leaves = jax.tree.leaves(checkpoint.params, is_leaf=lambda leaf: isinstance(leaf, QTensor))
    if not any(isinstance(leaf, QTensor) and is_packed(leaf) for leaf in leaves):
        raise ValueError(
            f"expanding weights (--expand load) has no effect on {checkpoint.recipe.name}: it has no "
            "integer weights of fewer than 8 bits."
        )
    return dataclasses.replace(checkpoint, params=expanded_params(checkpoint.params))


def dtype_of(checkpoint: Checkpoint) -> str:
    """Returns the dtype that the checkpoint's network computes in."""
    return getattr(checkpoint.model, "dtype", "float32")
