"""`qdit search`: find the group size (and bits) of every layer."""

from __future__ import annotations

import argparse
from typing import Any

from qdit_jax.cli.paths import path_option

HELP = """\
Search which group size every layer should have, within a budget.

Writes to OUT: recipe.json (for `qdit quantize --recipe`), front.png (cost against error, uniform
sizes marked), map.png (layers by choices), history.json, and state/ (what was computed: run the
same command again after an interruption and it goes on).

Budgets: NAME=1.0x-g128 (as much as group size 128 throughout) or NAME=NUMBER, of bitops, bytes,
gpu, tpu or cpu; mean-group=128 is the rule of Q-DiT's release.

examples:
  qdit search xl2 xl2-search --budget bitops=1.0x-g128
  qdit search xl2 out --budget bytes=351.3M --weight-bits 3 4 --group-sizes 32 64 128
  qdit search xl2 out --method qdit-paper --objective frechet --reference demo
  qdit search xl2 out --exclude 'blocks_0/.*' --pin '.*/fc2=64'
  qdit quantize xl2 xl2-small --recipe xl2-search/recipe.json

several processes (each with its own number; all hosts of a TPU slice: --distributed alone):
  qdit search xl2 out --coordinator 10.0.0.1:9876 --num-processes 2 --process-id 0
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "search",
        help="find the group size of every layer",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", type=path_option, help="a full-precision checkpoint folder")
    add("out", metavar="OUT", type=path_option, help="the folder to write")
    add("--budget", help="such as bitops=1.0x-g128 (the default) or bytes=351.3M")
    add("--objective", choices=("paired", "predicted", "frechet"), default="paired")
    add("--method", default="default", help="default, nsga2, qdit-paper, qdit-release or random")
    add("--weight-bits", type=int, nargs="+", help="default 4; several are a second axis")
    add("--act-bits", type=int, nargs="+", help="default 8; 16 leaves the inputs as they are")
    add("--group-sizes", type=int, nargs="+", help="default 32 64 128 192 288; 0 is the channel")
    add("--sides", choices=("both", "weights", "separate"), help="what varies (default both)")
    add("--layers", help="regular expression of the layers (default: the blocks' four linears)")
    add("--pin", action="append", default=[], metavar="PATTERN=SIZE", help="keep a size")
    add("--exclude", action="append", default=[], metavar="PATTERN", help="leave layers alone")
    add("--seed", type=int, default=0, help="%(default)s")
    add("--steps", type=int, default=20, help="of the rollouts (%(default)s)")
    add("--guidance", type=float, default=1.5, help="%(default)s")
    add("--num-batches", type=int, default=16, help="of samples (%(default)s)")
    add("--batch-size", type=int, default=16, help="samples of a batch (%(default)s)")
    add("--population", type=int, default=50, help="of an evolution (%(default)s)")
    add("--generations", type=int, default=10, help="of an evolution (%(default)s)")
    add("--reference", help="of --objective frechet: statistics .npz, or `demo`")
    add("--features", nargs="+", default=["demo"], help="`demo`, or `inception CKPT`")
    add("--per-device", type=int, default=1, help="candidates a device and call (%(default)s)")
    add("--coordinator", metavar="HOST:PORT", help="of a search by several processes")
    add("--num-processes", type=int, help="all of them")
    add("--process-id", type=int, help="the number of this one, from 0")
    add("--distributed", action="store_true", help="let the cluster tell what the others are")
    add("--force", action="store_true", help="replace OUT and begin again")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Searches, prints progress, and writes the results."""
    from qdit_jax.cli.search_run import run_search  # jax loads only when a verb runs

    run_search(args)
