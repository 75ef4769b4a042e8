"""`qdit methods`: the ways to quantize, and what each needs and costs."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

from qdit_jax.cli.options import verb_parser

HELP = """\
List the methods of `qdit quantize --method NAME`: the idea in a sentence, the paper, what is
calibrated, and what the quantized model costs when it runs.

examples:
  qdit methods
  qdit methods --json
"""

# What a method may need, in words.
DATA = {
    "items": "inputs of the network, sampled along trajectories (--items)",
    "stats": "ranges of the layers' inputs over timesteps (--stats)",
}


def add_parser(subparsers: Any) -> None:
    """Adds the verb."""
    parser = verb_parser(subparsers, "methods", HELP)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prints every method of the table, and returns them by name."""
    from qdit_jax.methods import METHODS, method_named

    described = [method_named(name).to_json() for name in METHODS]
    print("\n\n".join(map(entry, described)))
    return {"methods": described}


def entry(method: dict[str, Any]) -> str:
    """Returns a method's description as lines of text."""
    lines = {
        "": method["idea"],
        "paper:": method["paper"] or "none",
        "calibrates on:": ", ".join(DATA.get(n, n) for n in method["needs"]) or "nothing",
        "at run time:": method["runtime_cost"],
    }
    wrapped = (
        textwrap.fill(f"{name} {text}".strip(), 98, initial_indent="  ", subsequent_indent="    ")
        for name, text in lines.items()
    )
    return "\n".join((method["name"], *wrapped))
