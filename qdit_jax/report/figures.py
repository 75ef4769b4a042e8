"""Charts of a network's weights and activations, after the figures of the quantisation papers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from qdit_jax.report.model_stats import BLOCK_LAYERS, OUTLIER_FACTOR, block_number, kind_of

MAX_LABELS = 28


def styled(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    """Returns a figure of small panels and its axes `[rows, columns]`."""
    with matplotlib.rc_context({"font.size": 8}):
        figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
    return figure, axes


def shown_blocks(paths: Sequence[str]) -> list[int]:
    """Returns the first, the middle and the last block's number."""
    numbers = sorted({block_number(path) for path in paths})
    return sorted({numbers[0], numbers[len(numbers) // 2], numbers[-1]})


def panels(facts: Mapping[str, Any], size: tuple[float, float]) -> Any:
    """Returns a figure, and `(axis, path)` of each panel: a shown block's layer of one kind."""
    blocks = shown_blocks(list(facts))
    figure, axes = styled(len(blocks), len(BLOCK_LAYERS), size)
    drawn = []
    for row, block in enumerate(blocks):
        for column, kind in enumerate(BLOCK_LAYERS):
            path = f"blocks_{block}/{kind}"
            if path in facts:
                axes[row, column].set_title(path, fontsize=8)
                drawn.append((axes[row, column], path))
    return figure, drawn


def weight_spread_figure(facts: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Returns the largest weight of every input and output channel, sorted, of some layers."""
    figure, drawn = panels(facts, (2.6, 2.0))
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


def activation_channels_figure(facts: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Returns the largest input of every channel of some layers, outliers marked."""
    figure, drawn = panels(facts, (2.6, 2.0))
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
    facts: Mapping[str, Mapping[str, Any]], timesteps: np.ndarray, order: np.ndarray
) -> Figure:
    """Returns the range of some layers' inputs over the timesteps, largest and median channel."""
    figure, axes = styled(1, len(BLOCK_LAYERS), (2.8, 2.6))
    for axis, kind in zip(axes[0], BLOCK_LAYERS, strict=True):
        for i, block in enumerate(shown_blocks(list(facts))):
            entry = facts.get(f"blocks_{block}/{kind}")
            if entry is None:
                continue
            at = timesteps[order]
            axis.plot(at, entry["by_timestep"][order], color=f"C{i}", label=f"block {block}")
            axis.plot(at, entry["median_by_timestep"][order], color=f"C{i}", linestyle=":")
        axis.set_title(kind, fontsize=8)
        axis.set_yscale("log")
        axis.legend(fontsize=6)
    figure.supxlabel("timestep", fontsize=8)
    figure.supylabel("largest |input|; dotted: median channel", fontsize=8)
    return figure


def outlier_figure(facts: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Returns how many outlier channels each layer has, and how far out the largest is."""
    figure, axes = styled(2, 1, (9.0, 2.3))
    blocks = sorted({block_number(path) for path in facts})
    for i, kind in enumerate(BLOCK_LAYERS):
        entries = [facts.get(f"blocks_{b}/{kind}") for b in blocks]
        offset = (i - 1.5) * 0.2
        for axis, name in zip(axes[:, 0], ("num_outliers", "largest_over_median"), strict=True):
            heights = [0 if entry is None else entry[name] for entry in entries]
            axis.bar(np.array(blocks) + offset, heights, 0.2, label=kind)
    axes[0, 0].set_ylabel(f"channels above {OUTLIER_FACTOR:g} x median", fontsize=8)
    axes[1, 0].set_ylabel("largest / median channel", fontsize=8)
    axes[0, 0].legend(fontsize=7, ncols=4)
    axes[1, 0].set_xlabel("block", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_xticks(blocks[:: -(-len(blocks) // MAX_LABELS)])
    return figure


def range_histograms(groups: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """Returns histograms of ranges by layer: one panel a title and kind, one row of bins a block.

    `groups` maps a panel's title to `{layer: ranges}`. Bins are equal in log10 of the range.
    """
    figure, axes = styled(len(groups), len(BLOCK_LAYERS), (2.6, 2.2))
    for row, (title, ranges) in zip(axes, groups.items(), strict=True):
        for axis, kind in zip(row, BLOCK_LAYERS, strict=True):
            found = {block_number(p): r for p, r in ranges.items() if kind_of(p) == kind}
            axis.set_title(f"{title}: {kind}", fontsize=8)
            axis.grid(False)
            if found:
                draw_histograms(axis, found)
    figure.supxlabel("range (log scale)", fontsize=8)
    figure.supylabel("block", fontsize=8)
    return figure


def draw_histograms(axis: Any, ranges: Mapping[int, np.ndarray], num_bins: int = 40) -> None:
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
