"""What a checkpoint must be, and which settings fit its network, before anything is computed."""

from __future__ import annotations

from typing import TypeVar

import jax
from flax import linen as nn
from flax.traverse_util import flatten_dict

from qdit_jax.errors import check_counts, check_finite
from qdit_jax.kernels import NUMERICS
from qdit_jax.models import family_of
from qdit_jax.quant import QTensor
from qdit_jax.types import Condition, Params

DEFAULT_GUIDANCE = 1.5
Guidance = TypeVar("Guidance")  # a number, an array or None


def check_diffusion_model(model: object, name: object = "the checkpoint") -> None:
    """Raises `ValueError` if `model` is no diffusion model; `name` is where it comes from."""
    if not isinstance(model, nn.Module):
        return
    try:
        family = family_of(model)
    except TypeError:  # a network of the caller's own
        return
    if family.is_diffusion:
        return
    kind = type(model).__name__
    article = "an" if kind[0] in "AEIOU" else "a"
    raise ValueError(
        f"{name} holds {article} {kind} (family {family.name}), which is no diffusion model and makes no "
        "pictures by itself; give the checkpoint of a diffusion transformer, such as a DiT's."
    )


def fitting_guidance(model: nn.Module, guidance: Guidance) -> Guidance | None:
    """Returns the guidance a network is sampled with: None without a null condition.

    Raises:
        ValueError: if the guidance is not finite, or one other than the default is asked of a
            network without a null class.
    """
    check_finite(guidance=guidance)
    if model.has_null or guidance is None:
        return guidance
    if not isinstance(guidance, int | float) or guidance not in (1, DEFAULT_GUIDANCE):
        raise ValueError(
            f"guidance={guidance} needs a null class, which this model was trained without; "
            "use guidance=None."
        )
    return None


def check_numerics(params: Params, numerics: str) -> None:
    """Raises `ValueError` if integer numerics is asked of a network that holds nothing for it.

    It needs a layer with quantized weights and quantized inputs.
    """
    if numerics not in NUMERICS:
        raise ValueError(f"numerics={numerics!r} is not known; use 'simulated' or 'integer'.")
    if numerics != "integer":
        return
    flat = flatten_dict(params, sep="/")
    layers = [p.removesuffix("/kernel") for p, leaf in flat.items() if isinstance(leaf, QTensor)]
    if not any(f"{layer}/act_quant" in flat for layer in layers):
        why = "no layer quantizes its inputs as well" if layers else "nothing is quantized"
        raise ValueError(
            f"numerics='integer' has no effect on this checkpoint: {why}; quantize weights and "
            "inputs (such as w4a8), or use numerics='simulated'."
        )


def sample_count(condition: Condition, num_samples: int | None) -> int:
    """Returns how many samples are asked for: one per condition, or a number where there is none.

    Raises:
        ValueError: if neither says it, or they differ.
    """
    leaves = jax.tree.leaves(condition)
    if not leaves and num_samples is None:
        raise ValueError("condition=None does not say how many samples to make; give num_samples.")
    if num_samples is None:
        return leaves[0].shape[0]
    check_counts(num_samples=num_samples)
    if leaves and leaves[0].shape[0] != num_samples:
        raise ValueError(
            f"num_samples={num_samples}, but there are {leaves[0].shape[0]} conditions; leave it out."
        )
    return int(num_samples)
