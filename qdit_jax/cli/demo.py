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
Run every stage on a small model inside the package: convert its PyTorch-layout weights, calibrate,
quantize in several ways, sample from the same noise and conditions with each, compare.

Models: digits of a class (DiT), text: digits under a caption (PixArt), video: moving digits (Latte).
Writes checkpoints, pictures.png, metrics.json and report.html (self-contained), of videos clips.gif
too, to the folder --out.
It takes two to six minutes on two cores; a second run is faster, for compiled programs are cached.

examples:
  qdit demo
  qdit demo --model text
  qdit demo --model video --out runs/video
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
        "--model",
        choices=("digits", "text", "video"),
        default="digits",
        help="which packaged model (%(default)s)",
    )
    add(
        "--num-samples",
        type=whole_number(10),
        help="samples per quantization setting, 10 or more: one of each digit (100; 20 of video)",
    )
    add("--steps", type=positive_int, help="sampling steps (50; 20 of text and video)")
    add(
        "--guidance",
        type=finite_float,
        help="guidance scale; 1 turns it off (1.5; 2.5 of video)",
    )
    add("--seed", type=seed_number, default=0, help="seed of the noise (%(default)s)")
    add_numerics(add, "simulated", "arithmetic of quantized layers, see qdit sample (%(default)s)")
    add_dtype(add)
    parser.add_argument(
        "--quick", action="store_true", help="20 samples (10 of video), 10 steps, 4 settings"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs every stage; returns the figures of the comparison."""
    from qdit_jax.checkpoint import default_dtype
    from qdit_jax.cli.progress import Stages
    from qdit_jax.demo import DemoSettings, run_demo

    if args.quick:
        defaults = {"num_samples": None, "steps": None}
        refuse_inert(vars(args), defaults, "--quick takes few samples and 10 steps")
    settings = DemoSettings(
        model=args.model,
        num_samples=args.num_samples,
        num_steps=args.steps,
        guidance=args.guidance,
        seed=args.seed,
        numerics=args.numerics,
        dtype=args.dtype or default_dtype(),
        quick=args.quick,
    )
    with Stages("sample") as stages:
        return run_demo(args.out, settings, progress_fn=stages.tell)
