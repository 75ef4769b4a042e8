"""`qdit sample`: pictures from a checkpoint, full precision or quantised."""

from __future__ import annotations

import argparse
from typing import Any

from qdit_jax.cli.paths import path_option

EXAMPLE = """example:
  qdit sample ckpt_dir --labels 207,360 --steps 50 --guidance 1.5 --seed 0 --out grid.png
  qdit sample ckpt_dir --num-samples 10000 --sampler ddpm --steps 250 --out samples.npz
"""
SAMPLERS = ("ddim", "ddpm", "flow")


def add_parser(subparsers: Any) -> None:
    """Adds the verb with its options."""
    parser = subparsers.add_parser(
        "sample",
        help="make pictures",
        description="Makes pictures with a checkpoint, full precision or quantised alike. A run that "
        "was stopped goes on: finished batches wait in a folder .NAME.unfinished beside OUT.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", type=path_option, help="folder written by convert or quantize")
    add("--out", type=path_option, default="grid.png", help="grid.png or samples.npz (%(default)s)")
    add(
        "--labels", help="classes such as 207,360 or 0-9, repeated as needed (default: all in turn)"
    )
    add("--num-samples", type=int, help="how many (default: one for each of --labels, else 8)")
    add("--sampler", choices=SAMPLERS, help="default: flow for velocity models (SiT), else ddim")
    add(
        "--steps",
        default="50",
        help="number, or a published spacing: ddim25, 10,15,20 (%(default)s)",
    )
    add("--eta", type=float, default=0.0, help="noise of ddim: 0 none, 1 as ddpm (%(default)s)")
    add("--guidance", type=float, default=1.5, help="1 turns it off (%(default)s)")
    add(
        "--guidance-channels",
        type=guidance_channels,
        default=3,
        metavar="N|all",
        help="guided latent channels: 3 as published, all as diffusers (%(default)s)",
    )
    add("--clip", type=float, help="clip the predicted data to [-CLIP, CLIP] at every step")
    add(
        "--seed",
        type=int,
        default=0,
        help="sample i depends on seed, i and label only (%(default)s)",
    )
    add(
        "--batch-size",
        type=int,
        help="samples at once, over all devices (default: 16 a device, 4 on CPU)",
    )
    add(
        "--execution",
        choices=("simulated", "integer"),
        default="simulated",
        help="of quantised layers: float arithmetic on the quantised grid, or dots of the stored "
        "integers or elements, scaled afterwards; quantised inputs needed (%(default)s)",
    )
    add(
        "--vae", type=path_option, help="checkpoint of the autoencoder, where CHECKPOINT holds none"
    )
    add("--columns", type=int, help="pictures in a row of the grid")
    add("--force", action="store_true", help="replace OUT if it exists")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Samples, decodes and writes; raises `UserError` on options that do not fit."""
    from qdit_jax.cli.sample_run import run_sample  # jax loads only when a verb runs

    run_sample(args)


def guidance_channels(text: str) -> int | None:
    """Returns a count of channels, None for `all`."""
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number, nor 'all'")
    return int(text)
