"""What a person looks at after the demonstration: pictures and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from qdit_jax import metrics, report
from qdit_jax.files import AnyPath
from qdit_jax.report import image_grid, save_picture, side_by_side

COLUMNS = 10
SHOWN = 20
TIMING = "Seconds are one timing each, on a machine that may have been busy: noisy."


def write_pictures(path: AnyPath, outcomes: Sequence[Any]) -> None:
    """Writes the first samples of every model, side by side under their titles."""
    save_picture(path, side_by_side(rows_of(outcomes), columns=COLUMNS // 2, scale=2))


def rows_of(outcomes: Sequence[Any]) -> dict[str, np.ndarray]:
    return {outcome.title: outcome.images[:SHOWN] for outcome in outcomes}


def write_summary(
    path: AnyPath, outcomes: Sequence[Any], settings: Any, made: Mapping[str, str]
) -> None:
    """Writes the self-contained page: what ran, pictures, figures; `made` is its provenance."""
    parts = [
        report.paragraph(
            f"{settings.num_samples} samples per model, {settings.num_steps} DDIM steps, guidance "
            f"{settings.guidance:g}, {settings.numerics} numerics, the same noise and labels for "
            f"all, seed {settings.seed}. Run on {made['device']}; {report.provenance_text(made)}."
        ),
        report.heading("The same noise and labels"),
        *(
            report.picture(image_grid(images, columns=SHOWN, scale=3), title)
            for title, images in rows_of(outcomes).items()
        ),
        report.heading("Size and closeness"),
        report.table(
            ["model", "bytes", "smaller by", "closeness, dB", "95% interval",
             metrics.DEMO_FRECHET_DISTANCE, "seconds", "with compilation"],
            [row(outcome, outcomes[0]) for outcome in outcomes],
            "Closeness is the signal-to-error ratio of each sample against full precision, the mean "
            "over samples; more is closer. Bytes are those of all parameters in memory. " + TIMING,
        ),
        report.picture(figure(outcomes[1:]), "Bytes against closeness, with 95% intervals"),
    ]  # fmt: skip
    report.write_report(path, "A diffusion transformer in 4 to 8 bits", parts)


def row(outcome: Any, full: Any) -> list[str]:
    near = outcome.closeness
    return [
        outcome.title,
        f"{outcome.num_bytes:,}",
        f"{full.num_bytes / outcome.num_bytes:.2f}x",
        "-" if near is None else f"{near.estimate:.1f}",
        "-" if near is None else f"{near.low:.1f} to {near.high:.1f}",
        f"{outcome.frechet:.2f}",
        f"{outcome.seconds:.2f}",
        f"{outcome.first_seconds:.2f}",
    ]


def figure(outcomes: Sequence[Any]) -> Figure:
    """Returns a chart of bytes against closeness, one point per model."""
    with matplotlib.rc_context({"font.size": 9}):
        chart = Figure(figsize=(8.5, 4), layout="constrained")
        axes = chart.subplots()
        for outcome in outcomes:
            near = outcome.closeness
            spread = [[near.estimate - near.low], [near.high - near.estimate]]
            axes.errorbar(
                outcome.num_bytes / 1e6,
                near.estimate,
                spread,
                fmt="o",
                capsize=3,
                label=outcome.title,
            )
        axes.set(xlabel="megabytes of parameters", ylabel="closeness to full precision, dB")
        axes.margins(0.1)
        axes.grid(alpha=0.3)
        chart.legend(loc="outside right center", frameon=False)  # names beside points overlap
    return chart
