"""`qdit verify`: whether a quantized checkpoint does what it says, and keeps given limits."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from qdit_jax.cli.guidance_option import add_guidance, guidance_of
from qdit_jax.cli.numerics_option import add_dtype, add_numerics
from qdit_jax.cli.options import (
    AddArgument,
    SubParsers,
    finite_float,
    positive_float,
    positive_int,
    seed_number,
    verb_parser,
    whole_number,
)
from qdit_jax.cli.paths import path_option
from qdit_jax.cli.prompts_option import Inputs, add_embeds, add_size
from qdit_jax.errors import UserError

HELP = """\
Check a quantized checkpoint against the full-precision one that it was made from: what every layer
is stored as and who computes it, how far its output is from full precision, the error of one network
call and of samples, bytes, and the time of a call on this machine.

A layer that the recipe names and that is not quantized as it says is a failure, by name. Limits are
failures where they are set. Exit status: 0 if nothing failed, 1 if something did, 2 if the command
cannot be run. Nothing is written unless --out asks for it.

A layer's decibels are of its output, signal to error, on the full-precision network's own
activations: errors of other layers do not count. Outputs that a method has moved to other
coordinates (folded) cannot be compared one by one; their row says so. Where XLA computes a layer on
a platform that has a kernel for its kind, the row says why that kernel does not.

examples:
  qdit verify xl2-w4a8 --against xl2
  qdit verify xl2-w4a8 --against xl2 --min-db 15 --min-layer-db 12 --max-bytes 0.5x
  qdit verify xl2-w4a8 --against xl2 --numerics integer --max-ms-ratio 1.0
  qdit verify xl2-w4a8 --against xl2 --no-timing --implementation xla --out report.json
"""
OPTIONS = {
    "min_db": "--min-db",
    "min_layer_db": "--min-layer-db",
    "max_bytes": "--max-bytes",
    "max_ms_ratio": "--max-ms-ratio",
    "implementation": "--implementation",
}


def add_parser(subparsers: SubParsers) -> None:
    """Adds the verb with its options."""
    parser = verb_parser(subparsers, "verify", HELP)
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", type=path_option, help="the quantized checkpoint")
    add(
        "--against",
        metavar="REF",
        type=path_option,
        required=True,
        help="the full-precision checkpoint of the same network",
    )
    add_limits(parser.add_argument_group("limits").add_argument)
    add_measuring(parser.add_argument_group("how it is measured").add_argument)
    add("--out", type=path_option, help="write a .json with everything that was found")
    add("--force", action="store_true", help="replace the report of an earlier run")
    parser.set_defaults(run=run, status_of=status_of)


def add_limits(add: AddArgument) -> None:
    add(
        "--min-db",
        type=finite_float,
        help="least signal-to-error ratio of the final latents, dB, in the mean over samples",
    )
    add("--min-layer-db", type=finite_float, help="least ratio of every layer's output, dB")
    add(
        "--max-bytes",
        metavar="SIZE",
        type=size,
        help="most bytes of all parameters: a size such as 500MB or 1.2GiB, or 0.5x of REF's",
    )
    add(
        "--max-ms-ratio",
        type=positive_float,
        help="most time of a network call, as a multiple of REF's",
    )
    add(
        "--implementation",
        metavar="NAME",
        help="who must compute every quantized layer: a name that the table of layers shows, such as "
        "xla (xla_cpu on CPU)",
    )


def add_measuring(add: AddArgument) -> None:
    add("--num-samples", type=whole_number(2), default=8, help="paired samples (%(default)s)")
    add("--steps", default="10", help="sampling steps, or a spacing, see qdit sample (%(default)s)")
    add_guidance(add)
    add_embeds(add)
    add_size(add)
    add("--seed", type=seed_number, default=0, help="seed of the noise (%(default)s)")
    add(
        "--batch-size",
        type=positive_int,
        help="samples per batch, and per timed call (16 per device, 4 on CPU)",
    )
    add_numerics(add, "simulated", "arithmetic of quantized layers (%(default)s)")
    add_dtype(add)
    add("--no-timing", action="store_true", help="do not time network calls")


def size(text: str) -> str:
    """Returns a size or a share of one, as it was written."""
    from qdit_jax.evaluation import most_bytes

    try:
        most_bytes(text, 1)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("max_bytes=")) from None
    return text


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Verifies, prints what was found, and writes it if asked to."""
    if args.max_ms_ratio is not None and args.no_timing:
        raise UserError(
            f"--max-ms-ratio {args.max_ms_ratio:g} needs the time of a call; leave --no-timing out."
        )
    from qdit_jax.checkpoint import default_dtype
    from qdit_jax.cli.checkpoints import diffusion_checkpoint
    from qdit_jax.cli.output import plain
    from qdit_jax.cli.progress import Bar
    from qdit_jax.cli.verify_table import print_verification
    from qdit_jax.evaluation import verify
    from qdit_jax.files import check_free, replaced_file

    if args.out is not None:
        inputs = [args.checkpoint, args.against, args.embeds]
        check_free(args.out, args.force, "figures", inputs)
    against = diffusion_checkpoint(args.against, args.dtype)
    chosen = Inputs.of(vars(args), against, args.against)
    with Bar(args.num_samples, "sample", "sampling") as bar:
        found = verify(
            args.checkpoint,
            against=args.against,
            **{name: getattr(args, name) for name in OPTIONS},
            num_samples=args.num_samples,
            steps=args.steps,
            guidance=guidance_of(against, args.guidance),
            seed=args.seed,
            batch_size=args.batch_size,
            numerics=args.numerics,
            dtype=args.dtype or default_dtype(),
            timing=not args.no_timing,
            progress_fn=bar.tell,
            **chosen.settings,
        )
    print_verification(found, OPTIONS)
    result = found.to_json()
    if args.out is not None:
        with replaced_file(args.out, "figures") as temporary:
            text = json.dumps(plain(result), indent=1, ensure_ascii=False)
            temporary.write_text(text + "\n")
        print(f"wrote {args.out}")
    return result


def status_of(result: Mapping[str, Any]) -> int:
    """Returns the exit status: 1 if something failed."""
    return 0 if result["passed"] else 1
