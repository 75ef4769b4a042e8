"""Checks of a checkpoint and of the settings for its network, before anything is computed."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

from qdit_jax.errors import check_counts
from qdit_jax.kernels import NUMERICS
from qdit_jax.models import family_of, without_null
from qdit_jax.quant import QTensor
from qdit_jax.sampling.own_guidance import (
    DEFAULT_GUIDANCE,
    PUBLISHED,
    Given,
    is_published,
    own_guidance,
    takes_embedded_guidance,
)
from qdit_jax.types import Condition, Params


def check_diffusion_model(model: object, name: object = "the checkpoint") -> None:
    """Raises `ValueError` if `model` is not a diffusion model; `name` says where it is from."""
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
        f"{name} holds {article} {kind} (family {family.name}), which is not a diffusion model and "
        "generates no images by itself; give a diffusion transformer's checkpoint, such as a DiT's."
    )


def calls_per_step(model: nn.Module, guidance: object) -> int:
    """Returns how many samples the network computes for one in a step: 2 with a null condition."""
    guidance = own_guidance(model) if is_published(guidance) else guidance
    if guidance is None or takes_embedded_guidance(model):
        return 1
    return 1 if isinstance(guidance, int | float) and guidance == 1 else 2


def fitting_guidance(model: nn.Module, guidance: Given) -> Any:
    """Returns the guidance a network is sampled with: None without a null condition.

    `PUBLISHED` gives the network's own, see `own_guidance`.

    Raises:
        ValueError: if the guidance is not finite, or is given, other than the default, for a
            network without a null class.
    """
    if is_published(guidance):
        return own_guidance(model)
    check_guidance(guidance)
    if model.has_null or guidance is None or takes_embedded_guidance(model):
        return guidance
    if not isinstance(guidance, int | float) or guidance not in (1, DEFAULT_GUIDANCE):
        raise ValueError(
            f"guidance={guidance} needs a null class, which this model was trained without; "
            "use guidance=None."
        )
    return None


def check_numerics(params: Params, numerics: str) -> None:
    """Raises `ValueError` if integer numerics have no effect on a network.

    They need a layer with quantized weights and quantized inputs.
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
    """Returns the number of samples: one per condition, or `num_samples` where there is none.

    Raises:
        ValueError: if neither is given, or they differ.
    """
    leaves = jax.tree.leaves(without_null(condition))
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


def check_guidance(guidance: object) -> None:
    """Raises if `guidance` is no finite number, array of such or function; a traced one is not checked.

    Raises:
        TypeError: if it is of another type.
        ValueError: if it is NaN or infinite.
    """
    if guidance is None or callable(guidance) or isinstance(guidance, jax.core.Tracer):
        return
    if is_published(guidance):
        return
    if isinstance(guidance, str) or not np.issubdtype(np.asarray(guidance).dtype, np.number):
        raise TypeError(
            f"guidance={guidance!r} is not supported; use a number, or an array of them."
        )
    if not np.isfinite(np.asarray(guidance, np.float64)).all():
        raise ValueError(f"guidance={guidance} is not supported; use a finite number.")


def num_guided_channels(model: nn.Module, guidance_channels: int | str | None) -> int | None:
    """Returns how many channels guidance changes, None for all; see `denoiser`.

    Raises:
        ValueError: if that is not a positive number, or more than a sample has.
    """
    most = model.sample_shape()[-1]
    if guidance_channels == PUBLISHED:
        return None if model.guided_channels is None else min(model.guided_channels, most)
    if guidance_channels is None:
        return None
    check_counts(guidance_channels=guidance_channels)
    if int(guidance_channels) > most:
        raise ValueError(
            f"guidance_channels={guidance_channels} is more than the {most} channels of this "
            "model's samples; use guidance_channels=None for all."
        )
    return int(guidance_channels)


def check_seed(seed: object) -> int:
    """Returns `seed` as an integer.

    Raises:
        TypeError: if it is not a whole number.
        ValueError: unless it is in `[0, 2**32 - 1]`: JAX's keys take the last 32 bits, and greater
            seeds would repeat the samples of others.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise TypeError(f"seed={seed!r} is not a whole number; use one from 0 to {2**32 - 1}.")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} is out of range; use a number from 0 to {2**32 - 1}.")
    return int(seed)
