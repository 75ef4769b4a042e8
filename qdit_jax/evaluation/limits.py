"""Limits that a user sets for a quantized checkpoint, and whether it keeps them."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

from qdit_jax.errors import UserError, check_finite
from qdit_jax.evaluation.layer_facts import LayerFacts, check_implementation

UNITS = {"": 1, **{f"{p}B": 1000**i for i, p in enumerate(("", "K", "M", "G", "T"))}}
UNITS |= {f"{p}iB": 1024**i for i, p in enumerate(("K", "M", "G", "T"), 1)}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(x|[KMGT]?i?B|)", re.IGNORECASE)
WORST = 3  # layers that a message names


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a checkpoint must keep; what is None is not asked for.

    Attributes:
        min_db: the least signal-to-error ratio of the final latents, in the mean over samples.
        min_layer_db: the least of any layer that can be measured.
        max_bytes: the most bytes of all parameters: a number, a size such as `"500MB"` or
            `"1.2GiB"`, or a share of the reference's bytes such as `"0.5x"`.
        max_ms_ratio: the most time of a network call, as a multiple of the reference's.
        implementation: the entry of the table of kernels that must compute every packed kernel.
    """

    min_db: float | int | None = None
    min_layer_db: float | int | None = None
    max_bytes: int | str | None = None
    max_ms_ratio: float | int | None = None
    implementation: str | None = None

    def __post_init__(self) -> None:
        check_finite(min_db=self.min_db, min_layer_db=self.min_layer_db)
        check_finite(max_ms_ratio=self.max_ms_ratio)
        if self.max_ms_ratio is not None and self.max_ms_ratio <= 0:
            raise UserError(
                f"max_ms_ratio={self.max_ms_ratio} is not supported; use a number above 0."
            )
        if self.max_bytes is not None:
            most_bytes(self.max_bytes, 1)
        check_implementation(self.implementation)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A limit, what was found, and whether it was kept; `text` says it in a sentence."""

    name: str
    limit: Any
    found: Any
    passed: bool
    text: str


@dataclasses.dataclass(frozen=True)
class Layer(LayerFacts):
    """`LayerFacts` with what was measured.

    Attributes:
        db: signal-to-error ratio of the output, 200 if it is equal; None where it cannot be
            compared.
        note: what the number leaves out or counts in, or why there is none.
    """

    db: float | None = None
    note: str | None = None


def most_bytes(limit: int | str, reference: int) -> int:
    """Returns a limit of bytes as a number; `reference` is what a share such as `0.5x` is of.

    Raises:
        UserError: if it is not a positive size.
    """
    match = SIZE.fullmatch(str(limit).strip())
    units = {name.lower(): factor for name, factor in UNITS.items()}
    if match is not None and not isinstance(limit, bool):
        number, unit = float(match[1]), match[2].lower()
        if unit == "x" and number > 0:
            return math.floor(number * reference)
        if number * units.get(unit, 0) >= 1:
            return math.floor(number * units[unit])
    raise UserError(
        f"max_bytes={limit} is not a size; use a number of bytes, one such as 500MB or 1.2GiB, or a "
        "share of the reference such as 0.5x."
    )


def outcomes(
    limits: Limits,
    layers: Sequence[Layer],
    *,
    final_db: float,
    num_bytes: tuple[int, int],
    ms_ratio: float | None,
) -> list[Outcome]:
    """Returns the outcome of every limit that is set.

    Args:
        final_db: NaN if the final latents are not finite.
        num_bytes: of all parameters, of the reference and of the checkpoint.
    """
    found = []
    if limits.min_db is not None:
        passed = final_db >= limits.min_db  # not of NaN
        text = f"final latents at {final_db:.2f} dB, at least {limits.min_db:g} asked for"
        found.append(Outcome("min_db", limits.min_db, final_db, passed, text))
    if limits.min_layer_db is not None:
        found.append(worst_layers(limits.min_layer_db, layers))
    if limits.max_bytes is not None:
        before, after = num_bytes
        most = most_bytes(limits.max_bytes, before)
        text = f"{after:,} bytes ({after / before:.3f}x), at most {most:,} asked for"
        found.append(Outcome("max_bytes", limits.max_bytes, after, after <= most, text))
    if limits.max_ms_ratio is not None and ms_ratio is not None:
        text = f"{ms_ratio:.2f}x the time of a call, at most {limits.max_ms_ratio:g}x asked for"
        passed = ms_ratio <= limits.max_ms_ratio
        found.append(Outcome("max_ms_ratio", limits.max_ms_ratio, ms_ratio, passed, text))
    if limits.implementation is not None:
        found.append(computed_by(limits.implementation, layers))
    return found


def worst_layers(least: float | int, layers: Sequence[Layer]) -> Outcome:
    """Returns the outcome of a limit of every layer's decibels."""
    measured = sorted((layer.db, layer.path) for layer in layers if layer.db is not None)
    below = [(db, path) for db, path in measured if not db >= least]
    left_out = len(layers) - len(measured)
    rest = f"; {left_out} cannot be compared" if left_out else ""
    if below:
        shown = ", ".join(f"{path} ({db:.2f} dB)" for db, path in below[:WORST])
        more = f" and {len(below) - WORST} more" if len(below) > WORST else ""
        text = f"{shown}{more} below {least:g} dB{rest}"
    else:
        text = f"all {len(measured)} layers at {least:g} dB or more{rest}"
    worst = measured[0][0] if measured else None
    return Outcome("min_layer_db", least, worst, bool(measured) and not below, text)


def computed_by(name: str, layers: Sequence[Layer]) -> Outcome:
    """Returns the outcome of a limit of who computes the layers with weights."""
    asked = [layer for layer in layers if layer.kind == "linear"]
    others = [layer for layer in asked if layer.implementation != name]
    if others:
        shown = ", ".join(
            f"{layer.path} ({layer.implementation or 'full precision'})" for layer in others[:WORST]
        )
        more = f" and {len(others) - WORST} more" if len(others) > WORST else ""
        text = f"not computed by {name}: {shown}{more}"
    else:
        text = f"all {len(asked)} layers computed by {name}"
    counted = sum(layer.implementation == name for layer in asked)
    return Outcome("implementation", name, counted, not others and bool(asked), text)
