"""Table, ranking and figure of the cells that `paper_tables.py` has measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import kendalltau

# FID on ImageNet 256 px, 100 steps, guidance 1.5, W4A8, as arXiv:2406.17343 publishes them.
PUBLISHED = {
    "full precision": 5.31,
    "ptq4dm": 215.68,
    "repq_vit": 226.60,
    "tfmq_dm": 141.90,
    "ptq4dit": 7.75,
    "g4w_p4a": 7.66,
    "qdit": 6.40,
}


def write_report(out: Path, content: dict[str, Any]) -> None:
    """Writes `tables.json`, `tables.md` and `tables.png` into the folder `out`."""
    (out / "tables.json").write_text(json.dumps(content, indent=1))
    text = markdown(content)
    (out / "tables.md").write_text(text)
    figure(content["rows"]).savefig(out / "tables.png", dpi=120)
    print(text)


def ordered(rows: Sequence[dict[str, Any]], name: str) -> list[str]:
    """Returns the values of a column in the order in which they first come."""
    return list(dict.fromkeys(row[name] for row in rows))


def markdown(content: dict[str, Any]) -> str:
    """Returns a table per precision, the rankings' agreement, and the published figures."""
    rows, lines = content["rows"], []
    for bits in ordered(rows, "bits"):
        states = [
            s
            for s in ordered(rows, "state")
            if any(r["state"] == s and r["bits"] == bits for r in rows)
        ]
        lines += [f"**{bits.upper()}**: {measures(rows)}", ""]
        lines += ["| method | " + " | ".join(states) + " | bytes | s to quantize |"]
        lines += ["|---" * (len(states) + 3) + "|"]
        full = [content["full"][state].get("frechet_distance") for state in states]
        spans = [span(d, ".2f") if d else "" for d in full]
        lines += [
            f"| full precision | {' | '.join(spans)} | {content['full'][states[0]]['bytes']:,} | |"
        ]
        for method in ordered(rows, "method"):
            found = {r["state"]: r for r in rows if (r["bits"], r["method"]) == (bits, method)}
            if found:
                cells = " | ".join(cell(found.get(state)) for state in states)
                size = span([row["bytes"] for row in found.values()], ",")
                seconds = span([row["seconds_to_quantize"] for row in found.values()], ".0f")
                lines += [f"| {method} | {cells} | {size} | {seconds} |"]
        lines.append("")
    lines += agreement(rows)
    if not any("frechet_distance" in row for row in rows):
        return "\n".join(lines) + "\n"
    published = ", ".join(f"{name} {value}" for name, value in PUBLISHED.items())
    lines += [
        "",
        f"As published (FID, DiT-XL/2 256 px, W4A8, arXiv:2406.17343; not ours): {published}.",
    ]
    return "\n".join(lines) + "\n"


def measures(rows: Sequence[dict[str, Any]]) -> str:
    """Returns what the figures of a cell are, in their order."""
    named = {
        "flicker_error": "flicker error (per mille of the span of values)",
        "frechet_distance": "Fréchet distance (mean over seeds), mean squared distance of paired "
        "features",
    }
    found = [text for name, text in named.items() if any(name in row for row in rows)]
    return ", ".join(["closeness in dB (95%)", *found])


def cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    parts = [interval(row["closeness_db"])]
    if "flicker_error" in row:
        parts.append(f"{1000 * row['flicker_error']['estimate']:.1f}")
    if "frechet_distance" in row:
        paired = row["feature_distance"]["estimate"]
        parts += [f"{np.mean(row['frechet_distance']):.2f}", f"{paired:.2g}"]
    return ", ".join(parts)


def span(values: Sequence[float], form: str) -> str:
    """Returns the least and the greatest value, or the one that all are."""
    low, high = (format(value, form) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def interval(near: dict[str, float]) -> str:
    return f"{near['estimate']:.1f} ({near['low']:.1f} to {near['high']:.1f})"


def agreement(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns Kendall's τ of the methods' order by closeness between every two states."""
    lines = []
    for bits in ordered(rows, "bits"):
        by_state = {
            state: {
                r["method"]: r["closeness_db"]["estimate"]
                for r in rows
                if (r["state"], r["bits"]) == (state, bits)
            }
            for state in ordered(rows, "state")
        }
        for a, b in combinations(by_state, 2):
            both = [m for m in by_state[a] if m in by_state[b]]
            if len(both) > 2:
                order = ([by_state[s][m] for m in both] for s in (a, b))
                lines.append(
                    f"- {bits.upper()}, {a} and {b}: τ = {kendalltau(*order).statistic:.2f}"
                )
    return ["Kendall's τ of the methods' order:", "", *lines] if lines else []


def figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Returns a panel per state: closeness by method, a color per precision."""
    states, methods, bits = (ordered(rows, name) for name in ("state", "method", "bits"))
    drawn = Figure(figsize=(4 * len(states) + 2, 0.3 * len(methods) + 1.5), layout="constrained")
    axes = drawn.subplots(1, len(states), squeeze=False, sharey=True)[0]
    for axis, state in zip(axes, states, strict=True):
        for width in bits:
            found = {
                r["method"]: r["closeness_db"]
                for r in rows
                if (r["state"], r["bits"]) == (state, width)
            }
            places = [methods.index(m) for m in found]
            middle = np.array([v["estimate"] for v in found.values()])
            low, high = (np.array([v[k] for v in found.values()]) for k in ("low", "high"))
            axis.errorbar(
                middle,
                places,
                xerr=(middle - low, high - middle),
                fmt="o",
                ms=4,
                label=width.upper(),
            )
        axis.set_title(state)
        axis.set_xlabel("closeness to full precision, dB")
        axis.grid(alpha=0.25)
        axis.set_yticks(range(len(methods)), methods)
    axes[0].invert_yaxis()
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return drawn
