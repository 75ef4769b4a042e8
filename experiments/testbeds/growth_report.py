"""The table and the figure of `grow_outliers.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from check_testbed import DYNAMIC, GROUPS, STATIC

KINDS = ("qkv", "proj", "fc1", "fc2")
COMPARED_AT = "1500"
HEADER = (
    "| training | steps | noise error | qkv | proj | fc1 | fc2 | kurtosis qkv | fc1 | "
    "top token fc2 | drift qkv | fc1 | static dB | groups dB | dynamic dB |"
)


def write_report(folder: Path, results: dict[str, dict[str, Any]]) -> None:
    """Writes `growth.md` and `growth.png` from `{training: {step: measurement}}`."""
    lines = [HEADER, "|---|" + "---:|" * (HEADER.count("|") - 2)]
    for name, found in results.items():
        lines += [row(name, step, found[step]) for step in sorted(found, key=int)]
    (folder / "growth.md").write_text("\n".join(lines) + "\n")
    if any(COMPARED_AT in found for found in results.values()):
        write_figure(folder / "growth.png", results)


def row(name: str, step: str, found: dict[str, Any]) -> str:
    error = f"{found['noise_error']:.4f}" if "noise_error" in found else ""
    cells = [name, step, error]
    cells += [f"{found[kind]['ratio']:.1f}" for kind in KINDS]
    cells += [f"{found[kind]['kurtosis']:.2f}" for kind in ("qkv", "fc1")]
    cells.append(f"{found['fc2']['token_ratio']:.1f}")
    cells += [f"{found[kind]['drift']:.1f}" for kind in ("qkv", "fc1")]
    seen = found.get("decibels", {})
    cells += [f"{seen[n]:.1f}" if n in seen else "" for n in (STATIC, GROUPS, DYNAMIC)]
    return f"| {' | '.join(cells)} |"


def write_figure(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """Draws every training's ratios after 1,500 steps, and those of the base and long ones over steps."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    compared = {name: found[COMPARED_AT] for name, found in results.items() if COMPARED_AT in found}
    size = (13, 0.35 * len(compared) + 2.5)
    figure, (left, right) = plt.subplots(1, 2, figsize=size)
    position = np.arange(len(compared))
    for i, kind in enumerate(KINDS):
        ratio = [found[kind]["ratio"] for found in compared.values()]
        left.barh(position + 0.2 * (1.5 - i), ratio, 0.2, label=kind, color=f"C{i}")
    left.set_yticks(position, list(compared))
    left.invert_yaxis()
    left.set(xscale="log", xlabel=f"top channel / median channel, {COMPARED_AT} steps")
    left.minorticks_off()
    left.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    left.axvline(20, color="gray", linestyle=":")
    left.legend(fontsize=8)
    markers = iter("osv^Dx")
    for name, found in results.items():
        steps = sorted(found, key=int)
        if name != "base" and len(steps) < 3:
            continue
        marker = next(markers)
        for kind, color in (("qkv", "C0"), ("fc1", "C2")):
            ratio = [found[step][kind]["ratio"] for step in steps]
            label = f"{name}, {kind}"
            right.plot([int(s) for s in steps], ratio, marker=marker, color=color, label=label)
    right.set(xlabel="steps", ylabel="top channel / median channel", ylim=(0, None))
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
