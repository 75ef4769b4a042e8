"""The error that a command line shows as one sentence, and checks that every room shares."""

from __future__ import annotations

import math
import operator
import re
from typing import Any


class UserError(ValueError):
    """Input that a user can put right; the message names it and says how."""


def check_counts(least: int = 1, **named: Any) -> None:
    """Raises for the first of the named values that is no whole number of `least` or more.

    Raises:
        TypeError: if it is no whole number.
        ValueError: if it is too small.
    """
    for name, value in named.items():
        try:
            number = None if isinstance(value, bool) else operator.index(value)
        except TypeError:
            number = None
        if number is None:
            raise TypeError(f"{name}={value!r} is not supported; use a whole number.")
        if number < least:
            raise ValueError(
                f"{name}={value} is not supported; use a whole number of {least} or more."
            )


def check_finite(**named: Any) -> None:
    """Raises `ValueError` for the first of the named numbers that is infinite or NaN; None passes."""
    for name, value in named.items():
        if isinstance(value, int | float) and not math.isfinite(value):
            raise ValueError(f"{name}={value} is not supported; use a finite number.")


def check_pattern(name: str, value: Any) -> None:
    """Raises if `value` is no regular expression; the message names the argument.

    Raises:
        TypeError: if it is no text.
        ValueError: if it cannot be read.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name}={value!r} is not supported; use a regular expression as text.")
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{name}={value!r} is no regular expression: {error}.") from error
