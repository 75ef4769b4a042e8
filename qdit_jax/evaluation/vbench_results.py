"""VBench's results, read back: every dimension's score, and its worst clip beside it.

A mean hides failures: subject consistency may fall from .93 to .53 while the mean of all dimensions falls
by .09. So the minimum of a dimension stands beside its score everywhere.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, cast

import numpy as np

from qdit_jax import report
from qdit_jax.errors import UserError
from qdit_jax.evaluation.vbench import DIMENSIONS
from qdit_jax.files import PathLike, as_path

SCALES = (1.0, 100.0)  # imaging_quality has percents per clip and a score from 0 to 1


@dataclasses.dataclass(frozen=True)
class VBenchScore:
    """A dimension's score as VBench says it, and its clips' own.

    Attributes:
        score: of all clips.
        minimum: the worst clip's, on the scale of the score; None where clips have no numbers.
        worst: that clip's file name.
        num_clips: how many clips have a number.
    """

    score: float
    minimum: float | None = None
    worst: str | None = None
    num_clips: int = 0


def read_vbench_results(paths: PathLike | Sequence[PathLike]) -> dict[str, VBenchScore]:
    """Returns the scores in `*_eval_results.json`, by dimension.

    VBench writes `{dimension: [score, [{"video_path": ..., "video_results": ...}, ...]]}`, one file per
    run; several are joined.

    Raises:
        UserError: if a file is something else, or two hold the same dimension.
    """
    files: Sequence[PathLike] = paths if isinstance(paths, list | tuple) else [cast(Any, paths)]
    found: dict[str, VBenchScore] = {}
    for path in files:
        for name, score in read_one(path).items():
            if name in found:
                raise UserError(f"{path} holds {name} once more; give each dimension once.")
            found[name] = score
    if not found:
        raise UserError("there are no results of VBench; give its *_eval_results.json.")
    return found


def read_one(path: PathLike) -> dict[str, VBenchScore]:
    """Returns the scores in one file."""
    try:
        entries = json.loads(as_path(path).read_text())
        return {name: score_of(entry) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"{path} is not a result of VBench ({{dimension: [score, clips]}}): {error}."
        ) from None


def score_of(entry: Any) -> VBenchScore:
    """Returns the score of a dimension's entry; a bare number has no clips."""
    if isinstance(entry, int | float):
        return VBenchScore(finite(entry))
    score, clips = finite(entry[0]), entry[1]
    numbers = [(number_of(clip), str(clip["video_path"])) for clip in clips]
    known = [(value, path) for value, path in numbers if value is not None]
    if not known:
        return VBenchScore(score)
    values = np.array([value for value, _ in known])
    scale = min(SCALES, key=lambda one: abs(values.mean() / one - score))
    worst = int(values.argmin())
    name = PurePath(known[worst][1]).name
    return VBenchScore(score, float(values[worst] / scale), name, len(known))


def number_of(clip: Mapping[str, Any]) -> float | None:
    """Returns a clip's own number, of True and False 1 and 0; None where it has none."""
    value = clip.get("video_results")
    return finite(value) if isinstance(value, bool | int | float) else None


def finite(value: Any) -> float:
    """Returns a finite number; raises `ValueError` for others."""
    number = float(value)
    if not np.isfinite(number):
        raise ValueError(f"a score is {value}")
    return number


def vbench_summary(
    scores: Mapping[str, VBenchScore], against: Mapping[str, VBenchScore] | None = None
) -> dict[str, Any]:
    """Returns the scores in JSON's types, with the lowest dimension and, against others, the greatest fall.

    Args:
        against: of the reference, such as full precision; dimensions that both have are compared.
    """
    lowest = min(scores, key=lambda name: scores[name].score)
    found: dict[str, Any] = {
        "dimensions": {name: dataclasses.asdict(scores[name]) for name in ordered(scores)},
        "mean": float(np.mean([score.score for score in scores.values()])),
        "lowest": {"dimension": lowest, "score": scores[lowest].score},
    }
    if against is not None:
        changes = {
            name: scores[name].score - against[name].score
            for name in ordered(scores)
            if name in against
        }
        if not changes:
            raise UserError("the two results have no dimension in common.")
        fell = min(changes, key=lambda name: changes[name])
        found["against"] = {name: dataclasses.asdict(against[name]) for name in ordered(against)}
        found["changes"] = changes
        found["greatest_fall"] = {"dimension": fell, "change": changes[fell]}
    return found


def ordered(scores: Mapping[str, Any]) -> list[str]:
    """Returns the dimensions in VBench's order, unknown ones after them."""
    known = [name for name in DIMENSIONS if name in scores]
    return known + sorted(set(scores) - set(known))


HEADER = ("dimension", "score", "worst clip", "which", "clips")


def vbench_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Returns the cells of a table, the header first."""
    header = HEADER + (("reference", "change") if "changes" in summary else ())
    rows: list[tuple[str, ...]] = [header]
    for name, entry in summary["dimensions"].items():
        minimum = "-" if entry["minimum"] is None else f"{entry['minimum']:.4f}"
        cells = (name, f"{entry['score']:.4f}", minimum, entry["worst"] or "-")
        row: tuple[str, ...] = (*cells, str(entry["num_clips"] or "-"))
        if "changes" in summary:
            other = summary["against"].get(name)
            change = summary["changes"].get(name)
            row = (
                *row,
                "-" if other is None else f"{other['score']:.4f}",
                "-" if change is None else f"{change:+.4f}",
            )
        rows.append(row)
    return rows


def vbench_text(summary: Mapping[str, Any]) -> str:
    """Returns in a sentence what the mean hides."""
    low = summary["lowest"]
    text = (
        f"mean of {len(summary['dimensions'])} dimensions {summary['mean']:.4f}; the lowest is "
        f"{low['dimension']}, {low['score']:.4f}"
    )
    if "greatest_fall" in summary:
        fell = summary["greatest_fall"]
        text += f"; against the reference {fell['dimension']} changed most for the worse, {fell['change']:+.4f}"
    return text


def write_vbench_page(path: PathLike, title: str, summary: Mapping[str, Any]) -> None:
    """Writes the scores as a page."""
    header, *rows = vbench_rows(summary)
    note = "VBench's own scores; beside each the worst clip's, which the mean hides."
    parts = [report.paragraph(vbench_text(summary) + "."), report.table(header, rows, note)]
    report.write_report(path, title, parts)
