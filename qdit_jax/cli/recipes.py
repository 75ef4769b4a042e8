"""`qdit recipes`: the presets by name, what each costs and gives."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

from qdit_jax.cli.options import SubParsers, verb_parser
from qdit_jax.cli.paths import path_option

HELP = """\
List the presets that `qdit quantize --recipe NAME` takes beside w<bits>a<bits>. For each: when to take
it, the product that it makes of a layer, the method that it is meant for, and what both gave on the
packaged digit model: closeness of samples to full precision in dB with its 95% interval, and the bytes of
all parameters. How they rank on that model is no promise for yours: measure it with `qdit evaluate`.

With CKPT, what each costs there: bits per weight of the layers that it quantizes, scales included, and the
bytes of all parameters; computed from shapes, nothing is quantized.

examples:
  qdit recipes
  qdit recipes xl2
  qdit quantize xl2 xl2-fast --recipe w4a8-fast --method smoothquant
"""


def add_parser(subparsers: SubParsers) -> None:
    """Adds the verb."""
    parser = verb_parser(subparsers, "recipes", HELP)
    parser.add_argument(
        "checkpoint",
        nargs="?",
        metavar="CKPT",
        type=path_option,
        help="a full-precision checkpoint: what each preset costs there",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prints every preset of the table, and returns them."""
    from qdit_jax.recipes import NAMED, measured_presets

    figures = measured_presets()
    found: list[dict[str, Any]] = []
    params = None
    if args.checkpoint is not None:
        from qdit_jax.cli.checkpoints import full_precision_checkpoint

        why = "presets are of full precision"
        params = full_precision_checkpoint(args.checkpoint, why).params
    for row in NAMED.values():
        entry = {
            "name": row.name,
            "idea": row.idea,
            "hardware": row.hardware,
            "method": row.method,
            "measured": figures["rows"].get(row.name),
            "here": None if params is None else cost(row.name, params),
        }
        found.append(entry)
    print("\n\n".join(map(text_of_entry, found)))
    print("\n" + footnote(figures))
    return {"recipes": found, "settings": figures["settings"], "made": figures["made"]}


def cost(name: str, params: Any) -> dict[str, Any]:
    """Returns bits per quantized weight and the bytes of all parameters of a preset."""
    import jax

    from qdit_jax.ptq import plan
    from qdit_jax.recipes import Recipe

    layers = plan(params, Recipe.preset(name, params))
    num_weights = sum(k * n for k, n in (layer.shape for layer in layers))
    after = sum(layer.bytes_after for layer in layers)
    saved = sum(layer.bytes_before for layer in layers) - after
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    return {"bits_per_weight": 8 * after / num_weights, "bytes": whole - saved}


def text_of_entry(entry: dict[str, Any]) -> str:
    """Returns a preset's description as lines of text."""
    figures, here = entry["measured"], entry["here"]
    lines = {"": entry["idea"], "product:": entry["hardware"], "method:": entry["method"]}
    if figures is None:
        lines["measured:"] = "no"
    else:
        db = figures["closeness_db"]
        lines["measured:"] = (
            f"{db['estimate']:.1f} dB ({db['low']:.1f} to {db['high']:.1f}), {figures['bytes']:,} bytes "
            f"({figures['date']})"
        )
    if here is not None:
        lines["here:"] = f"{here['bits_per_weight']:.2f} bits a weight, {here['bytes']:,} bytes"
    wrapped = (
        textwrap.fill(f"{title} {text}".strip(), 98, initial_indent="  ", subsequent_indent="    ")
        for title, text in lines.items()
    )
    return "\n".join((entry["name"], *wrapped))


def footnote(figures: dict[str, Any]) -> str:
    """Returns how the figures were measured."""
    s, made = figures["settings"], figures["made"]
    return (
        f"Measured on the packaged digit model by experiments/tables/measure_presets.py: "
        f"{s['num_samples']} samples, {s['steps']} DDIM steps, guidance {s['guidance']}, {made['machine']}, "
        f"jax {made['jax']}."
    )
