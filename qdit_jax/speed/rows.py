"""What a bench measured: a row per network, way and batch size."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from qdit_jax.speed.timing import Taken

SLOW = 1.2  # times bfloat16, from which on a quantized network is marked


@dataclasses.dataclass(frozen=True)
class Row:
    """One network, computed one way, at one batch size.

    Attributes:
        title: what is timed, such as `float32`, `bfloat16` or `w4a8-g128`.
        batch: samples of a step; guided, the network sees twice as many.
        numerics: of quantized layers; None in full precision.
        implementations: how many layers each computes.
        milliseconds: of a step.
        ratio: of its time to the baseline's, round by round; of the baseline to itself it shows how
            much chance there is in the others.
        weight_bytes: that its parameters hold.
        temporary_bytes: that the compiled step needs beside them, as XLA plans it.
        compile_seconds: of tracing and compiling the step.
        relative_error, db: of its output against full precision on the same inputs, those of four steps
            of the sampler in full precision, as a share of the output's norm and as signal to error;
            None without full precision to compare with.
        peak_share: of its time, what its products would take at the device's full rates (`peak_share`); None
            where these are not known.
        is_slow: whether it is quantized and takes more than `SLOW` times as long as bfloat16 at this batch;
            None where bfloat16 was not timed.
    """

    title: str
    batch: int
    numerics: str | None
    implementations: Mapping[str, int]
    milliseconds: Taken
    ratio: Taken
    weight_bytes: int
    temporary_bytes: int | None
    compile_seconds: float
    relative_error: float | None
    db: float | None
    peak_share: float | None = None
    is_slow: bool | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        """Returns the row that `dataclasses.asdict` described."""
        times = {name: Taken(**data[name]) for name in ("milliseconds", "ratio")}
        return cls(**{**data, **times})


@dataclasses.dataclass(frozen=True)
class Bench:
    """What `bench` measured.

    Attributes:
        rows: by batch size, the baseline first.
        baseline: the title of what the ratios are to.
        settings: how it was measured, in JSON's types.
        provenance: date, versions and device.
    """

    rows: list[Row]
    baseline: str
    settings: dict[str, Any]
    provenance: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Returns everything in JSON's types."""
        return dataclasses.asdict(self)


def marked(rows: Sequence[Row]) -> list[Row]:
    """Returns rows that say whether they are slow, where bfloat16 was timed at their batch."""
    narrow = {row.batch: row.ratio.median for row in rows if row.title == "bfloat16"}
    found = []
    for row in rows:
        is_known = row.numerics is not None and row.batch in narrow
        is_slow = row.ratio.median > SLOW * narrow[row.batch] if is_known else None
        found.append(dataclasses.replace(row, is_slow=is_slow))
    return found
