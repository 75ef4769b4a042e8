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
TIMING = (
    "Seconds are those of all samples, by the median batch of one run on a machine that may have "
    "been busy: noisy."
)


def write_pictures(path: AnyPath, pictures: Mapping[str, np.ndarray]) -> None:
    """Writes the first samples of every model, side by side under their titles."""
    save_picture(path, side_by_side(pictures, columns=COLUMNS // 2, scale=2))


def write_summary(
    path: AnyPath, content: Mapping[str, Any], pictures: Mapping[str, np.ndarray]
) -> None:
    """Writes the self-contained page: what ran, pictures, figures; `content` is metrics.json's."""
    settings, facts, models = (content[name] for name in ("settings", "made", "models"))
    parts = [
        report.paragraph(
            f"{settings['num_samples']} samples per model, {settings['num_steps']} DDIM steps, "
            f"guidance {settings['guidance']:g}, {settings['numerics']} numerics "
            f"in {settings['dtype']}, the same noise "
            f"and labels for all, seed {settings['seed']}. Run on {facts['device']}; "
            f"{report.provenance_text(facts)}."
        ),
        report.heading("The same noise and labels"),
        *(
            report.picture(image_grid(images, columns=SHOWN, scale=3), title)
            for title, images in pictures.items()
        ),
        report.heading("Size and closeness"),
        report.table(
            ["model", "bytes", "smaller by", "closeness, dB", "95% interval",
             metrics.DEMO_FRECHET_DISTANCE, "seconds", "with compilation"],
            [row(model, models[0]) for model in models],
            "Closeness is the signal-to-error ratio of each sample against full precision, the mean "
            "over samples; more is closer. Bytes are those of all parameters in memory. " + TIMING,
        ),
        report.picture(figure(models[1:]), "Bytes against closeness, with 95% intervals"),
    ]  # fmt: skip
    report.write_report(path, "A diffusion transformer in 4 to 8 bits", parts)


def row(model: Mapping[str, Any], full: Mapping[str, Any]) -> list[str]:
    near = model["closeness_db"]
    return [
        model["title"],
        f"{model['bytes']:,}",
        f"{full['bytes'] / model['bytes']:.2f}x",
        "-" if near is None else f"{near['estimate']:.1f}",
        "-" if near is None else f"{near['low']:.1f} to {near['high']:.1f}",
        f"{model[metrics.DEMO_FRECHET_DISTANCE]:.2f}",
        f"{model['seconds']:.2f}",
        f"{model['seconds_with_compilation']:.2f}",
    ]


def figure(models: Sequence[Mapping[str, Any]]) -> Figure:
    """Returns a chart of bytes against closeness, one point per model."""
    with matplotlib.rc_context({"font.size": 9}):
        chart = Figure(figsize=(8.5, 4), layout="constrained")
        axes = chart.subplots()
        for model in models:
            near = model["closeness_db"]
            middle = near["estimate"]
            spread = [[middle - near["low"]], [near["high"] - middle]]
            at = model["bytes"] / 1e6
            axes.errorbar(at, middle, spread, fmt="o", capsize=3, label=model["title"])
        axes.set(xlabel="megabytes of parameters", ylabel="closeness to full precision, dB")
        axes.margins(0.1)
        axes.grid(alpha=0.3)
        chart.legend(loc="outside right center", frameon=False)  # names beside points overlap
    return chart
