"""`--guidance`: one scale, or one per expert of a network that has two."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from qdit_jax.cli.options import AddArgument, finite_float

if TYPE_CHECKING:
    from qdit_jax.checkpoint import Checkpoint

Given = float | tuple[float, ...]
HELP = (
    "scale of classifier-free guidance; 1 turns it off; of a model with two experts also two, such as "
    "4,3: the one of much noise first (default: the published one, which `qdit inspect` says: 1.5 for "
    "DiT, 4.5 PixArt, 7 Open-Sora, Latte and SD3, 3.5 FLUX, 5 Wan, 4,3 its A14B; 1 without a null class)"
)


def add_guidance(add: AddArgument) -> None:
    """Adds the option by `add`, a parser's or a group's `add_argument`."""
    add("--guidance", type=guidance_scales, metavar="SCALE", help=HELP)


def guidance_scales(text: str) -> Given:
    """Returns one number, or the numbers between commas; raises argparse's error for other text."""
    if "," not in text:
        return finite_float(text)
    found = tuple(finite_float(part.strip()) for part in text.split(","))
    if len(found) != 2:
        raise argparse.ArgumentTypeError(
            f"{text!r} gives {len(found)} scales; use one, or two for the two experts of a model"
        )
    return found


def guidance_for(model: Any, given: Given | None) -> Any:
    """Returns the guidance that was given, else the model's own; 1 for a model that takes none.

    Raises:
        ValueError: if there are two scales and not two experts.
    """
    from qdit_jax.sampling import by_expert, own_guidance

    if isinstance(given, tuple):
        return by_expert(model, given)
    if given is not None:
        return given
    own = own_guidance(model)
    return 1.0 if own is None else own


def guidance_of(checkpoint: Checkpoint, given: Given | None) -> Any:
    """Returns `guidance_for` the checkpoint's network."""
    return guidance_for(checkpoint.model, given)
