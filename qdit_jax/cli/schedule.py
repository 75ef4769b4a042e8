"""`qdit schedule`: find the sampling steps that bear fewer bits."""

from __future__ import annotations

import argparse
from typing import Any

from qdit_jax.cli.guidance_option import add_guidance
from qdit_jax.cli.numerics_option import add_dtype
from qdit_jax.cli.options import (
    SubParsers,
    finite_float,
    positive_int,
    seed_number,
    verb_parser,
    whole_number,
)
from qdit_jax.cli.paths import path_option
from qdit_jax.cli.prompts_option import add_embeds, add_size

HELP = """\
Find the bits at every sampling step that give the least error within a budget, of a quantized
checkpoint: those of activations (--act-bits; its weights stay as they are), or those of weights and
activations (--levels). One step at a time is lowered, the schedule with the least sum of these errors is
found exactly, and measured beside neighbors and simple schedules (more bits last, first, ...); the best
measured is kept. Errors are those of final latents against the most bits throughout, from the same
noise.

--levels chooses among kernels that CKPT holds: quantize it with each of their bits at some step first.
All of them are in memory while steps are measured, and those that the schedule uses afterwards too. A
level costs its bit operations per multiply-add, the bits of weights times those of activations: w4a8
costs 32, w8a8 and w4a16 64. Formats of numbers stay: w16 beside nf4 can be chosen, w8 cannot.

Writes to OUT: recipe.json (the checkpoint's, with the schedule), schedule.png (the error of every
step, the schedule, and what was measured), history.json, and steps/ (after an interruption, run the
same command again to resume). --write saves the checkpoint with the schedule as well.

Bits by hand, at steps by number, are `qdit quantize --steps-at`.

examples:
  qdit schedule xl2-w4a4 found --act-bits 4 8 --mean-bits 6
  qdit schedule xl2-w4a4 found --act-bits 4 16 --mean-bits 5 --steps 50 --write xl2-w4a4-scheduled
  qdit quantize xl2 both --recipe w4a8 --steps-at 0=w8      # holds weights of 4 and of 8 bits
  qdit schedule both found --levels w4a8 w4a16 w8a8 --mean-bitops 40
"""


def add_parser(subparsers: SubParsers) -> None:
    """Adds the verb with its options."""
    parser = verb_parser(subparsers, "schedule", HELP)
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", type=path_option, help="a quantized checkpoint folder")
    add("out", metavar="OUT", type=path_option, help="the folder to write to")
    add_levels(parser)
    add("--write", metavar="CKPT2", type=path_option, help="write the scheduled checkpoint there")
    add("--steps", type=positive_int, default=20, help="sampling steps (%(default)s)")
    add_guidance(add)
    add_dtype(add)
    add(
        "--num-batches",
        type=positive_int,
        default=1,
        help="batches of samples to measure on (%(default)s)",
    )
    add("--batch-size", type=positive_int, default=16, help="samples per batch (%(default)s)")
    add("--seed", type=seed_number, default=0, help="seed of the samples (%(default)s)")
    add("--force", action="store_true", help="replace OUT (and CKPT2), starting from scratch")
    add_embeds(add)
    add_size(add)
    parser.set_defaults(run=run, resumes=lambda args: True)


def add_levels(parser: argparse.ArgumentParser) -> None:
    """Adds what is chosen from, and the budget."""
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add(
        "--act-bits",
        type=whole_number(2, 16),
        nargs="+",
        help="the bits of activations to choose from, two or more; 16 is no quantizer",
    )
    add(
        "--levels",
        type=level,
        nargs="+",
        metavar="LEVEL",
        help="the bits of weights and activations to choose from, two or more, such as w4a8 w4a16 "
        "w8a8; w8 or a16 keeps the checkpoint's own bits of the other side, own those of both, and "
        "16 is no quantizer",
    )
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add(
        "--mean-bits",
        type=finite_float,
        help="with --act-bits, at most so many bits of activations, on average over the steps",
    )
    add(
        "--mean-bitops",
        type=finite_float,
        help="with --levels, at most so many bit operations per multiply-add (bits of weights times "
        "bits of activations), on average over the steps",
    )


def level(text: str) -> tuple[int | None, int | None]:
    """Returns the bits of weights and activations that `text` names, or raises argparse's error."""
    from qdit_jax.allocation import level_named

    try:
        return level_named(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures, prints progress, and writes the schedule."""
    from qdit_jax.cli.schedule_run import found_schedule, summary, write_result
    from qdit_jax.errors import UserError
    from qdit_jax.files import check_free, renewed_folder

    if (args.levels is None) != (args.mean_bitops is None):
        raise UserError("--mean-bits is the budget of --act-bits, --mean-bitops that of --levels.")
    inputs = [args.checkpoint, args.embeds]
    if (args.out / "recipe.json").exists() and not args.force:
        raise UserError(f"{args.out} holds a finished schedule; pass --force to replace it.")
    check_free(args.out, True, "schedule", inputs)
    if args.write is not None:
        check_free(args.write, args.force, "checkpoint", [*inputs, args.out])
    with renewed_folder(args.out, args.force, "schedule", inputs) as folder:
        chosen, checkpoint = found_schedule(
            args.checkpoint,
            folder,
            mean_bits=args.mean_bits,
            act_bits=args.act_bits,
            levels=args.levels,
            mean_bitops=args.mean_bitops,
            num_steps=args.steps,
            guidance=args.guidance,
            dtype=args.dtype,
            num_batches=args.num_batches,
            batch_size=args.batch_size,
            seed=args.seed,
            options=vars(args),
        )
        write_result(folder, chosen, checkpoint)
    print(summary(chosen, checkpoint))
    if args.write is not None:
        from qdit_jax.checkpoint import save

        save(args.write, checkpoint, overwrite=args.force)
        print(f"wrote {args.write}")
    print(f"wrote {args.out}: next, qdit quantize CKPT DIR --recipe {args.out / 'recipe.json'}")
    history = chosen.to_json()
    return {"out": args.out, **{name: history[name] for name in SHOWN}}


SHOWN = ("over_time", "predicted", "measured", "mean_bits", "mean_bitops")
