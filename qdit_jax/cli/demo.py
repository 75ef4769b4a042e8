"""`qdit demo`: every stage, from conversion to evaluation, on the packaged model."""

from __future__ import annotations

import argparse
from typing import Any

from qdit_jax.cli.numerics_option import add_dtype, add_numerics
from qdit_jax.cli.options import (
    SubParsers,
    finite_float,
    positive_int,
    refuse_inert,
    seed_number,
    verb_parser,
    whole_number,
)
from qdit_jax.cli.paths import path_option

HELP = """\
Run every stage on the small digit model inside the package: convert its PyTorch-layout weights,
calibrate, quantize in several ways, sample from the same noise and labels with each, compare.

Writes checkpoints, pictures.png, metrics.json and report.html (self-contained) to the folder --out.
Takes less than three minutes on 2 free cores; a second run is faster, for compiled programs are cached.

examples:
  qdit demo
  qdit demo --out runs/demo --num-samples 200
  qdit demo --quick          # half a minute: few samples and steps
"""


def add_parser(subparsers: SubParsers) -> None:
    """Adds the verb with its options."""
    parser = verb_parser(subparsers, "demo", HELP)
    parser.add_argument(
        "--out", type=path_option, default="qdit-demo", help="folder to write (%(default)s)"
    )
    add = parser.add_argument
    add(
        "--num-samples",
        type=whole_number(10),
        default=100,
        help="samples per quantization setting, 10 or more: one of each digit (%(default)s)",
    )
    add("--steps", type=positive_int, default=50, help="DDIM steps (%(default)s)")
    add(
        "--guidance",
        type=finite_float,
        default=1.5,
        help="guidance scale; 1 turns it off (%(default)s)",
    )
    add("--seed", type=seed_number, default=0, help="seed of the noise (%(default)s)")
    add_numerics(add, "simulated", "arithmetic of quantized layers, see qdit sample (%(default)s)")
    add_dtype(add)
    parser.add_argument("--quick", action="store_true", help="20 samples, 10 steps, 4 settings")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs every stage; returns the figures of the comparison."""
    from qdit_jax.checkpoint import default_dtype
    from qdit_jax.cli.progress import Stages
    from qdit_jax.demo import DemoSettings, run_demo

    if args.quick:
        defaults = {"num_samples": 100, "steps": 50}
        refuse_inert(vars(args), defaults, "--quick takes 20 samples and 10 steps")
    settings = DemoSettings(
        num_samples=20 if args.quick else args.num_samples,
        num_steps=10 if args.quick else args.steps,
        guidance=args.guidance,
        seed=args.seed,
        numerics=args.numerics,
        dtype=args.dtype or default_dtype(),
        quick=args.quick,
    )
    with Stages("sample") as stages:
        return run_demo(args.out, settings, progress_fn=stages.tell)
