"""`qdit calibrate`: statistics of the layers' inputs over timesteps."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING, Any

from qdit_jax.cli.guidance_option import add_guidance, guidance_of
from qdit_jax.cli.numerics_option import add_dtype
from qdit_jax.cli.options import (
    SubParsers,
    count,
    pattern,
    positive_int,
    present_source,
    seed_number,
    verb_parser,
)
from qdit_jax.cli.paths import path_option
from qdit_jax.cli.processes_option import add_processes, share_text
from qdit_jax.cli.prompts_option import Inputs, add_embeds, add_size
from qdit_jax.files import AnyPath, remove_folder

if TYPE_CHECKING:  # help is printed without them
    from qdit_jax.checkpoint import Checkpoint
    from qdit_jax.methods import CalibrationData
    from qdit_jax.processes import Processes

HELP = """\
Record the range of every linear layer's input and of the attention operands, per channel, at every
timestep of sampling, separately for labels and for the null class. Needs a full-precision
checkpoint. Writes OUT, an .npz of statistics for `qdit quantize --stats`, from which static
activation scales are computed. A run that was stopped resumes from OUT's .unfinished.npz (several
processes, and --collect, from the folder .unfinished.parts), which is removed at the end.

examples:
  qdit calibrate xl2 stats.npz --num-samples 64 --steps 50
  qdit calibrate xl2 stats.npz --hessians 'blocks_0/.*' --tokens 8
  qdit calibrate xl2 items.npz --collect spread --num-samples 64    # for qdit quantize --items
  qdit calibrate xl2 stats.npz --distributed                        # on every host
  qdit calibrate pixart stats.npz --embeds prompts.npz --size 512x512

--collect writes inputs of the network instead of statistics, for methods that calibrate on them
(GPTQ, AdaRound). `spread` takes 4 steps of every trajectory, with its label and with the null
class; `qdit-release` takes one step of each, without the null class, as Q-DiT's published code does.
"""


def add_parser(subparsers: SubParsers) -> None:
    """Adds the verb with its options."""
    parser = verb_parser(subparsers, "calibrate", HELP)
    parser.add_argument(
        "checkpoint", metavar="CKPT", type=path_option, help="a full-precision checkpoint"
    )
    parser.add_argument("out", metavar="OUT", type=path_option, help="the .npz file to write")
    add = parser.add_argument
    add(
        "--num-samples", type=positive_int, default=256, help="number of trajectories (%(default)s)"
    )
    add_embeds(add)
    add_size(add)
    add("--batch-size", type=positive_int, default=16, help="trajectories at once (%(default)s)")
    add("--steps", type=positive_int, default=50, help="steps per trajectory (%(default)s)")
    add_guidance(add)
    add("--seed", type=seed_number, default=0, help="seed of the noise (%(default)s)")
    add(
        "--hessians",
        type=pattern,
        metavar="REGEX",
        help="also store the mean of x x^T, [K, K], of the layers that match",
    )
    add(
        "--tokens",
        type=count,
        default=0,
        help="also store so many input rows per layer and network call (%(default)s)",
    )
    parser.add_argument(
        "--collect",
        choices=("spread", "qdit-release"),
        type=present_source,
        help="write inputs of the network, not statistics",
    )
    add_dtype(parser.add_argument)
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    add_processes(parser)
    parser.set_defaults(run=run, resumes=lambda args: True)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Writes statistics, or inputs of the network; returns what was written."""
    import qdit_jax as qdit
    from qdit_jax.cli.checkpoints import full_precision_checkpoint
    from qdit_jax.files import check_free
    from qdit_jax.processes import ALONE

    if args.out.suffix != ".npz":
        raise qdit.UserError(f"OUT {args.out} must end in .npz.")
    if args.collect and (args.hessians or args.tokens):
        raise qdit.UserError(
            "--hessians and --tokens are options of statistics; leave out --collect."
        )
    kind = "inputs" if args.collect else "statistics"
    check_free(args.out, args.force, kind, [args.checkpoint, args.embeds])
    checkpoint = full_precision_checkpoint(
        args.checkpoint, "statistics are of full-precision inputs", args.dtype
    )
    settings = qdit.CalibrationData(
        seed=args.seed,
        num_samples=args.num_samples,
        num_steps=args.steps,
        guidance=guidance_of(checkpoint, args.guidance),
        batch_size=args.batch_size,
        **Inputs.of(vars(args), checkpoint, args.checkpoint).settings,
    )
    processes = args.processes or ALONE
    if args.collect:
        return write_items(args.out, checkpoint, settings, args.collect, processes)
    return write_stats(args.out, checkpoint, settings, args.hessians, args.tokens, processes)


