"""`qdit export`: a checkpoint folder to one safetensors file, or such a file to a folder."""

from __future__ import annotations

import argparse
from typing import Any

from qdit_jax.cli.options import SubParsers, verb_parser
from qdit_jax.cli.paths import path_option

HELP = """\
Write a checkpoint, quantized or not, as one .safetensors file; or write such a file as a checkpoint
folder again. SRC or OUT, whichever ends in .safetensors, is the file; the other one is the folder.

Nothing is lost either way: the file holds the packed codes, scales and zero points bit for bit, the
network's configuration, the recipe and the autoencoder. Every verb that reads a checkpoint folder
reads such a file too.

examples:
  qdit export xl2-w4a8 xl2-w4a8.safetensors     # folder to file
  qdit export xl2-w4a8.safetensors xl2-w4a8     # and back
"""
SUFFIX = ".safetensors"


def add_parser(subparsers: SubParsers) -> None:
    """Adds the verb with its options."""
    parser = verb_parser(subparsers, "export", HELP)
    parser.add_argument(
        "source",
        metavar="SRC",
        type=path_option,
        help="the checkpoint folder or .safetensors file to read",
    )
    parser.add_argument(
        "out",
        metavar="OUT",
        type=path_option,
        help="the .safetensors file or checkpoint folder to write",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Writes OUT; raises `UserError` if not exactly one of both names is a .safetensors file."""
    from qdit_jax import checkpoint
    from qdit_jax.errors import UserError
    from qdit_jax.files import check_free, num_bytes

    if (args.source.suffix == SUFFIX) == (args.out.suffix == SUFFIX):
        raise UserError(
            f"{args.source} and {args.out}: one of them must be a {SUFFIX} file, the other a "
            "checkpoint folder."
        )
    kind = "export" if args.out.suffix == SUFFIX else "checkpoint"
    check_free(args.out, args.force, kind, [args.source])
    if args.out.suffix == SUFFIX:
        checkpoint.save_safetensors(args.out, checkpoint.load(args.source), overwrite=args.force)
        size = num_bytes(args.out)
        print(f"wrote {args.out}, {size:,} bytes")
        return {"out": args.out, "bytes": size}
    checkpoint.save(args.out, checkpoint.load_safetensors(args.source), overwrite=args.force)
    print(f"wrote {args.out}")
    return {"out": args.out}
