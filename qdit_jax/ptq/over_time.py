"""Bits of activations by timestep: put into a quantized tree, whose arrays they share."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax.traverse_util import flatten_dict

from qdit_jax.checkpoint import Checkpoint
from qdit_jax.quant import OVER_TIME, UNQUANTIZED, ActQuant, bits_over_time
from qdit_jax.recipes import OverTime
from qdit_jax.types import Params


def schedule_act_bits(checkpoint: Checkpoint, over_time: OverTime | None) -> Checkpoint:
    """Returns a quantized checkpoint whose activations have other bits at some timesteps.

    No array is copied. The recipe, where there is one, says so too. None takes a schedule away.

    Raises:
        ValueError: as `scheduled_params`.
    """
    recipe = checkpoint.recipe
    if recipe is not None:
        recipe = dataclasses.replace(recipe, over_time=over_time)
    params = scheduled_params(checkpoint.params, over_time)
    return dataclasses.replace(checkpoint, params=params, recipe=recipe)


def scheduled_params(params: Params, over_time: OverTime | None) -> dict[str, Any]:
    """Returns `params` with the schedule of activation bits as an entry, which `denoiser` follows.

    Raises:
        ValueError: if no activation is quantized, or one has a number format, whose bits are fixed,
            and the schedule gives it others.
    """
    bare = {name: entry for name, entry in params.items() if name != OVER_TIME}
    if over_time is None:
        return bare
    flat = flatten_dict(bare, sep="/")
    quantizers = {path: leaf for path, leaf in flat.items() if isinstance(leaf, ActQuant)}
    if not quantizers:
        raise ValueError(
            "over_time changes the bits of activations, but none is quantized; give layers an act "
            "spec, such as that of w4a4."
        )
    for path, leaf in quantizers.items():
        own = (UNQUANTIZED, leaf.spec.bits)
        others = {bits for bits in over_time.act_bits if bits is not None and bits not in own}
        if leaf.spec.fmt is not None and others:
            raise ValueError(
                f"{path} has format {leaf.spec.fmt.name!r}, which over_time cannot give "
                f"{min(others)} bits; use {UNQUANTIZED} (no quantizer) or None (its own)."
            )
    return {**bare, OVER_TIME: bits_over_time(over_time.timesteps, over_time.act_bits)}
