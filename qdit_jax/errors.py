"""The error that the command line shows as one sentence, and checks that every room uses."""

from __future__ import annotations

import contextlib
import math
import operator
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, SupportsIndex


class UserError(ValueError):
    """A bad input that the user can correct; the message names it and says how.

    Names from a file may hold anything: what cannot be printed in a line is escaped.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))


def one_line(text: str) -> str:
    """Returns text with line ends and other characters that cannot be printed escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def check_counts(least: int = 1, **named: object) -> None:
    """Raises for the first of the named values that is not a whole number of `least` or more.

    Raises:
        TypeError: if it is not a whole number.
        ValueError: if it is too small.
    """
    for name, value in named.items():
        number = None
        if isinstance(value, SupportsIndex) and not isinstance(value, bool):
            with contextlib.suppress(TypeError):  # an array has `__index__`, and may refuse
                number = operator.index(value)
        if number is None:
            raise TypeError(f"{name}={value!r} is not supported; use a whole number.")
        if number < least:
            raise ValueError(
                f"{name}={value} is not supported; use a whole number of {least} or more."
            )


def check_finite(**named: object) -> None:
    """Raises `ValueError` for the first of the named numbers that is infinite or NaN; None passes."""
    for name, value in named.items():
        if isinstance(value, int | float) and not math.isfinite(value):
            raise ValueError(f"{name}={value} is not supported; use a finite number.")


def check_pattern(name: str, value: object) -> None:
    """Raises if `value` is not a regular expression; the message names the argument.

    Raises:
        TypeError: if it is not a string.
        ValueError: if it cannot be read.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name}={value!r} is not supported; use a regular expression as text.")
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{name}={value!r} is not a regular expression: {error}.") from error


def earlier_names(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Returns a `__getattr__` for a module whose names have changed, earlier name -> present name.

    An earlier name gives what the present one gives, and warns.
    """

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(
            f"{module}.{name} is called {names[name]} now; the earlier name goes in the next release.",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(sys.modules[module], names[name])

    return get
