"""`qdit search`: find the group size (bits, formats, scales, transform, rank) of every layer."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from qdit_jax.cli.guidance_option import add_guidance
from qdit_jax.cli.numerics_option import add_dtype
from qdit_jax.cli.options import (
    AddArgument,
    SubParsers,
    pattern,
    positive_int,
    refuse_inert,
    seed_number,
    verb_parser,
    whole_number,
)
from qdit_jax.cli.paths import path_option
from qdit_jax.cli.processes_option import add_processes, share_text
from qdit_jax.cli.prompts_option import add_embeds, add_size
from qdit_jax.errors import UserError

DEMO = ["demo"]
BITS = whole_number(2, 16)
HELP = """\
Find the group size (and bits, number formats of weights and activations, levels of scales, zero points,
scales of activations, input transform and rank of a branch, if several are offered) of every layer that
give the least error within a budget. Needs a full-precision checkpoint.

Writes to OUT: recipe.json (for `qdit quantize --recipe`), front.png (cost against error, uniform
sizes marked), map.png (layers by choices), history.json, and state/ (intermediate results: after an
interruption, run the same command again to resume).

A budget is the most that the model may cost: NAME=NUMBER, or NAME=1.0x-g128 for as much as group
size 128 in every layer. NAME is bitops (bit operations per sample), bytes (of the packed weights),
gpu, tpu or cpu (estimated time), or latency (milliseconds measured on this machine by `qdit bench
--table`, with --latency). mean-group=128 is the rule of Q-DiT's published code: a mean
group size of 128 or more.

examples:
  qdit search xl2 xl2-search --budget bitops=1.0x-g128
  qdit search xl2 out --budget bytes=351.3M --weight-bits 3 4 --group-sizes 32 64 128
  qdit search xl2 out --latency latency.json --budget latency=1.0x-g128
  qdit search xl2 out --latency latency.json --minimize latency --within 0.5dB-of-g128
  qdit search xl2 out --minimize bytes --within 0dB-of-w4a8-g128 --weight-bits 4 3
  qdit search xl2 out --latency latency.json --budget latency=1.0x-w4a8-g0 --group-sizes 32 128 0 \
      --scale-levels 1 2 --act-scales group token
  qdit search xl2 out --weight-bits 8 --group-sizes 0 --weight-symmetric yes --act-scales token \
      --formats int fp8_e4m3 --act-formats int fp8_e4m3
  qdit search xl2 out --method qdit-paper --objective frechet --reference demo
  qdit search xl2 out --exclude 'blocks_0/.*' --pin '.*/fc2=64'
  qdit quantize xl2 xl2-small --recipe xl2-search/recipe.json
  qdit search xl2 out --transforms none smooth smooth+hadamard --ranks 0 16 --formats int nf4
  qdit quantize xl2 xl2-small --recipe out/recipe.json --method best
  qdit search xl2 out --coordinator 10.0.0.1:9876 --num-processes 2 --process-id 0
