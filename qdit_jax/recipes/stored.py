"""Rules as JSON: what a `recipe.json` and a checkpoint hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qdit_jax.errors import check_pattern
from qdit_jax.files import PathLike, as_path, read_once
from qdit_jax.quant import ActSpec, WeightSpec
from qdit_jax.recipes.over_time import OverTime
from qdit_jax.recipes.rules import LayerSpec, Rule

FORMAT_VERSION = 1
ENTRIES = ("layers", "weight", "act", "transform", "rank")  # of a rule


def to_json(rules: Sequence[Rule], name: str, over_time: OverTime | None = None) -> dict[str, Any]:
    """Returns a recipe's rules, name and schedule as JSON-serializable values."""
    entries = [
        {
            "layers": rule.layers,
            "weight": rule.spec.weight and rule.spec.weight.to_json(),
            "act": rule.spec.act and rule.spec.act.to_json(),
            **beside_rounding(rule.spec),
        }
        for rule in rules
    ]
    schedule = {} if over_time is None else {"over_time": over_time.to_json()}
    return {"format_version": FORMAT_VERSION, "name": name, "rules": entries, **schedule}


def beside_rounding(spec: LayerSpec) -> dict[str, Any]:
    """Returns the transform and the rank that a spec asks for; nothing where the method decides."""
    asked = {"transform": spec.transform, "rank": spec.rank}
    return {name: value for name, value in asked.items() if value is not None}


def from_json(
    source: PathLike | dict[str, Any],
) -> tuple[tuple[Rule, ...], str, OverTime | None]:
    """Returns rules, name and schedule in a JSON file, or in values that `to_json` returned.

    Raises:
        ValueError: if the file is absent or no recipe, or a setting is unknown.
    """
    data, where = (source, "recipe") if isinstance(source, dict) else (read(source), str(source))
    version = data.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{where}: format_version={version}; this release reads version {FORMAT_VERSION}."
        )
    rules = data.get("rules")
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise ValueError(f"{where} is not a recipe: it needs a list of objects named 'rules'.")
    found = (rule_from_json(rule, f"{where}, rule {i}") for i, rule in enumerate(rules))
    schedule = data.get("over_time")
    over_time = None if schedule is None else OverTime.from_json(schedule, where)
    return tuple(found), data.get("name", "custom"), over_time


def read(path: PathLike) -> dict[str, Any]:
    try:
        data = read_once(as_path(path).read_text())
    except FileNotFoundError as error:
        raise ValueError(f"recipe file {path} does not exist.") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"recipe file {path} is not readable JSON: {error}.") from error
    if not isinstance(data, dict):
        raise ValueError(f"recipe file {path} holds no JSON object.")
    return data


def rule_from_json(data: dict[str, Any], where: str) -> Rule:
    if unknown := sorted(set(data) - set(ENTRIES)):
        raise ValueError(f"{where}: unknown entry {unknown[0]!r}; known: {', '.join(ENTRIES)}.")
    pattern = data.get("layers")
    if not isinstance(pattern, str):
        raise ValueError(f"{where}: layers={pattern!r} is not a regular expression.")
    try:
        check_pattern("layers", pattern)
        weight = data.get("weight")
        act = data.get("act")
        spec = LayerSpec(
            None if weight is None else WeightSpec.from_json(weight),
            None if act is None else ActSpec.from_json(act),
            data.get("transform"),
            data.get("rank"),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    return Rule(pattern, spec)
