"""`--numerics` and `--dtype`: how a network computes, options of every verb that runs one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from qdit_jax.cli.options import AddArgument

CHOICES = ("simulated", "integer")
DTYPES = ("float32", "bfloat16")


def add_numerics(add: AddArgument, default: str | None, help_text: str) -> None:
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


def add_dtype(add: AddArgument) -> None:
    """Adds `--dtype` by `add`, a parser's or group's `add_argument`."""
    add(
        "--dtype",
        choices=DTYPES,
        help="of products in full precision; norms, softmax, modulation, quantizers and the sampler "
        "stay in float32 (bfloat16 on accelerators, else float32)",
    )


def add_expand(add: AddArgument) -> None:
    """Adds `--expand` by `add`, a parser's or group's `add_argument`."""
    add(
        "--expand",
        choices=("per-call", "load"),
        default="per-call",
        help="where weights of 2 to 6 bits become bytes: in every product, or once when they are loaded, "
        "for more memory and, where unpacking takes time, shorter steps (%(default)s)",
    )


def add_hoist(add: AddArgument) -> None:
    """Adds `--hoist` by `add`, a parser's or group's `add_argument`."""
    add(
        "--hoist",
        action=argparse.BooleanOptionalAction,
        help="compute what sees timestep and condition only (modulation) before the loop, for all steps "
        "of a batch: no step reads their weights, but their outputs take memory (default: on accelerators, "
        "where memory allows)",
    )


class EarlierName(argparse.Action):
    """Stores the value and says what the option is called now; removed in the next release."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        print(f"qdit: note: {option_string} is called --numerics now.", file=sys.stderr)
        setattr(namespace, self.dest, values)
