"""`qdit calibrate`: statistics of the layers' inputs over timesteps."""

from __future__ import annotations

import argparse
from typing import Any

from qdit_jax.cli.paths import path_option

HELP = """\
Record the range of every linear layer's input and of the attention operands, by channel, at every
timestep of sampling, for labels and for the null class apart. Static activation scales are made from
it. A run that was stopped goes on from OUT with the ending .unfinished.npz, which is removed at the
end.

examples:
  qdit calibrate xl2 stats.npz --num-samples 64 --steps 50
  qdit calibrate xl2 stats.npz --hessians 'blocks_0/.*' --tokens 8
  qdit calibrate xl2 items.npz --collect spread --num-samples 64    # for qdit quantize --items

--collect writes single inputs of the network in place of statistics: 4 steps of every trajectory,
with its label and with the null class (spread), or one step of each and no null class, as the Q-DiT
release draws them (authors).
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "calibrate",
        help="record activation statistics",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint", metavar="CKPT", type=path_option, help="a full-precision checkpoint"
    )
    parser.add_argument("out", metavar="OUT", type=path_option, help="the .npz file to write")
    parser.add_argument("--num-samples", type=int, default=256, help="trajectories (default 256)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50, help="steps a trajectory (default 50)")
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--hessians", metavar="REGEX", help="layers whose mean of x xT to keep, K x K each"
    )
    parser.add_argument(
        "--tokens", type=int, default=0, help="inputs of each layer to keep a call (default 0)"
    )
    parser.add_argument(
        "--collect", choices=("spread", "authors"), help="write single inputs, not statistics"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    import jax
    from tqdm import tqdm

    import qdit_jax as qdit
    from qdit_jax.calibration import default_sampler
    from qdit_jax.files import check_free

    if args.out.suffix != ".npz":
        raise qdit.UserError(f"OUT={args.out} must end in .npz.")
    kind = "inputs" if args.collect else "statistics"
    check_free(args.out, args.force, kind, [args.checkpoint])
    checkpoint = qdit.load(args.checkpoint)
    if args.collect:
        collect(args, checkpoint)
        return
    unfinished = args.out.with_suffix(".unfinished.npz")
    with tqdm(total=args.num_samples, unit="sample", disable=None) as bar:
        stats = qdit.calibrate(
            checkpoint,
            jax.random.key(args.seed),
            args.num_samples,
            sampler=default_sampler(checkpoint, args.steps),
            guidance=args.guidance,
            batch_size=args.batch_size,
            hessians=args.hessians,
            num_tokens=args.tokens,
            unfinished=unfinished,
            progress_fn=bar.update,
        )
    stats.save(args.out)
    # A killed run also leaves what it was writing at that moment.
    for left in (unfinished, *args.out.parent.glob(f".{unfinished.name}.*")):
        left.unlink(missing_ok=True)
    print(f"wrote {args.out}: {len(stats.low)} layers at {len(stats.timesteps)} timesteps")


def collect(args: argparse.Namespace, checkpoint: Any) -> None:
    """Writes single inputs of the network."""
    from tqdm import tqdm

    import qdit_jax as qdit
    from qdit_jax.cli.quantize_rounding import collected

    if args.hessians or args.tokens:
        raise qdit.UserError("--hessians and --tokens belong to statistics; leave out --collect.")
    with tqdm(total=args.num_samples, unit="sample", disable=None) as bar:
        items = collected(args, checkpoint, args.collect == "authors", bar.update)
    items.save(args.out)
    print(f"wrote {args.out}: {len(items.sample)} inputs of {args.num_samples} trajectories")