"""


def add_parser(subparsers: SubParsers) -> None:
    """Adds the verb with its options."""
    parser = verb_parser(subparsers, "search", HELP)
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", type=path_option, help="a full-precision checkpoint folder")
    add("out", metavar="OUT", type=path_option, help="the folder to write to")
    add("--budget", help="the most it may cost, such as bytes=351.3M (bitops=1.0x-g128)")
    add("--minimize", metavar="NAME", help="the cost to minimize, such as latency, bytes or bitops")
    add(
        "--within",
        help="with --minimize: the error allowed, in dB of a uniform size (0.5dB-of-g128)",
    )
    add("--latency", type=path_option, metavar="FILE", help="times from `qdit bench --table`")
    add(
        "--objective",
        choices=("paired", "predicted", "frechet"),
        default="paired",
        help="the error: of final latents against full precision from the same noise (paired), as "
        "predicted without measuring (predicted), or the Fréchet distance of features from "
        "--reference (frechet) (%(default)s)",
    )
    add(
        "--method",
        default="default",
        help="default (sensitivities and an exact knapsack, verified), nsga2, qdit-paper (the "
        "published evolution), qdit-release (the published code's), random, or cheapest, which "
        "--minimize takes (%(default)s)",
    )
    add("--seed", type=seed_number, default=0, help="seed of everything random (%(default)s)")
    add("--force", action="store_true", help="replace OUT, starting from scratch")
    choices = parser.add_argument_group("what may be chosen")
    add_choices(choices.add_argument)
    choices.add_argument(
        "--items",
        type=path_option,
        help="inputs from `qdit calibrate --collect spread` that transforms and branches are fitted "
        "to; sampled now if absent",
    )
    add_measuring(parser.add_argument_group("how assignments are measured").add_argument)
    add_processes(parser)
    parser.set_defaults(run=run, check=check_options, resumes=lambda args: True)


def add_choices(add: AddArgument) -> None:
    """Adds the options that describe the space of the search."""
    add_sizes(add)
    add_beside(add)


def add_sizes(add: AddArgument) -> None:
    """Adds the options of bits and group sizes, and of the layers."""
    add("--weight-bits", type=BITS, nargs="+", help="bits of weights; several are searched too (4)")
    add(
        "--act-bits",
        type=BITS,
        nargs="+",
        help="bits of activations; 16 leaves them in full precision (8)",
    )
    add(
        "--group-sizes",
        type=whole_number(0),
        nargs="+",
        help="group sizes to choose from; 0 is the whole channel (32 64 128 192 288)",
    )
    add(
        "--sides",
        choices=("both", "weights", "separate"),
        help="which group sizes vary: one that weights and inputs share (both, the default), that of "
        "the weights (weights), or one of each (separate)",
    )
    add(
        "--layers",
        type=pattern,
        metavar="REGEX",
        help="regular expression of the layers to search (default: linear layers of all blocks)",
    )
    add(
        "--pin",
        type=pin,
        action="append",
        default=[],
        metavar="REGEX=SIZE",
        help="fix the group size of layers",
    )
    add(
        "--exclude",
        type=pattern,
        action="append",
        default=[],
        metavar="REGEX",
        help="leave layers in full precision",
    )


def add_beside(add: AddArgument) -> None:
    """Adds the options of number formats, scales, transforms and branches among the choices."""
    add(
        "--transforms",
        nargs="+",
        metavar="NAME",
        help="input transforms to choose from: none, or smooth, shift, hadamard and pca joined by +, "
        "such as smooth+hadamard; hadamard64 has blocks of 64 channels (left to the method)",
    )
    add(
        "--ranks",
        type=whole_number(0),
        nargs="+",
        help="ranks of a 16-bit branch beside the kernel to choose from; 0 is none (left to the "
        "method)",
    )
    add(
        "--formats",
        nargs="+",
        metavar="NAME",
        help="number formats of the weights to choose from: int, nf4, nvfp4, mxfp4, ... (int)",
    )
    add(
        "--scale-levels",
        type=positive_int,
        choices=(1, 2),
        nargs="+",
        help="levels of the weights' scales to choose from; 2 is a scale per channel and a whole number "
        "per group, multiplied in one int8 dot as in w4a8-fast (1)",
    )
    add(
        "--weight-symmetric",
        type=yes_or_no,
        nargs="+",
        metavar="{no,yes}",
        help="whether integer weights have no zero points: no, yes, or both to choose from (no)",
    )
    add(
        "--act-formats",
        nargs="+",
        metavar="NAME",
        help="number formats of activations to choose from: int, fp8_e4m3, fp8_e5m2, ...; int goes with "
        "all weights, FP8 with FP8 weights, which --formats offers (int)",
    )
    add(
        "--act-scales",
        choices=("group", "token"),
        nargs="+",
        help="scales of activations to choose from: of groups, with zero points (group), or one "
        "symmetric scale per token (token) (group)",
    )


def add_measuring(add: AddArgument) -> None:
    """Adds the options of samples, generations and features."""
    add(
        "--steps",
        type=positive_int,
        default=20,
        help="sampling steps when an assignment is measured (%(default)s)",
    )
    add_guidance(add)
    add(
        "--num-batches",
        type=positive_int,
        default=16,
        help="batches of samples to measure on (%(default)s)",
    )
    add("--batch-size", type=positive_int, default=16, help="samples per batch (%(default)s)")
    add(
        "--population",
        type=positive_int,
        default=50,
        help="assignments in the first generation of an evolution (%(default)s)",
    )
    add(
        "--generations",
        type=whole_number(0),
        default=10,
        help="generations of an evolution (%(default)s)",
    )
    add(
        "--reference",
        help="for --objective frechet: an .npz with statistics or images, a folder of clips, or `demo`",
    )
    add(
        "--features",
        nargs="+",
        default=DEMO,
        help="for --objective frechet: `demo`, or `inception CKPT`, or for videos `i3d CKPT`: FVD (demo)",
    )
    add_embeds(add)
    add_size(add)
    add_dtype(add)
    add(
        "--per-device",
        type=positive_int,
        default=1,
        help="assignments measured per device in one call (%(default)s)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Searches, prints progress, and writes the results; only the first process writes."""
    options = vars(args)
    check_options(options)
    from qdit_jax.cli import search_run
    from qdit_jax.evaluation import scoring_inputs
    from qdit_jax.processes import ALONE, check_shared, shared_folder

    processes = args.processes or ALONE
    scoring = scoring_inputs(args.reference, args.features)
    inputs = [args.checkpoint, args.latency, args.items, args.embeds, *scoring]
    search_run.check_folder(args.out, args.force, inputs)
    job = search_run.Job.of(options)
    with shared_folder(args.out, args.force, "search", inputs, processes=processes) as folder:
        check_shared(folder, processes)
        result = job.result(folder, is_first=processes.is_first)
        if processes.is_first:
            search_run.write_result(folder, result)
    if (text := share_text(processes, args.out)) is not None:
        print(text)
        return search_run.outcome(args.out, result)
    print(search_run.summary(result))
    print(search_run.closing(result, args.checkpoint, args.out, args.items))
    return search_run.outcome(args.out, result)


