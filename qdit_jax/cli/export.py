"""`qdit export`: a checkpoint as one safetensors file, or such a file as a folder, or as other programs' weights."""

from __future__ import annotations

import argparse
from typing import Any

from qdit_jax.cli.options import SubParsers, verb_parser
from qdit_jax.cli.paths import path_option
from qdit_jax.files import AnyPath

HELP = """\
Write a checkpoint, quantized or not, as one .safetensors file; or write such a file as a checkpoint
folder again. SRC or OUT, whichever ends in .safetensors, is the file; the other one is the folder.

Nothing is lost either way: our file holds the packed codes, scales and zero points bit for bit, the
network's configuration, the recipe and the autoencoder. Every verb that reads a checkpoint folder
reads such a file too.

With --format, OUT is a file of weights for ComfyUI: the authors' names, quantized weights in that
format bit for bit, everything else as it is, without the autoencoder. A layer that the format cannot
hold is named, and nothing is written.
  int8_tensorwise   8 bits per output channel, symmetric, with ConvRot's rotations or without
  asym_w4a8_int8    the format lut4_e4m3, with ConvRot's rotations
  nvfp4             the format nvfp4

examples:
  qdit export xl2-w4a8 xl2-w4a8.safetensors     # folder to file
  qdit export xl2-w4a8.safetensors xl2-w4a8     # and back
  qdit export xl2-w8a8 xl2-comfy.safetensors --format int8_tensorwise
"""
SUFFIX = ".safetensors"
FORMATS = ("int8_tensorwise", "asym_w4a8_int8", "nvfp4")


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
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="write weights for ComfyUI in this format (default: a file for qdit itself)",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Writes OUT; raises `UserError` if not exactly one of both names is a .safetensors file."""
    from qdit_jax import checkpoint
    from qdit_jax.errors import UserError
    from qdit_jax.files import check_free, num_bytes

    if args.format is not None:
        return write_weights(args.source, args.out, args.format, args.force)
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


def write_weights(source: AnyPath, out: AnyPath, format: str, force: bool) -> dict[str, Any]:
    """Writes OUT in a format of others; raises `UserError` if its name or a layer does not fit."""
    from qdit_convert import export
    from qdit_jax import checkpoint
    from qdit_jax.errors import UserError
    from qdit_jax.files import check_free, num_bytes

    if out.suffix != SUFFIX:
        raise UserError(f"{out} must be a {SUFFIX} file to be written with --format.")
    check_free(out, force, "weights", [source])
    loaded = checkpoint.load(source)
    written = export(loaded, out, format=format, overwrite=force)
    size = num_bytes(out)
    print(
        f"wrote {out}, {size:,} bytes: {written.layout}, {written.quantized} weights in {format}, "
        f"{written.kept} tensors as they were"
    )
    if loaded.vae is not None:
        print("the autoencoder is not in it: ComfyUI loads that from a file of its own")
    return {"out": out, "bytes": size, **written._asdict()}
