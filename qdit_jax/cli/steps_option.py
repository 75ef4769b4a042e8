"""`--steps-at`: other bits at some sampling steps."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qdit_jax.cli.options import AddArgument
from qdit_jax.errors import UserError

if TYPE_CHECKING:
    from qdit_jax.checkpoint import Checkpoint
    from qdit_jax.recipes import Recipe

StepsAt = tuple[str, str]


def add_steps_at(add: AddArgument) -> None:
    """Adds the option by `add`, a parser's or a group's `add_argument`."""
    add(
        "--steps-at",
        type=steps_at,
        action="append",
        metavar="STEPS=BITS",
        help="other bits at some of the --steps steps of the checkpoint's sampler, such as "
        "0-3,last=a16: activations without quantizer there; w8a16: with weights of 8 bits as well, "
        "which are then held beside the others. May be given several times",
    )


def steps_at(text: str) -> StepsAt:
    """Returns steps and bits of `STEPS=BITS`; raises argparse's error if it cannot be read."""
    from qdit_jax.recipes import bits_named

    steps, _, bits = (part.strip() for part in text.rpartition("="))
    bits = f"a{bits}" if bits.isdecimal() else bits
    try:
        bits_named(bits)
    except ValueError:
        bits = ""
    if not steps or not bits:
        raise argparse.ArgumentTypeError(
            f"{text!r} cannot be read; write STEPS=BITS, such as 0-3,last=a16 or 0=w8a16"
        )
    return steps, bits


def with_steps(
    recipe: Recipe, given: Sequence[StepsAt] | None, checkpoint: Checkpoint, num_steps: int
) -> Recipe:
    """Returns the recipe with the bits that `--steps-at` gives to steps of the checkpoint's sampler.

    Raises:
        UserError: if the recipe has a schedule of its own, quantizes nothing that would change, or a
            step is not one of the sampler's.
    """
    from qdit_jax.recipes import OverTime
    from qdit_jax.sampling import checkpoint_sampler, sampler_timesteps

    if not given:
        return recipe
    shown = f"--steps-at {'='.join(given[0])}"
    if recipe.over_time is not None:
        raise UserError(f"{shown}: the recipe's file has bits over time; leave one of both out.")
    steps: dict[str, int | str | None] = {}
    for text, bits in given:
        steps.pop(text, None)  # the later one is to come last
        steps[text] = bits
    timesteps = sampler_timesteps(checkpoint_sampler(checkpoint, num_steps))
    try:
        over_time = OverTime.at_steps(timesteps, steps)
    except ValueError as error:
        raise UserError(f"--steps-at with --steps {num_steps}: {error}") from error
    if set(over_time.act_bits) != {None} and not any(rule.spec.act for rule in recipe.rules):
        raise UserError(
            f"{shown} has no effect on activations: the recipe leaves every input as it is; use one "
            "such as w4a4, or give bits of weights alone (w8)."
        )
    if over_time.weight_bits is not None and not any(rule.spec.weight for rule in recipe.rules):
        raise UserError(
            f"{shown} has no effect on weights: the recipe leaves every weight as it is."
        )
    return dataclasses.replace(recipe, over_time=over_time)
