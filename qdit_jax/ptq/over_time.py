"""Bits by timestep: put into a quantized tree, with a further kernel for each of its other bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from qdit_jax.checkpoint import Checkpoint
from qdit_jax.ptq.rewriting import weight_name
from qdit_jax.quant import (
    OVER_TIME,
    UNQUANTIZED,
    ActQuant,
    QTensor,
    kernel_of_other,
    levels_over_time,
    other_kernel,
)
from qdit_jax.recipes import OverTime, Recipe, at_weight_bits, other_weights
from qdit_jax.types import Params

# `path -> name`: what a layer is called where it is reported; None if it is not.
NameFn = Callable[[str], str | None]
# `(recipe, name_fn) -> quantized tree`, whatever the recipe's schedule says.
QuantizeFn = Callable[[Recipe, NameFn], Params]


def schedule_act_bits(checkpoint: Checkpoint, over_time: OverTime | None) -> Checkpoint:
    """Returns a quantized checkpoint with other bits at some timesteps.

    No array is copied. The recipe, where there is one, says so too. None takes a schedule away, and
    with it the kernels of other bits.

    Raises:
        ValueError: as `scheduled_params`.
    """
    recipe = checkpoint.recipe
    if recipe is not None:
        recipe = dataclasses.replace(recipe, over_time=over_time)
    params = scheduled_params(checkpoint.params, over_time)
    return dataclasses.replace(checkpoint, params=params, recipe=recipe)


def scheduled_params(params: Params, over_time: OverTime | None) -> dict[str, Any]:
    """Returns `params` with the schedule of bits as an entry, which `denoiser` follows.

    Kernels of other bits that the schedule does not use are left out.

    Raises:
        ValueError: if the schedule changes activations and none is quantized, or one has a number
            format, whose bits are fixed, and the schedule gives it others; or if it changes weights
            and a kernel is not held at those bits.
    """
    flat = dict(flatten_dict({n: e for n, e in params.items() if n != OVER_TIME}, sep="/"))
    wanted = [] if over_time is None else over_time.other_weight_bits
    for path in list(flat):
        if (own := kernel_of_other(path)) is not None and own[1] not in wanted:
            del flat[path]
    bare = unflatten_dict(flat, sep="/")
    if over_time is None:
        return bare
    check_acts(flat, over_time)
    for bits in wanted:
        check_held(flat, bits)
    weight_bits = over_time.weight_bits or (None,) * len(over_time.act_bits)
    chosen = list(zip(weight_bits, over_time.act_bits, strict=True))
    return {**bare, OVER_TIME: levels_over_time(over_time.timesteps, chosen)}


def check_acts(flat: dict[str, Any], over_time: OverTime) -> None:
    """Raises `ValueError` unless the activation quantizers can have the bits of a schedule."""
    quantizers = {path: leaf for path, leaf in flat.items() if isinstance(leaf, ActQuant)}
    if not quantizers and (set(over_time.act_bits) != {None} or over_time.weight_bits is None):
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


def check_held(flat: dict[str, Any], bits: int) -> None:
    """Raises `ValueError` unless every quantized kernel has these bits, or is held at them too."""
    kernels = {
        path: leaf
        for path, leaf in flat.items()
        if isinstance(leaf, QTensor) and path.split("/")[-1] == "kernel"
    }
    if not kernels:
        raise ValueError(
            f"over_time gives weights {bits} bits, but no kernel is quantized; give layers a weight "
            "spec, such as that of w4a8."
        )
    for path, kernel in kernels.items():
        is_own = kernel.bits == bits and kernel.fmt is None
        if not is_own and path.removesuffix("kernel") + other_kernel(bits) not in flat:
            raise ValueError(
                f"over_time gives weights {bits} bits at some timesteps, and {path} is held at "
                f"{kernel.bits} bits alone; quantize the full-precision checkpoint with w{bits} at some "
                f"step (--steps-at 0=w{bits})."
            )


def quantized_over_time(params: Params, recipe: Recipe, quantize_fn: QuantizeFn) -> dict[str, Any]:
    """Returns `quantize_fn(recipe)` with the recipe's schedule, and kernels of other bits beside.

    Those come from further passes, one for each of the bits, in which all kernels have these bits.

    Raises:
        ValueError: if a kernel has a number format, whose bits are fixed, or as `scheduled_params`.
    """
    others = {bits: other_weights(params, recipe, bits) for bits in bits_of_passes(recipe)}
    written = quantize_fn(recipe, lambda path: path)
    if recipe.over_time is None:
        return scheduled_params(written, None)
    flat = dict(flatten_dict(written, sep="/"))
    for bits, paths in others.items():
        if not paths:
            continue
        source: Params = params
        if bits != UNQUANTIZED:
            called = {path: f"{path}/{other_kernel(bits)}" for path in paths}
            source = quantize_fn(at_weight_bits(recipe, bits), called.get)
        kernels = flatten_dict(source, sep="/")
        for path in paths:
            name = weight_name(kernels, path)
            assert name is not None
            flat[name.removesuffix("kernel") + other_kernel(bits)] = kernels[name]
    return scheduled_params(unflatten_dict(flat, sep="/"), recipe.over_time)


def bits_of_passes(recipe: Recipe) -> list[int]:
    """Returns the bits of weights beside the rules' own at some timestep."""
    return [] if recipe.over_time is None else recipe.over_time.other_weight_bits


def num_passes(params: Params, recipe: Recipe) -> int:
    """Returns how often a network is rounded: once, and once more for each of its other bits."""
    others = [bits for bits in bits_of_passes(recipe) if bits != UNQUANTIZED]
    return 1 + sum(bool(other_weights(params, recipe, bits)) for bits in others)


def check_one_weight_format(params: Params, recipe: Recipe, what: str) -> None:
    """Raises `ValueError` if a recipe holds a kernel at several bits; `what` cannot do that."""
    for bits in bits_of_passes(recipe):
        if paths := other_weights(params, recipe, bits):
            raise ValueError(
                f"over_time gives the weights of {next(iter(paths))} {bits} bits at some timesteps, "
                f"which {what} cannot do: its step sizes fit one format; use a method such as gptq or "
                "rtn, or a schedule of activations alone."
            )
