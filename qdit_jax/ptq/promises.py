"""Compares each quantized kernel's error with the error expected from its bits.

A kernel can lose its information without an exception: by a grid that does not fit, a range rule
with a floor, a format's shared factor. Every table of layers warns of it.

Dimensions: K input channels, N output channels, G groups, S members of a group.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float

from qdit_jax.ptq.by_columns import decibels, squares_by_columns
from qdit_jax.quant import QTensor, effective_group_size
from qdit_jax.types import AnyArray

# A bit's worth of noise. Rounding to nearest on a min-max grid errs by half a step at most, which is
# three times the noise of uniform rounding, 4.8 dB.
ALLOWANCE_DB = 6.0
# Of formats, whose steps grow with the value: the signal-to-noise ratio in dB of each element, for
# blocks whose values are within a few powers of two, less a margin.
ELEMENT_DB = {"e4m3": 25.0, "e5m2": 19.0, "e2m1": 11.0, "nf4": 12.0, "codebook": 12.0}


@dataclasses.dataclass(frozen=True)
class Precision:
    """A kernel's signal-to-noise ratio in dB, measured and promised; `-inf` if nothing is left.

    `num_lost` counts the output channels whose error is as large as the channel itself although
    the bits do not predict that.
    """

    measured: float
    promised: float
    num_lost: int


def precision_of(w: Float[AnyArray, "K N"], q: QTensor) -> Precision:
    """Returns the measured precision of `q` against the kernel `w` `[K, N]`, and the expected one.

    The expected noise of integers is step² / 12, with the step of each group's min-max grid, with two
    levels of scales a whole number of the channel's levels.
    """
    sums = [
        (signal, noise, promised_noise(part, signal, q))
        for part, signal, noise in squares_by_columns(w, q)
    ]
    signal, noise, promised = (np.concatenate(parts) for parts in zip(*sums, strict=True))
    lost = (signal > 0) & ~(noise < signal) & (promised * 10 < signal)
    measured, expected = (decibels(signal.sum(), n.sum()) for n in (noise, promised))
    return Precision(measured, expected, int(lost.sum()))


def precision_warning(
    precision: Precision, q: QTensor, allowance_db: float = ALLOWANCE_DB
) -> str | None:
    """Returns a warning if a kernel has lost more in `q` than its bits explain, else None."""
    kind = f"{q.bits} bits" if q.fmt is None else q.fmt.name
    if q.fmt is None and q.has_levels:
        kind += " with two levels of scales"
    if not precision.measured >= precision.promised - allowance_db:
        return f"{precision.measured:.1f} dB where {kind} promise {precision.promised:.1f}"
    if precision.num_lost:
        return f"{precision.num_lost} of {q.shape[1]} output channels are lost in {kind}"
    return None


def promised_noise(
    w: Float[np.ndarray, "K N"], signal: Float[np.ndarray, " N"], q: QTensor
) -> Float[np.ndarray, " N"]:
    """Returns the squared error of each output channel that the bits of `q` promise."""
    if q.fmt is not None:
        return signal * 10 ** (-ELEMENT_DB[q.fmt.element] / 10)
    size = effective_group_size(w.shape[0], q.group_size)
    starts = np.arange(0, w.shape[0], size)
    low = np.minimum(np.minimum.reduceat(w, starts), 0)
    high = np.maximum(np.maximum.reduceat(w, starts), 0)
    if q.symmetric:
        high = np.maximum(-low, high)
        span, top = high, 2 ** (q.bits - 1) - 1
    else:
        span, top = high - low, 2**q.bits - 1
    if q.channel_group > 1:
        blocks = span.reshape(len(starts), -1, q.channel_group).max(-1)
        span = np.repeat(blocks, q.channel_group, axis=-1)
    steps = span / top
    if q.has_levels:
        level = np.maximum(np.abs(w).max(0), np.finfo(np.float32).tiny) / 127
        steps = np.ceil(steps / level) * level
    members = np.minimum(starts + size, w.shape[0]) - starts
    return (np.square(steps) / 12 * members[:, None]).sum(0)
