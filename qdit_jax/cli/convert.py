"""`qdit convert`: PyTorch weights to a checkpoint."""

from __future__ import annotations

import argparse
import sys
import textwrap
from typing import Any

from qdit_jax.cli.paths import path_option

EPILOG = """
SRC may be
  a file         .pt, .pth, .bin, .ckpt (read without torch; nothing in it is run) or .safetensors
  an index       diffusion_pytorch_model.safetensors.index.json, with its shards beside it
  a folder       of diffusers: config.json and weights, fp16 variants included
  a pipeline     a whole DiTPipeline folder; its VAE and scheduler settings come along

The family is told from the names of the tensors and printed. Two things no shape can tell:
  SiT has DiT's names     --family sit
  the number of heads     known for the published sizes; otherwise --num-heads

examples
  qdit convert DiT-XL-2-256x256.pt dit_xl2
  qdit convert SiT-XL-2-256x256.pt sit_xl2 --family sit
  qdit convert my_training/0400000.pt mine --weights ema --num-heads 6
  qdit convert facebook_DiT-XL-2-256/ dit_pipeline --dtype bfloat16
  qdit convert sd-vae-ft-mse/ vae
"""


def add_parser(subparsers: Any) -> None:
    """Adds the verb `convert`."""
    parser = subparsers.add_parser(
        "convert",
        help="PyTorch weights to a checkpoint",
        description="Converts PyTorch weights (DiT, SiT, AutoencoderKL, a DiTPipeline) to a checkpoint.",
        epilog=textwrap.dedent(EPILOG),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "src", type=path_option, metavar="SRC", help="file or folder of PyTorch weights"
    )
    parser.add_argument(
        "out", type=path_option, metavar="OUT", help="folder to write the checkpoint to"
    )
    parser.add_argument(
        "--family",
        choices=("dit", "sit", "vae", "inception"),
        help="the network, where its names do not tell it (sit)",
    )
    parser.add_argument(
        "--model", metavar="NAME", help="a published size to check against, as DiT-XL/2"
    )
    parser.add_argument(
        "--num-heads",
        type=int,
        metavar="N",
        help="attention heads, for sizes that are not published",
    )
    parser.add_argument(
        "--num-classes",
        type=int,
        metavar="N",
        help="classes without the null class; by default the label table is taken to end with one",
    )
    parser.add_argument(
        "--input-size",
        type=int,
        nargs="+",
        metavar="N",
        help="rows (and columns) of the latent, where the file does not say: 32 for 256 pixels",
    )
    parser.add_argument(
        "--weights",
        choices=("ema", "model"),
        help="averaged or raw weights of a training file that holds both; default: ema if there",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the parameters written; default: float32, which keeps every stored value exactly",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Converts, and says what was found and written."""
    from qdit_convert import convert
    from qdit_jax.errors import UserError

    size = args.input_size
    if size is not None and len(size) > 2:
        raise UserError(f"--input-size takes rows, or rows and columns; got {len(size)} numbers.")
    if size is not None:
        size = size[0] if len(size) == 1 else tuple(size)
    with _ProgressBar(args.quiet) as bar:
        checkpoint = convert(
            args.src,
            args.out,
            family=args.family,
            model=args.model,
            num_heads=args.num_heads,
            num_classes=args.num_classes,
            input_size=size,
            weights=args.weights,
            dtype=args.dtype,
            force=args.force,
            progress=bar.advance,
        )
    for title, part in (("", checkpoint), ("vae: ", checkpoint.vae)):
        if part is not None:
            print(title + _summary(part))
    if args.family is None and checkpoint.metadata["layout"].endswith("facebook layout"):
        print("SiT has the same names as DiT: if this is a SiT, convert with --family sit")
    print(f"wrote {args.out}")


def _summary(checkpoint: Any) -> str:
    """Returns one line on a converted network."""
    import jax

    from qdit_jax.models import config_of, family_of

    leaves = jax.tree.leaves(checkpoint.params)
    num_values = sum(leaf.size for leaf in leaves)
    config = ", ".join(f"{name}={value}" for name, value in config_of(checkpoint.model).items())
    weights = checkpoint.metadata["weights"]
    return (
        f"family {checkpoint.metadata['source_family']} ({checkpoint.metadata['layout']}"
        f"{'' if weights == 'flat' else f', {weights} weights'}), stored as "
        f"{family_of(checkpoint.model)}: {num_values:,} values, "
        f"{sum(leaf.nbytes for leaf in leaves):,} bytes\n  {config}"
    )


class _ProgressBar:
    """A bar that counts the parameters read; it starts anew for a pipeline's next network."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.bar: Any = None
        self.family = ""

    def __enter__(self) -> _ProgressBar:
        return self

    def advance(self, family: str, leaf: Any, total: int) -> None:
        from tqdm import tqdm

        if self.bar is None or family != self.family:
            self.close()
            self.family = family
            off = self.quiet or not sys.stderr.isatty()
            self.bar = tqdm(total=total, desc=f"reading {family}", unit=" tensors", disable=off)
        self.bar.update()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def __exit__(self, *_: object) -> None:
        self.close()