def pin(text: str) -> tuple[str, int]:
    """Returns the pattern and the size of `PATTERN=SIZE`."""
    regex, _, size = text.rpartition("=")
    if not regex or not size.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} cannot be read; write PATTERN=SIZE")
    return pattern(regex), whole_number(0)(size)


def yes_or_no(text: str) -> bool:
    """Returns what `yes` or `no` says."""
    if text not in ("no", "yes"):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be read; write no or yes")
    return text == "yes"


def check_options(options: Mapping[str, Any]) -> None:
    """Raises `UserError` for an option that has no effect beside the others."""
    if options["method"] in ("default", "cheapest"):
        refuse_inert(
            options,
            {"population": 50, "generations": 10},
            f"--method {options['method']} is not an evolution",
        )
    check_minimizing(options)
    if options["objective"] != "frechet":
        refuse_inert(
            options,
            {"reference": None, "features": DEMO},
            f"--objective {options['objective']} compares no features",
        )
    if not options["transforms"] and not options["ranks"]:
        refuse_inert(options, {"items": None}, "without --transforms and --ranks nothing is fitted")
    if options["objective"] == "predicted":
        refuse_inert(options, {"per_device": 1}, "--objective predicted measures no candidates")
    if options["method"] == "qdit-release":
        refuse_inert(options, {"guidance": None}, "the release searches without guidance")


def check_minimizing(options: Mapping[str, Any]) -> None:
    """Raises `UserError` for a cost, an error or a budget that nothing uses."""
    minimize, method = options["minimize"], options["method"]
    minimizes = minimize is not None or method == "cheapest"
    if minimize is not None and method not in ("default", "cheapest"):
        raise UserError(
            f"--minimize {minimize} does not go with --method {method}, which minimizes the error "
            "within a budget; leave one of both out."
        )
    if minimizes:
        refuse_inert(options, {"budget": None}, "a cost that is minimized has no limit")
        if options["objective"] == "predicted":
            raise UserError("--objective predicted measures no error to stay within; leave it out.")
    else:
        refuse_inert(options, {"within": None}, "it is the error allowed by --minimize")
    name = minimize if minimizes else (options["budget"] or "").partition("=")[0]
    if name == "latency" and options["latency"] is None:
        raise UserError(
            "the cost latency needs --latency FILE, from `qdit bench CKPT OUT --table`."
        )
    if name != "latency":
        reason = "neither --budget nor --minimize names the cost latency"
        refuse_inert(options, {"latency": None}, reason)
