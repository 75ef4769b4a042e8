"""One rule of a recipe: a pattern of layer paths, and what they are quantized to."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from qdit_jax.errors import check_pattern
from qdit_jax.quant import ActSpec, WeightSpec, regular_size
from qdit_jax.types import UNSAID

# Stands for a part of whatever family the parameters turn out to be, as in `part:blocks`.
PART = "part:"


# Parts of a transform that rotate blocks of channels, and how many channels a block has; None for the
# largest power of 4, at most 256, that divides their number.
TURNS: Mapping[str, int | None] = {
    "hadamard": None,
    "pca": None,
    **{f"hadamard{size}": size for size in (4, 16, 64, 256)},
}
# Names of input transforms, and the parts of each in the order in which they work: `smooth` divides
# every channel by a scale, `shift` takes the middle of its range off first, `hadamard` multiplies
# blocks of channels by a regular Hadamard matrix, `pca` by the inputs' principal directions.
TRANSFORMS: Mapping[str, tuple[str, ...]] = {
    "none": (),
    **{
        name: tuple(name.split("+"))
        for name in (
            *("smooth", "shift", "smooth+shift"),
            *(f"{before}{turn}" for turn in TURNS for before in ("", "smooth+", "smooth+shift+")),
        )
    },
}


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What one layer's kernel and input are quantized to; None leaves that side as it is.

    Attributes:
        transform: the coordinates of the layer's input, a name of `TRANSFORMS`; None lets the
            method choose.
        rank: of the 16-bit branch beside the kernel; 0 for no branch, None lets the method decide.
    """

    weight: WeightSpec | None = None
    act: ActSpec | None = None
    # Any: `__post_init__` refuses wrong types with a remedy, and takes NumPy integers.
    transform: Any = dataclasses.field(default=None, metadata=UNSAID)
    rank: Any = dataclasses.field(default=None, metadata=UNSAID)

    def __post_init__(self) -> None:
        if isinstance(self.rank, np.integer):
            object.__setattr__(self, "rank", int(self.rank))
        check_transform(self.transform)
        check_rank(self.rank)
        if self.weight is None and self.act is None and self != self.plain:
            raise ValueError(
                f"transform={self.transform!r}, rank={self.rank!r} of a layer that is left in full "
                "precision have no effect; give it a weight or an act spec, or leave them out."
            )

    @property
    def plain(self) -> LayerSpec:
        """The spec without transform and rank: how numbers are rounded, and nothing else."""
        if self.transform is None and self.rank is None:
            return self
        return dataclasses.replace(self, transform=None, rank=None)

    @property
    def asks_for(self) -> str | None:
        """What a method must make beside rounding, in words; None if nothing."""
        if self.transform not in (None, "none"):
            return f"transform={self.transform!r}"
        return f"rank={self.rank}" if self.rank else None


def rotated_block(transform: str | None, num_channels: int) -> int | None:
    """Returns the block size of the rotation in the transform of that name; None if it has none.

    A size that the name asks for is returned whether or not it divides `num_channels`; the size that
    is chosen by `num_channels` may be 1.
    """
    turn = next((part for part in TRANSFORMS[transform or "none"] if part in TURNS), None)
    return None if turn is None else TURNS[turn] or regular_size(num_channels)


def check_transform(name: object) -> None:
    """Raises `ValueError` unless `name` is None or a name of `TRANSFORMS`."""
    if name is not None and not (isinstance(name, str) and name in TRANSFORMS):
        raise ValueError(f"transform={name!r} is not known; use one of {', '.join(TRANSFORMS)}.")


def check_rank(rank: object) -> None:
    """Raises `ValueError` unless `rank` is None or a whole number from 0."""
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 0):
        raise ValueError(
            f"rank={rank!r} is not the rank of a branch; use a positive whole number, or 0 for no "
            "branch."
        )


@dataclasses.dataclass(frozen=True)
class Rule:
    """The spec of every layer whose whole path matches the regular expression `layers`."""

    layers: str
    spec: LayerSpec

    def __post_init__(self) -> None:
        check_pattern("layers", self.layers)

    def matches(self, path: str) -> bool:
        if self.layers.startswith(PART):
            raise ValueError(
                f"layers={self.layers!r} stands for layers of a family; bind the recipe to "
                "parameters first: recipe.bound(params)."
            )
        return re.fullmatch(self.layers, path) is not None
