"""`qdit bench`: how long a step of the sampler takes, in full precision and quantized."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from qdit_jax.cli.guidance_option import add_guidance
from qdit_jax.cli.options import (
    AddArgument,
    SubParsers,
    positive_float,
    positive_int,
    refuse_inert,
    seed_number,
    verb_parser,
    whole_number,
)
from qdit_jax.cli.paths import path_option
from qdit_jax.cli.prompts_option import add_embeds
from qdit_jax.cli.search import add_choices
from qdit_jax.errors import UserError

HELP = """\
Measure the time of one step of the sampler (one call of the network, guided on twice the samples) on
this machine: in full precision (float32, bfloat16), and rounded to nearest by each recipe, in every
numerics and by every implementation that applies. A quantized checkpoint is measured as it is.

Every network takes turns with the baseline, A B A B, so that what slows the machine slows both: read
the ratios, with the interval that holds their median in 95 of 100 runs. The baseline's ratio to
itself shows how much of that is chance. There are --repeats rounds, and fewer where a step is so slow
that they would take longer than --seconds, but 6 at least, which an interval needs. The baseline is full precision in the dtype of the platform:
bfloat16 on accelerators, else float32. The output's error is against it at four steps of the sampler,
together. "of peak" is the time of a step's products at the full rates of the device, as a share of the
measured; - where these are not known (CPUs), and for float32 products of simulated numerics. A row that takes more than
1.2 times as long as bfloat16 is marked.

With --table, every choice of a search is timed in each distinct shape of the network's layers, and
written to latency.json for `qdit search --latency`. Choices are described as there: bits, group sizes,
number formats, scales, zero points, transforms, ranks. Groups of 128 and per channel are always
measured, for budgets are relative to them.

With --dry-run nothing is run and no array is read: bytes of the weights in each format, what a step
needs at once beside them, and the time of a step at the full rates of devices by name. With
--model it needs no checkpoint.

Writes to OUT, if it is given: bench.json (everything, saved after each row: after an interruption,
run the same command again to resume) and bench.png.

examples:
  qdit bench xl2
  qdit bench xl2 xl2-speed --recipes w4a8-g128 w4a8-g0 w8a8-g0 --batch 8
  qdit bench xl2-w4a8 --against xl2 --numerics integer
  qdit bench xl2 xl2-times --table --batch 8 --group-sizes 32 64 128
  qdit bench xl2 xl2-times --table --weight-bits 3 4 8 --sides separate --numerics integer
  qdit bench xl2 xl2-times --table --transforms none smooth+hadamard --ranks 0 16 --formats int nf4
  qdit bench xl2 --recipes recipe.json --dry-run       # bytes and times; runs nothing
  qdit bench --model flux-dev --dry-run --batch 1      # of a published network, without its file
