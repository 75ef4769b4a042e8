"""The report on how hard a model is to quantize: charts, a page, numbers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from qdit_jax.calibration import Stats
from qdit_jax.errors import UserError
from qdit_jax.files import GENERATOR, PathLike, as_path, check_apart, check_free, replaced_file
from qdit_jax.report import html as report
from qdit_jax.report.figures import (
    activation_channels_figure,
    outlier_figure,
    range_histograms,
    timestep_figure,
    weight_spread_figure,
)
from qdit_jax.report.model_stats import (
    OUTLIER_FACTOR,
    activation_facts,
    block_layers,
    group_text,
    input_ranges,
    shown_group_sizes,
    summary_of,
    weight_facts,
    weight_ranges,
)
from qdit_jax.report.provenance import provenance, provenance_text
from qdit_jax.types import Params

CAPTIONS = {
    "weights": "Weights: the largest of every input and of every output channel, sorted. Groups "
    "along input channels pay where input channels spread more.",
    "activations": "Inputs of layers: the largest value of every channel over all timesteps. "
    "Channels above the dashed line are counted as outliers.",
    "timesteps": "Inputs of layers: the largest value at each timestep. A static range must hold "
    "them all.",
    "outliers": "Outlier channels by layer, and the largest channel over the median one.",
    "ranges": "Histograms of ranges by layer: of weights in {groups}, and of every input channel at "
    "every timestep.",
}


def write_model_report(
    out: PathLike, title: str, params: Params, stats: Stats, protocol: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes charts (PNG), `stats.json` and `report.html` to `out`; returns what the JSON holds.

    `protocol` says how `stats` came about.

    Raises:
        UserError: if the network has no transformer blocks, or `out` holds other files of these names.
    """
    paths = {p: place for p, place in block_layers(params).items() if p in stats.low}
    if not paths:
        raise UserError(f"{title} has no transformer blocks to draw.")
    sizes = shown_group_sizes([params], paths)
    weights, inputs = weight_facts(params, paths), activation_facts(stats, paths)
    order = np.argsort(stats.timesteps)
    ranges = {
        "weights": weight_ranges(params, paths, sizes),
        "inputs": input_ranges(stats, paths),
    }
    figures = {
        "weights": weight_spread_figure(weights, paths),
        "activations": activation_channels_figure(inputs, paths),
        "timesteps": timestep_figure(inputs, paths, stats.timesteps, order),
        "outliers": outlier_figure(inputs, paths),
        "ranges": range_histograms(ranges, paths),
    }
    summary = {
        "model": title,
        "protocol": dict(protocol),
        "made": provenance(),
        "group_sizes": sizes,
        "timesteps": stats.timesteps.tolist(),
        "outlier_factor": OUTLIER_FACTOR,
        "weights": summary_of(weights),
        "inputs": summary_of(inputs),
    }
    out = as_path(out)
    check_report_folder(out, overwrite=True)
    for name, figure in figures.items():
        with replaced_file(out / f"{name}.png", "picture") as temporary:
            figure.savefig(temporary, dpi=110, metadata={"Software": GENERATOR})
    with replaced_file(out / "stats.json", "figures") as temporary:
        temporary.write_text(json.dumps(summary, indent=1))
    parts = [report.paragraph(protocol_text(protocol, stats, summary["made"]))]
    parts += [
        report.picture(figure, CAPTIONS[name].format(groups=group_text(sizes)))
        for name, figure in figures.items()
    ]
    parts.append(layers_table(summary))
    report.write_report(out / "report.html", f"Weights and activations of {title}", parts)
    return summary


def check_report_folder(
    out: PathLike, *, overwrite: bool, inputs: Iterable[PathLike | None] = ()
) -> None:
    """Raises `UserError` if `write_model_report` would replace other files than its own.

    Without `overwrite` no such file may exist. No input may be that folder, inside it or around it.
    """
    out = as_path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose a folder.")
    check_apart(out, inputs)
    results = {f"{name}.png": "picture" for name in CAPTIONS}
    for name, kind in {**results, "stats.json": "figures", "report.html": "report"}.items():
        check_free(out / name, overwrite, kind)


def protocol_text(protocol: Mapping[str, Any], stats: Stats, facts: Mapping[str, str]) -> str:
    halves = "conditions cycled"
    if "null" in stats.halves:
        halves += " and the null condition"
    told = ", ".join(f"{name} {value}" for name, value in protocol.items())
    return (
        f"Inputs recorded while sampling: {told}; {len(stats.timesteps)} timesteps, {halves}. "
        f"Run on {facts['device']}; {provenance_text(facts)}."
    )


def layers_table(summary: Mapping[str, Any]) -> str:
    rows = [
        [
            path,
            f"{weights['input_spread']:.2f}",
            f"{weights['output_spread']:.2f}",
            f"{inputs['spread']:.2f}",
            f"{inputs['largest_over_median']:.1f}",
            f"{inputs['num_outliers']} of {inputs['num_channels']}",
            ", ".join(map(str, inputs["outlier_channels"])) or "-",
            f"{inputs['drift']:.2f}",
        ]
        for (path, weights), inputs in zip(
            summary["weights"].items(), summary["inputs"].values(), strict=True
        )
    ]
    head = ["layer", "weights: spread over inputs", "over outputs", "inputs: spread"]
    head += ["largest / median", "outliers", "the largest of them", "drift"]
    note = (
        "Spread: standard deviation of the channels' largest values over their mean. Outliers: "
        f"above {OUTLIER_FACTOR:g} times the median channel. Drift: the largest range of a "
        "timestep over the smallest."
    )
    return report.table(head, rows, note)
