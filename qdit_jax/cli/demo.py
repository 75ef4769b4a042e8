"""`qdit demo`: the whole road on the model that the package carries."""

from __future__ import annotations

import argparse
from typing import Any

from qdit_jax.cli.paths import path_option

HELP = """\
Run the whole road on the small digit model inside the package: convert its PyTorch-layout weights,
calibrate, quantise in several ways, sample the same noise and labels with each, compare.

Writes checkpoints, pictures.png, metrics.json and report.html (one file, nothing else needed) to
DIR. Takes a few minutes on 2 cores; the second run is faster, compiled programs are kept.

examples:
  qdit demo
  qdit demo --out runs/demo --num-samples 200
  qdit demo --quick          # a minute: few samples and steps
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="the whole road on the packaged model",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=path_option, default="qdit-demo", help="folder (%(default)s)")
    parser.add_argument("--num-samples", type=int, default=100, help="a setting (%(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps (%(default)s)")
    parser.add_argument("--guidance", type=float, default=1.5, help="%(default)s")
    parser.add_argument("--seed", type=int, default=0, help="%(default)s")
    parser.add_argument("--execution", choices=("simulated", "integer"), default="simulated")
    parser.add_argument("--quick", action="store_true", help="20 samples, 10 steps, 4 settings")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from qdit_jax.demo import DemoSettings, run_demo

    if args.num_samples < 10:
        raise ValueError(f"--num-samples {args.num_samples}: use 10 or more, one of each digit.")
    settings = DemoSettings(
        num_samples=20 if args.quick else args.num_samples,
        num_steps=10 if args.quick else args.steps,
        guidance=args.guidance,
        seed=args.seed,
        execution=args.execution,
        quick=args.quick,
    )
    run_demo(args.out, settings)