"""


def add_parser(subparsers: SubParsers) -> None:
    """Adds the verb with its options."""
    parser = verb_parser(subparsers, "bench", HELP)
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", nargs="?", type=path_option, help="a checkpoint folder")
    add("out", metavar="OUT", nargs="?", type=path_option, help="the folder to write to")
    add(
        "--recipes",
        nargs="+",
        metavar="RECIPE",
        help="w4a8, w4a8-g32 (groups of 32), w8a8-g0 (per channel), ..., or files such as recipe.json "
        "(w8a8-fast w4a8-fast w4a8 w4a16)",
    )
    add(
        "--group-size",
        type=whole_number(0),
        help="of recipes that do not name one (the preset's own: 128, or 32 of w4a8-fast)",
    )
    add(
        "--against",
        metavar="REF",
        type=path_option,
        help="of a quantized CKPT: the full-precision checkpoint that it is compared with",
    )
    add("--table", action="store_true", help="time single layers, and write OUT/latency.json")
    add("--dry-run", action="store_true", help="print predicted bytes and times, run nothing")
    add("--model", metavar="NAME", help="--dry-run of a published network, such as flux-dev")
    add(
        "--device",
        nargs="+",
        metavar="NAME",
        help="of --dry-run: h100, v5e, v5p, v6e (all of them), or cpu: this machine, its rates measured",
    )
    add("--force", action="store_true", help="replace OUT, starting from scratch")
    add_measuring(parser.add_argument_group("how it is measured").add_argument)
    add_choices(parser.add_argument_group("choices of --table").add_argument)
    # Programs from a cache would have no compile time.
    parser.set_defaults(run=run, uses_jax=False, resumes=lambda args: args.out is not None)


def add_measuring(add: AddArgument) -> None:
    add(
        "--batch",
        type=positive_int,
        nargs="+",
        help="samples per step (1 8 32; on CPUs, which 8 keep busy, 1 8)",
    )
    add_guidance(add)
    add(
        "--numerics",
        nargs="+",
        choices=("simulated", "integer"),
        help="arithmetic of quantized layers (both, where they apply)",
    )
    add(
        "--implementation",
        nargs="+",
        metavar="NAME",
        help="who computes quantized layers, such as xla or xla_cpu (each that can; on CPUs the one that "
        "qdit sample takes)",
    )
    add_embeds(add)
    add(
        "--expand",
        action="store_true",
        help="of a quantized CKPT: also with its weights unpacked when they are loaded, see qdit sample",
    )
    add("--repeats", type=whole_number(2), default=21, help="rounds of turns at most (%(default)s)")
    add(
        "--seconds",
        type=positive_float,
        default=2.0,
        help="for which each network, or choice of --table, is timed at most, in 6 rounds or more "
        "(%(default)s)",
    )
    add("--seed", type=seed_number, default=0, help="seed of the noise (%(default)s)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures, prints a table, and writes what was found."""
    from qdit_jax.cli import bench_predicted, bench_run
    from qdit_jax.memory import give_back_freed_memory

    options = vars(args)
    check_options(options)
    if args.dry_run:
        return bench_predicted.dry_run(options)
    give_back_freed_memory()
    return bench_run.tabulated(options) if args.table else bench_run.measured(options)


# Options of the choices with what they are if they are not given.
CHOICES: dict[str, Any] = {
    "weight_bits": None,
    "act_bits": None,
    "group_sizes": None,
    "sides": None,
    "layers": None,
    "transforms": None,
    "ranks": None,
    "formats": None,
    "scale_levels": None,
    "weight_symmetric": None,
    "act_formats": None,
    "act_scales": None,
    "pin": [],
    "exclude": [],
}


def check_options(options: Mapping[str, Any]) -> None:
    """Raises `UserError` for an option that has no effect beside the others."""
    if options["dry_run"]:
        inert = {"out": None, "force": False, "against": None, "table": False, "expand": False}
        refuse_inert(options, inert, "--dry-run writes nothing")
        of_embeds = {"embeds": None, "prompts_from": None}
        refuse_inert(options, of_embeds, "--dry-run runs nothing")
    else:
        of_counting = {"model": None, "device": None}
        refuse_inert(options, of_counting, "only --dry-run counts without running")
    if (options["checkpoint"] is None) == (options["model"] is None):
        raise UserError(
            "give CKPT, or --dry-run --model NAME for a published network; one of them."
        )
    if options["out"] is None:
        refuse_inert(options, {"force": False}, "without OUT nothing is written")
    if not options["table"]:
        refuse_inert(options, CHOICES, "without --table no layer is timed alone")
        return
    if options["out"] is None:
        raise UserError("--table needs OUT, the folder to write latency.json to.")
    inert = {"recipes": None, "group_size": None, "against": None, "implementation": None}
    inert |= {"expand": False}
    refuse_inert(options, inert, "--table times layers, not recipes")
    for name in ("batch", "numerics"):
        if len(options[name] or ()) > 1:
            raise UserError(f"--{name}: --table takes one, not {len(options[name])}.")
