"""Checks the settings in another program's file against a table of those that are understood."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qdit_jax.errors import UserError

KINDS = {
    "bool": "neither true nor false",
    "whole": "not a whole number",
    "number": "not a number",
    "text": "not text",
    "list": "not a list",
    "numbers": "not a list of numbers",
    "table": "not a table",
    "any": "not a value",
}


@dataclass(frozen=True)
class Setting:
    """One setting that is understood.

    Attributes:
        kind: one of `KINDS`.
        allowed: the values that are understood; empty for all of that kind.
        low, high: the range of a number, both ends included.
        default: its value where a file leaves it out.
        optional: whether null is a value.
        used: whether it has an effect here; one that is not used is known not to matter.
        remedy: what the message advises for a value that is not understood.
    """

    kind: str
    allowed: tuple[Any, ...] = ()
    low: float | int = -math.inf
    high: float | int = math.inf
    default: object = None
    optional: bool = False
    used: bool = True
    remedy: str = ""


Table = Mapping[str, Setting]
HARMLESS = Setting("any", used=False)


def is_kind(value: object, kind: str) -> bool:
    """Returns whether `value`, read from JSON or a saved Namespace, is of that kind."""
    if kind == "numbers":
        return isinstance(value, list | tuple) and all(is_kind(v, "number") for v in value)
    if kind == "number":
        if type(value) not in (int, float):  # neither a boolean nor a number of NumPy
            return False
        return isinstance(value, int | float) and math.isfinite(value)
    types: dict[str, tuple[type, ...]] = {
        "bool": (bool,),
        "whole": (int,),
        "text": (str,),
        "list": (list, tuple),
        "table": (dict,),
    }
    return kind == "any" or type(value) in types[kind]


def check_setting(source: str, name: str, value: object, setting: Setting) -> None:
    """Raises `UserError` unless a setting's value is understood.

    The message begins with `source` (`"config.json says"`), the setting's name and its value.
    """
    says = f"{source} {name}={shown(value)}"
    remedy = f"; {setting.remedy}" if setting.remedy else ""
    if value is None and setting.optional:
        return
    if not is_kind(value, setting.kind):
        raise UserError(f"{says}, which is {KINDS[setting.kind]}{remedy}.")
    if setting.allowed and value not in setting.allowed:
        known = " or ".join(shown(v) for v in setting.allowed)
        raise UserError(f"{says}; only {known} is understood{remedy}.")
    if isinstance(value, int | float) and not setting.low <= value <= setting.high:
        bounds = f"{setting.low:g} to {setting.high:g}"
        raise UserError(f"{says}, which is not in {bounds}{remedy}.")


def understood(source: str, values: Mapping[str, Any], table: Table) -> dict[str, Any]:
    """Returns the used settings of `table`, by name: those of `values`, else their defaults.

    Raises:
        UserError: as `check_setting`, if one is not in `table` or its value is not understood.
    """
    for name, value in values.items():
        if name not in table:
            raise UserError(
                f"{source} {name}={shown(value)}, which is not a setting that is understood; take it "
                "out of the file if the result does not depend on it."
            )
        check_setting(source, name, value, table[name])
    return {
        name: values.get(name, setting.default) for name, setting in table.items() if setting.used
    }


def shown(value: object) -> str:
    """Returns a value as a message shows it, cut short where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
