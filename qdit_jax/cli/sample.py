"""`qdit sample`: pictures from a checkpoint, full precision or quantised."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from qdit_jax.cli.numerics_option import add_numerics
from qdit_jax.cli.options import (
    finite_float,
    guidance_channels,
    positive_float,
    positive_int,
    seed_number,
    verb_parser,
)
from qdit_jax.cli.paths import path_option
from qdit_jax.diffusion import SAMPLERS

EXAMPLE = """example:
  qdit sample ckpt_dir --labels 207,360 --steps 50 --guidance 1.5 --seed 0 --out grid.png
  qdit sample ckpt_dir --num-samples 10000 --sampler ddpm --steps 250 --out samples.npz
"""


def add_parser(subparsers: Any) -> None:
    """Adds the verb with its options."""
    parser = verb_parser(
        subparsers,
        "sample",
        "Makes pictures with a checkpoint, full precision or quantised alike. A run that was stopped "
        "goes on: finished batches wait in a folder .NAME.unfinished beside OUT.",
        epilog=EXAMPLE,
    )
    add = parser.add_argument
    add("checkpoint", type=path_option, help="folder written by convert or quantize")
    add("--out", type=path_option, default="grid.png", help="grid.png or samples.npz (%(default)s)")
    add(
        "--labels", help="classes such as 207,360 or 0-9, repeated as needed (default: all in turn)"
    )
    add(
        "--num-samples",
        type=positive_int,
        help="how many (default: one for each of --labels, else 8)",
    )
    add_process(add)
    add(
        "--seed",
        type=seed_number,
        default=0,
        help="sample i depends on seed, i and label only (%(default)s)",
    )
    add(
        "--batch-size",
        type=positive_int,
        help="samples at once, over all devices (default: 16 a device, 4 on CPU)",
    )
    add_numerics(
        add,
        "simulated",
        "of quantised layers: float arithmetic on the quantised grid, or dots of the stored "
        "integers or elements, scaled afterwards; quantised inputs needed (%(default)s)",
    )
    add(
        "--vae", type=path_option, help="checkpoint of the autoencoder, where CHECKPOINT holds none"
    )
    add("--columns", type=positive_int, help="pictures in a row of the grid")
    add("--force", action="store_true", help="replace OUT if it exists")
    parser.set_defaults(run=run, resumes=lambda args: True)


def add_process(add: Callable) -> None:
    """Adds the options of the sampling process: walk, steps and guidance."""
    add(
        "--sampler",
        choices=tuple(SAMPLERS),
        help="default: that of the checkpoint's scheduler, else flow for velocity models, ddim for "
        "others",
    )
    add(
        "--steps",
        default="50",
        help="number, spaced as the checkpoint's scheduler says if it has one, or a published "
        "spacing: ddim25, 10,15,20 (%(default)s)",
    )
    add(
        "--eta",
        type=finite_float,
        default=0.0,
        help="noise of ddim: 0 none, 1 as ddpm (%(default)s)",
    )
    add("--guidance", type=finite_float, default=1.5, help="1 turns it off (%(default)s)")
    add(
        "--guidance-channels",
        type=guidance_channels,
        default="published",
        metavar="N|all",
        help="guided channels: published (3 of DiT's 4), all as diffusers does (%(default)s)",
    )
    add(
        "--clip", type=positive_float, help="clip the predicted data to [-CLIP, CLIP] at every step"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Samples, decodes and writes; raises `UserError` on options that do not fit."""
    from qdit_jax.cli.sample_run import run_sample  # jax loads only when a verb runs

    return run_sample(args)
