"""What `qdit bench` prints: a row per network, way and batch size."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from qdit_jax.allocation import Latency
from qdit_jax.sampling import guidance_text
from qdit_jax.speed import SLOW, Bench, Row, Taken

HEADER = (
    "batch", "network", "numerics", "computed by", "ms per step", "interval", "x of {}", "interval",
    "rounds", "of peak", "MB weights", "MB beside", "compile s", "error", "dB", "",
)  # fmt: skip
TEXTS = {"network", "numerics", "computed by", "layer", ""}  # columns of text, to the left


def bench_lines(found: Bench) -> list[str]:
    """Returns the table and what is to be said of it."""
    header = tuple(name.format(found.baseline) for name in HEADER)
    counts, guidance = [row.ratio.count for row in found.rows], found.settings["guidance"]
    rounds = str(max(counts)) if len({*counts}) == 1 else f"{min(counts)} to {max(counts)}"
    guided = "not guided" if guidance in (None, 1) else f"guided by {guidance_text(guidance)}"
    cached = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    return [
        *aligned([header, *map(row_cells, found.rows)]),
        *(
            [f"compile times are those of the cache in {cached}, where it has a program"]
            * bool(cached)
        ),
        f"one step of the sampler, {guided}: medians of {rounds} rounds in turn with "
        f"{found.baseline}, 95% intervals of the median, on {found.provenance['device']}, jax "
        f"{found.provenance['jax']}",
    ]


def row_cells(row: Row) -> tuple[str, ...]:
    """Returns a row's cells."""
    used = ", ".join(
        name if len(row.implementations) == 1 else f"{name} {count}"
        for name, count in row.implementations.items()
    )
    return (
        str(row.batch),
        row.title,
        row.numerics or "-",
        used or "-",
        f"{row.milliseconds.median:.4g}",
        interval_text(row.milliseconds),
        f"{row.ratio.median:.2f}",
        interval_text(row.ratio),
        str(row.ratio.count),
        "-" if row.peak_share is None else f"{row.peak_share:.1%}",
        megabytes(row.weight_bytes),
        megabytes(row.temporary_bytes),
        f"{row.compile_seconds:.1f}",
        "-" if row.relative_error is None else f"{row.relative_error:.2%}",
        "-" if row.db is None else f"{row.db:.1f}",
        f"more than {SLOW:g} x bfloat16" if row.is_slow else "",
    )


def interval_text(taken: Taken) -> str:
    return f"{taken.low:.3g} to {taken.high:.3g}"


def megabytes(count: float | int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.2f}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns rows as lines whose columns stand below each other, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            f"{cell:{'<' if rows[0][i] in TEXTS else '>'}{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def latency_lines(found: Latency) -> list[str]:
    """Returns the times of layers as a table, with ratios to full precision in the same shape."""
    lines = [("K", "layer", "computed by", "ms", "interval", "x of w16 a16")]
    full = {layer.key[:3]: layer.own_ms for layer in found.layers if layer.choice == "w16 a16"}
    for layer in found.layers:
        base = full[layer.key[:3]]
        lines.append(
            (
                str(layer.channels),
                f"{layer.width} wide, {layer.rows} rows, {layer.choice}",
                layer.implementation or "-",
                f"{layer.ms:.4g}",
                f"{layer.low:.3g} to {layer.high:.3g}",
                f"{layer.own_ms / base:.2f}" if base else "-",
            )
        )
    return [
        *aligned(lines),
        f"{found.numerics}, batch {found.batch}, {found.inputs} network inputs per step, on "
        f"{found.provenance['device']}, jax {found.provenance['jax']}",
    ]
