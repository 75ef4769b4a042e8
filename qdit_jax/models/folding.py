"""What a row of the table of families says of where input transforms cost nothing at run time.

A layer's input is produced by columns of another layer, or by a norm. Where these can take a change of the
input's channels, a *fold* names them; `methods.fold_inputs` rewrites them.

Dimensions: K input channels, N output channels.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from jaxtyping import Bool

from qdit_jax.types import AnyArray


@dataclasses.dataclass(frozen=True)
class Producer:
    """Columns of a linear layer, or of a norm or convolution by channel, that produce another layer's input.

    Attributes:
        layer: path of the layer; `\\1` is the first group of the fold's pattern.
        output: the name of those columns in `Family.outputs`; empty for all of them.
        offset: added to those columns where they are used: 1 for a modulation's scale.
        shifted: whether a shift of the input is subtracted here.
        weight: the parameter that multiplies, beside `bias` if there is one: a linear layer's kernel
            `[K, N]`, a norm's scale `[N]`, or a depthwise convolution's filter `[..., N]`.
        inputs: the name in `Family.inputs` of the channels that these columns produce, where the rest of
            the input comes from elsewhere; empty for all of them.
    """

    layer: str
    output: str = ""
    offset: float = 0.0
    shifted: bool = True
    weight: str = "kernel"
    inputs: str = ""


@dataclasses.dataclass(frozen=True)
class Fold:
    """A place where a channel-wise map of a layer's input is absorbed by what produces it.

    A scale of the input divides all that its producers make. A shift is subtracted by those that are
    `shifted`: where none is, as behind a gate or a norm without bias, only a scale is absorbed.

    Attributes:
        layers: pattern of the layers that read the input; those of one match share the map.
        producers: what produces the input, or segments of it.
    """

    layers: str
    producers: tuple[Producer, ...]


class Covered(NamedTuple):
    """Which channels of an input a fold reaches.

    Attributes:
        scale, shift: `[K]`, whether that is absorbed.
    """

    scale: Bool[AnyArray, " K"]
    shift: Bool[AnyArray, " K"]


@dataclasses.dataclass(frozen=True)
class Segments:
    """Names of runs of a layer's input or output channels, in their order.

    A run is as wide as the narrower side of the layer's kernel. A layer may have fewer runs than names.

    Attributes:
        names: of runs, from the first channel on.
        rest: of equal parts of the channels after those, of whatever number; empty if there are none.
        optional: names that some networks of the family do not have, all of them or none.
    """

    names: tuple[str, ...]
    rest: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    def find(self, name: str, shape: tuple[int, ...], width: int) -> slice | None:
        """Returns the channels called `name` among `width` of a layer with a kernel of `shape`."""
        size = min(math.prod(shape[:-1]), shape[-1])
        if name in self.rest:
            start = len(self.names) * size
            part = (width - start) // len(self.rest)
            first = start + self.rest.index(name) * part
            return slice(first, first + part)
        names = self.names
        if len(names) * size > width:
            names = tuple(one for one in names if one not in self.optional)
        if name not in names or (first := names.index(name) * size) + size > width:
            return None
        return slice(first, first + size)


def from_modulation(layer: str, branch: str = "") -> tuple[Producer, ...]:
    """Returns the producers of an input that a layer's columns `shift` and `scale` modulate."""
    return (
        Producer(layer, f"shift{branch}"),
        Producer(layer, f"scale{branch}", 1.0, shifted=False),
    )


def ungated(layer: str, output: str = "") -> tuple[Producer, ...]:
    """Returns the producers of an input `act(gate) * value` whose value these columns are."""
    return (Producer(layer, output, shifted=False),)