def write_stats(
    out: AnyPath,
    checkpoint: Checkpoint,
    settings: CalibrationData,
    hessians: str | None,
    num_tokens: int,
    processes: Processes,
) -> dict[str, Any]:
    """Writes statistics of the layers' inputs to `out`, resuming a run that was stopped."""
    import jax

    import qdit_jax as qdit
    from qdit_jax.calibration import default_sampler, parts_folder
    from qdit_jax.cli.progress import Bar

    unfinished = out.with_suffix(".unfinished.npz")
    resumes = resuming(processes, unfinished, parts_folder(unfinished))
    with Bar(settings.num_samples, "sample", "calibrating", resumes) as bar:
        stats = qdit.calibrate(
            checkpoint,
            jax.random.key(settings.seed),
            settings.num_samples,
            sampler=default_sampler(checkpoint, settings.num_steps, settings.shape),
            guidance=settings.guidance,
            batch_size=settings.batch_size,
            conditions=settings.conditions,
            shape=settings.shape,
            hessians=hessians,
            num_tokens=num_tokens,
            unfinished=unfinished,
            progress_fn=bar.tell,
            processes=processes,
        )
    processes.meet("all have read the batches")
    if processes.is_first:
        stats.save(out)
        remove_folder(parts_folder(unfinished))
        # A killed run also leaves what it was writing at that moment.
        for left in (unfinished, *out.parent.glob(f".{unfinished.name}.*")):
            left.unlink(missing_ok=True)
    wrote = f"wrote {out}: {len(stats.low)} layers at {len(stats.timesteps)} timesteps"
    print(share_text(processes, out) or wrote)
    return {
        "out": out,
        "layers": len(stats.low),
        "timesteps": len(stats.timesteps),
        "num_samples": settings.num_samples,
    }


def write_items(
    out: AnyPath,
    checkpoint: Checkpoint,
    settings: CalibrationData,
    choice: str,
    processes: Processes,
) -> dict[str, Any]:
    """Writes inputs of the network to `out`, chosen as `--collect` says, resuming a stopped run."""
    from qdit_jax.cli.progress import Bar
    from qdit_jax.methods import qdit_release_items, spread_items

    count, unfinished = settings.num_samples, out.with_suffix(".unfinished.parts")
    collect_fn = qdit_release_items if choice == "qdit-release" else spread_items
    with Bar(count, "sample", "collecting", resuming(processes, unfinished)) as bar:
        items = collect_fn(
            checkpoint, settings, bar.tell, unfinished=unfinished, processes=processes
        )
    processes.meet("all have read the batches")
    if processes.is_first:
        items.save(out)
        remove_folder(unfinished)
    wrote = f"wrote {out}: {len(items.sample)} inputs of {count} trajectories"
    print(share_text(processes, out) or wrote)
    return {"out": out, "inputs": len(items.sample), "num_samples": count}


def resuming(processes: Processes, *unfinished: AnyPath) -> bool:
    """Returns whether an earlier run has left something, and says so in the first process."""
    found = [path for path in unfinished if path.exists()]
    if found and processes.is_first:
        logging.getLogger("qdit_jax").info("resuming from %s", found[0])
    return bool(found)
