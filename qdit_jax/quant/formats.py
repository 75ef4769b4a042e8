"""Number formats other than integers."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Format:
    """A number format: its element, its block and the scale of a block."""

    name: str
    bits: int
    block_size: int = 0


_FORMATS: dict[str, Format] = {}


def by_name(name: str) -> Format:
    """Returns the format of that name.

    Raises:
        ValueError: if there is none; the message lists the known ones.
    """
    if name not in _FORMATS:
        raise ValueError(f"unknown format {name!r}; known formats: {', '.join(sorted(_FORMATS))}.")
    return _FORMATS[name]
