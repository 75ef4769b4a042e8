"""`qdit evaluate`: how good samples are, against a reference."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

HELP = """\
Score ready-made samples, any generator's, against reference images or statistics.

Files are .npz archives as other evaluators share them: arr_0 with uint8 images [N, H, W, C], or
mu and sigma (and mu_s, sigma_s) of a reference, or both.

examples:
  qdit evaluate --samples samples.npz --reference demo
  qdit evaluate --samples a.npz --reference real.npz --features demo --out metrics.json
  qdit evaluate --samples a.npz --reference VIRTUAL_imagenet256_labeled.npz \\
      --features inception inception_ckpt --out metrics.json --pictures compare.png

Make inception_ckpt with `qdit convert pt_inception-2015-12-05-6726825d.pth inception_ckpt`.
Only Inception's features give scores called FID, sFID, Inception Score and KID.
"""


def add_parser(subparsers: Any) -> None:
    """Adds the verb with its options."""
    parser = subparsers.add_parser(
        "evaluate",
        help="score samples against a reference",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--samples", type=Path, required=True, help="images to score, .npz with arr_0")
    add("--reference", required=True, help="reference .npz, or `demo` for the packaged statistics")
    add(
        "--features",
        nargs="+",
        default=["demo"],
        metavar=("demo|inception", "CKPT"),
        help="`demo` (digits, the default), or `inception` and a converted checkpoint",
    )
    add(
        "--preprocessing",
        choices=("published", "port"),
        default="published",
        help="of Inception's input: as the published evaluator, or as its PyTorch port",
    )
    add("--out", type=Path, help="write the scores to this metrics.json")
    add("--pictures", type=Path, help="write samples and reference images side by side, .png")
    add("--batch-size", type=int, default=64, help="images at once (%(default)s)")
    add(
        "--min-samples",
        type=int,
        help="accept this few samples (default: one more than the network has features)",
    )
    add("--split-size", type=int, default=5000, help="of the Inception Score (%(default)s)")
    add("--kernel-samples", type=int, default=10_000, help="of each set for KID (%(default)s)")
    add("--seed", type=int, default=0, help="of subsets (%(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Scores the files, prints a table, and writes what was asked for."""
    from qdit_jax.cli.evaluate_files import evaluate_files  # jax loads only when a verb runs

    evaluate_files(args)
