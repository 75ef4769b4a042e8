"""`qdit methods`: the methods of quantization, what each needs and what it costs."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

from qdit_jax.cli.options import SubParsers, verb_parser

HELP = """\
List the methods that `qdit quantize --method NAME` offers. For each: its idea in a sentence, its
paper, the calibration data that it needs (an option of `qdit quantize`), and what it adds to the
model's run time, the number formats that hardware needs, and the settings that a preset's name
gets from it. Presets are w<bits>a<bits>, such as w4a8; w4a8-fast and w8a8-fast make each product one
int8 dot, and every method takes them, unless its own number format has no such dot.

examples:
  qdit methods
  qdit methods --json
"""

# The calibration data that a method may need, in words.
DATA = {
    "items": "inputs of the network, recorded while sampling (--items)",
    "stats": "ranges of the layers' inputs at every timestep (--stats)",
}


def add_parser(subparsers: SubParsers) -> None:
    """Adds the verb."""
    parser = verb_parser(subparsers, "methods", HELP)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prints every method of the table, and returns them."""
    from qdit_jax.methods import METHODS, method_named

    described = [method_named(name).to_json() for name in METHODS]
    print("\n\n".join(map(entry, described)))
    return {"methods": described}


def entry(method: dict[str, Any]) -> str:
    """Returns a method's description as lines of text."""
    lines = {
        "": method["idea"],
        "paper:": method["paper"] or "none",
        "calibration data:": ", ".join(DATA.get(n, n) for n in method["needs"]) or "nothing",
        "at run time:": method["runtime_cost"],
        "hardware:": method["hardware"],
        "preset settings:": ", ".join(map(setting, method["settings"].items())) or "the defaults",
    }
    wrapped = (
        textwrap.fill(f"{name} {text}".strip(), 98, initial_indent="  ", subsequent_indent="    ")
        for name, text in lines.items()
    )
    return "\n".join((method["name"], *wrapped))


def setting(item: tuple[str, Any]) -> str:
    """Returns a setting of `Recipe.preset` in the words of the options."""
    name, value = item
    if isinstance(value, dict):  # a range rule
        value = value["name"]
    return f"{name}={value}"
