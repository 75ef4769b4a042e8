"""Which network a table of tensors belongs to, recognized by the names alone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import fields

from qdit_convert.choices import Choices
from qdit_convert.layout import Layout
from qdit_convert.layouts import FAMILIES, LAYOUTS, NAMINGS
from qdit_convert.tensors import StateDict, listing
from qdit_jax.errors import UserError

# Networks that convert knows by a name that only they have, but does not convert.
UNSUPPORTED = (
    (
        "a U-Net (Stable Diffusion)",
        re.compile(r"(model\.diffusion_model\.)?(input_blocks|middle_block)\."),
    ),
    ("a U-Net (diffusers)", re.compile(r"up_blocks\.\d+\.(attentions|resnets)\.")),
)


def find_layout(state: StateDict, family: str | None = None) -> Layout:
    """Returns the layout of the names in `state`, one that serves `family` if that is given.

    Raises:
        UserError: if the names are of no known network, or of another than `family`.
    """
    if family is not None and family not in FAMILIES:
        raise UserError(f"family={family!r} is not known; use one of {', '.join(FAMILIES)}.")
    keys = list(state.tensors)
    _refuse_unsupported(unsupported_title(keys, depth=0))
    shares = [sum(bool(layout.names.match(key)) for key in keys) / len(keys) for layout in NAMINGS]
    best = max(range(len(NAMINGS)), key=lambda i: shares[i])
    layout = NAMINGS[best]
    if shares[best] < 0.5:
        _refuse_unsupported(unsupported_title(keys))
        raise UserError(
            f"the names of its tensors are of no network that convert knows ({', '.join(FAMILIES)}): "
            f"{listing(keys, 4)}."
        )
    same = [other for other in LAYOUTS if other.names is layout.names]
    told = next((other for other in same if other.told(state)), layout)
    if family is None:
        return told
    serving = [other for other in same if family in other.families]
    if not serving:
        raise UserError(f"the names of its tensors are of a {told.title}, not of family {family}.")
    return min(serving, key=lambda other: (other.families.index(family), not other.told(state)))


def serves(layout: Layout, family: str) -> bool:
    """Returns whether a row with the names of `layout` is of `family`."""
    return any(family in other.families for other in LAYOUTS if other.names is layout.names)


def check_options(layout: Layout, choices: Choices) -> None:
    """Raises `UserError` for an option that does not apply to the network."""
    for field in fields(choices):
        value = getattr(choices, field.name)
        if value is not None and field.name not in layout.options:
            option = field.name.replace("_", "-")
            raise UserError(
                f"{field.name}={value!r} (--{option}) says nothing about a network of family "
                f"{layout.families[0]} ({layout.title}); leave it out."
            )


def _refuse_unsupported(title: str | None) -> None:
    if title is not None:
        raise UserError(
            f"the names of its tensors are of {title}, which convert does not support yet."
        )


def unsupported_title(keys: Iterable[str], depth: int | None = None) -> str | None:
    """Returns which known but unsupported network has some of the names, or None.

    Args:
        depth: how many dotted parts may stand before the name; None for any number.
    """
    for title, pattern in UNSUPPORTED:
        if any(pattern.match(key, start) for key in keys for start in _starts(key, depth)):
            return title
    return None


def _starts(key: str, depth: int | None) -> list[int]:
    starts = [0, *(i + 1 for i, letter in enumerate(key) if letter == ".")]
    return starts if depth is None else starts[: depth + 1]
