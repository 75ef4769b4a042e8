"""`--numerics`: what quantized layers compute, an option of every verb that runs a network."""

from __future__ import annotations

import argparse
import sys
from typing import Any

CHOICES = ("simulated", "integer")


def add_numerics(add: Any, default: str | None, help_text: str) -> None:
    """Adds `--numerics` by `add`, a parser's or group's `add_argument`, and its earlier name."""
    add("--numerics", choices=CHOICES, default=default, help=help_text)
    add(
        "--execution",
        dest="numerics",
        choices=CHOICES,
        default=argparse.SUPPRESS,
        action=EarlierName,
        help=argparse.SUPPRESS,
    )


class EarlierName(argparse.Action):
    """Stores the value and says what the option is called now; to go with the next release."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        print(f"qdit: note: {option_string} is called --numerics now.", file=sys.stderr)
        setattr(namespace, self.dest, values)
