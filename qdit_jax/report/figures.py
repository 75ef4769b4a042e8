"""Charts of a network's weights and activations, after the figures of the quantization papers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from qdit_jax.report.model_stats import OUTLIER_FACTOR, Place

MAX_LABELS = 28
Places = Mapping[str, Place]


def styled(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    """Returns a figure of small panels and its axes `[rows, columns]`."""
    with matplotlib.rc_context({"font.size": 8}):
        figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
    return figure, axes


def shown_blocks(places: Places) -> list[str]:
    """Returns the first, the middle and the last block."""
    blocks = blocks_of(places)
    return list(dict.fromkeys((blocks[0], blocks[len(blocks) // 2], blocks[-1])))


def blocks_of(places: Places) -> list[str]:
    """Returns the blocks, in order."""
    return list(dict.fromkeys(place.block for place in places.values()))


def kinds_of(places: Places) -> list[str]:
    """Returns the kinds of layers in any block, in the order in which they first come."""
    return list(dict.fromkeys(place.kind for place in places.values()))


def panels(places: Places, size: tuple[float, float]) -> tuple[Figure, list[tuple[Axes, str]]]:
    """Returns a figure, and `(axis, path)` of each panel: a shown block's layer of one kind."""
    shown, kinds = shown_blocks(places), kinds_of(places)
    figure, axes = styled(len(shown), len(kinds), size)
    drawn = []
    for path, place in places.items():
        if place.block in shown:
            axis = axes[shown.index(place.block), kinds.index(place.kind)]
            axis.set_title(path, fontsize=8)
            drawn.append((axis, path))
    return figure, drawn


def weight_spread_figure(facts: Mapping[str, Mapping[str, Any]], places: Places) -> Figure:
    """Returns the largest weight of every input and output channel, sorted, of some layers."""
    figure, drawn = panels(places, (2.6, 2.0))
    for axis, path in drawn:
        entry = facts[path]
        for name, color in (("input", "C0"), ("output", "C1")):
            values = np.sort(entry[f"by_{name}"])[::-1]
            label = f"{name} channels, spread {entry[f'{name}_spread']:.2f}"
            axis.plot(np.linspace(0, 1, len(values)), values, color=color, label=label)
        axis.legend(fontsize=6)
        axis.set_ylim(bottom=0)
    figure.supxlabel("channels, largest first (share)", fontsize=8)
    figure.supylabel("largest |weight|", fontsize=8)
    return figure


def activation_channels_figure(facts: Mapping[str, Mapping[str, Any]], places: Places) -> Figure:
    """Returns the largest input of every channel of some layers, outliers marked."""
    figure, drawn = panels(places, (2.6, 2.0))
    for axis, path in drawn:
        values = facts[path]["by_channel"]
        axis.vlines(np.arange(len(values)), 0, values, color="C0", linewidth=0.6)
        limit = OUTLIER_FACTOR * np.median(values)
        axis.axhline(limit, color="C3", linewidth=0.8, linestyle="--")
        axis.set_ylim(0, 1.05 * max(values.max(), limit))
    figure.supxlabel("input channel", fontsize=8)
    figure.supylabel(f"largest |input|; dashed: {OUTLIER_FACTOR:g} x median channel", fontsize=8)
    return figure


def timestep_figure(
    facts: Mapping[str, Mapping[str, Any]],
    places: Places,
    timesteps: np.ndarray,
    order: np.ndarray,
) -> Figure:
    """Returns the range of some layers' inputs over the timesteps, largest and median channel."""
    shown, kinds = shown_blocks(places), kinds_of(places)
    figure, axes = styled(1, len(kinds), (2.8, 2.6))
    for axis, kind in zip(axes[0], kinds, strict=True):
        for path, place in places.items():
            if place.kind != kind or place.block not in shown:
                continue
            entry, color = facts[path], f"C{shown.index(place.block)}"
            at = timesteps[order]
            label = f"block {place.number}"
            axis.plot(at, entry["by_timestep"][order], color=color, label=label)
            axis.plot(at, entry["median_by_timestep"][order], color=color, linestyle=":")
        axis.set_title(kind, fontsize=8)
        axis.set_yscale("log")
        axis.legend(fontsize=6)
    figure.supxlabel("timestep", fontsize=8)
    figure.supylabel("largest |input|; dotted: median channel", fontsize=8)
    return figure


def outlier_figure(facts: Mapping[str, Mapping[str, Any]], places: Places) -> Figure:
    """Returns how many outlier channels each layer has, and how far out the largest is."""
    figure, axes = styled(2, 1, (9.0, 2.3))
    kinds = kinds_of(places)
    width = 0.8 / len(kinds)
    for i, kind in enumerate(kinds):
        own = {place.number: facts[path] for path, place in places.items() if place.kind == kind}
        at = np.array(list(own)) + (i - (len(kinds) - 1) / 2) * width
        for axis, name in zip(axes[:, 0], ("num_outliers", "largest_over_median"), strict=True):
            axis.bar(at, [entry[name] for entry in own.values()], width, label=kind)
    blocks = list(range(len(blocks_of(places))))
    axes[0, 0].set_ylabel(f"channels above {OUTLIER_FACTOR:g} x median", fontsize=8)
    axes[1, 0].set_ylabel("largest / median channel", fontsize=8)
    axes[0, 0].legend(fontsize=7, ncols=4)
    axes[1, 0].set_xlabel("block", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_xticks(blocks[:: -(-len(blocks) // MAX_LABELS)])
    return figure


def range_histograms(groups: Mapping[str, Mapping[str, np.ndarray]], places: Places) -> Figure:
    """Returns histograms of ranges by layer: one panel per title and kind, one row of bins per block.

    `groups` maps a panel's title to `{layer: ranges}`. Bins are equal in log10 of the range.
    """
    kinds = kinds_of(places)
    figure, axes = styled(len(groups), len(kinds), (2.6, 2.2))
    for row, (title, ranges) in zip(axes, groups.items(), strict=True):
        for axis, kind in zip(row, kinds, strict=True):
            found = {places[p].number: r for p, r in ranges.items() if places[p].kind == kind}
            axis.set_title(f"{title}: {kind}", fontsize=8)
            axis.grid(False)
            if found:
                draw_histograms(axis, found)
    figure.supxlabel("range (log scale)", fontsize=8)
    figure.supylabel("block", fontsize=8)
    return figure


def draw_histograms(axis: Axes, ranges: Mapping[int, np.ndarray], num_bins: int = 40) -> None:
    """Draws a map: blocks down, ranges across, the share of each block's groups as color."""
    positive = {block: r[r > 0] for block, r in ranges.items()}
    everything = np.concatenate(list(positive.values()))
    if not everything.size:
        return
    low, high = np.log10(everything.min()), np.log10(everything.max())
    edges = np.logspace(low - 0.02, high + 0.02, num_bins + 1)
    blocks = sorted(positive)
    counts = np.stack([np.histogram(positive[b], edges)[0] for b in blocks]).astype(float)
    shares = counts / np.maximum(counts.max(1, keepdims=True), 1)
    axis.pcolormesh(edges, np.arange(len(blocks) + 1) - 0.5, shares, cmap="Blues")
    axis.set_xscale("log")
    wide = high - low > 1.5
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.invert_yaxis()
    positions = np.arange(len(blocks))[:: -(-len(blocks) // 14)]
    axis.set_yticks(positions, [str(blocks[i]) for i in positions])
