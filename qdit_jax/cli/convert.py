"""`qdit convert`: PyTorch weights to a checkpoint."""

from __future__ import annotations

import argparse
import textwrap
from typing import TYPE_CHECKING, Any

from qdit_jax.cli.options import SubParsers, finite_float, positive_int, verb_parser, whole_number
from qdit_jax.cli.paths import path_option

if TYPE_CHECKING:  # help is printed without them
    from qdit_jax.checkpoint import Checkpoint

DESCRIPTION = """\
Convert PyTorch weights to a checkpoint, a folder that every other verb reads. Networks: DiT, SiT,
AutoencoderKL, a whole DiTPipeline, the InceptionV3 of FID, or the I3D of FVD. PyTorch is not needed.
"""
EPILOG = """
SRC may be
  a file         .pt, .pth, .bin, .ckpt (no code in it is run) or .safetensors
  an index       diffusion_pytorch_model.safetensors.index.json, with its shards beside it
  a folder       of diffusers: config.json and weights, fp16 variants included
  hf:OWNER/NAME  a repository of the Hugging Face hub, of which only what is read is downloaded;
                 hf:OWNER/NAME@REVISION, hf:OWNER/NAME/FILE; needs pip install 'qdit-jax[hub]'
  a pipeline     a DiTPipeline folder; its VAE and its scheduler's settings are converted too

The kind of network is recognized by the names of its tensors and printed. What the tensors do not
tell is read from the training script's arguments, if the file has them, or from config.json. Where
both are missing:
  DiT or SiT              the tensors have the same names: --family sit for a SiT
  attention heads         known for the published sizes; --num-heads for others
  direction of SiT's time 0 is noise by default; for networks trained by REPA: --noise-time 1
  Open-Sora 1.0           scales of positions, known for the published sizes: --space-scale, --time-scale
  scale of latents        of an autoencoder without config.json: --scaling-factor, --shift-factor

Weights that the file stores quantized stay as they are, bit for bit: ComfyUI's int8_tensorwise (with
ConvRot), float8_e4m3fn, float8_e5m2, nvfp4 and asym_w4a8_int8, and diffusers' nunchaku_lite. Other
formats are refused by name.

A pipeline's scheduler_config.json is followed: prediction type, betas, spacing, clipping. A setting
that is not supported is an error that names it and its value.

examples
  qdit convert DiT-XL-2-256x256.pt dit_xl2
  qdit convert SiT-XL-2-256x256.pt sit_xl2 --family sit
  qdit convert my_training/0400000.pt mine --weights ema --num-heads 6
  qdit convert facebook_DiT-XL-2-256/ dit_pipeline --dtype bfloat16
  qdit convert hf:facebook/DiT-XL-2-256 dit_pipeline
  qdit convert sd-vae-ft-mse/ vae
  qdit convert ae.safetensors flux_vae --scaling-factor 0.3611 --shift-factor 0.1159
"""

# Options of what the file does not say, but for --input-size, whose numbers are joined.
NETWORK_OPTIONS = (
    *("model", "num_heads", "num_classes", "noise_time", "scaling_factor", "shift_factor"),
    *("interpolation_scale", "space_scale", "time_scale", "rope_axes"),
)


def add_parser(subparsers: SubParsers) -> None:
    """Adds the verb `convert`."""
    parser = verb_parser(
        subparsers,
        "convert",
        DESCRIPTION,
        epilog=textwrap.dedent(EPILOG),
    )
    parser.add_argument(
        "src", type=path_option, metavar="SRC", help="file, folder or hf: id of PyTorch weights"
    )
    parser.add_argument(
        "out", type=path_option, metavar="OUT", help="folder to write the checkpoint to"
    )
    add_network(parser)
    parser.add_argument(
        "--weights",
        choices=("ema", "model"),
        help="which weights of a training checkpoint that holds both: ema (averaged) or model "
        "(default: ema if there)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="dtype of the parameters to write (float32, which keeps every stored value exactly)",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.set_defaults(run=run)


def add_network(parser: argparse.ArgumentParser) -> None:
    """Adds the options for what the weights alone do not tell about the network."""
    parser.add_argument(
        "--family",
        metavar="NAME",
        help="the kind of network: dit, sit, pixart, vae, inception, ...; needed for sit, whose tensors "
        "are named like dit's",
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="the published size to expect, such as DiT-XL/2; another one is an error",
    )
    parser.add_argument(
        "--num-heads",
        type=positive_int,
        metavar="N",
        help="number of attention heads; needed for sizes that are not published",
    )
    parser.add_argument(
        "--num-classes",
        type=positive_int,
        metavar="N",
        help="number of classes without the null class (default: rows of the label table - 1)",
    )
    parser.add_argument(
        "--input-size",
        type=positive_int,
        nargs="+",
        metavar="N",
        help="rows, or rows and columns, of the latent if the file does not say: 32 for 256 pixels; of "
        "a video also frames, rows and columns",
    )
    parser.add_argument(
        "--noise-time",
        type=whole_number(0, 1),
        metavar="0|1",
        help="the time at pure noise in a SiT's training: 0 in SiT's code, 1 in REPA's (default: "
        "what the file says, else 0)",
    )
    add_factors(parser)


def add_factors(parser: argparse.ArgumentParser) -> None:
    """Adds the options for scales of positions and of latents."""
    parser.add_argument(
        "--rope-axes",
        type=positive_int,
        nargs=3,
        metavar="N",
        help="of a FLUX whose heads have not 128 channels: how many of them turn with each coordinate "
        "of a position (default: 16 56 56, as published)",
    )
    parser.add_argument(
        "--interpolation-scale",
        type=finite_float,
        metavar="X",
        help="by which a PixArt's positions are divided (default: as published for its size, 0.5 for "
        "256 pixels, 1 for 512, 2 for 1024)",
    )
    for name, text in (
        ("space", "in space, 0.5 for 256 pixels, 1 for 512"),
        ("time", "in time, 1"),
    ):
        parser.add_argument(
            f"--{name}-scale",
            type=finite_float,
            metavar="X",
            help=f"by which the positions of Open-Sora 1.0 are divided {text} (default: as published "
            "for its size)",
        )
    for name, text in (("scaling", "scale"), ("shift", "shift")):
        parser.add_argument(
            f"--{name}-factor",
            type=finite_float,
            metavar="X",
            help=f"{text} of an autoencoder's latents (default: what its config.json says)",
        )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Converts, and prints what was found and written."""
    from qdit_convert import convert_checkpoint
    from qdit_jax.cli.progress import Stages
    from qdit_jax.errors import UserError

    size = args.input_size
    if size is not None and len(size) > 3:
        raise UserError(
            f"--input-size takes rows, or rows and columns, or frames, rows and columns; got {len(size)} "
            "numbers."
        )
    if size is not None:
        size = size[0] if len(size) == 1 else tuple(size)
    with Stages("tensor") as stages:
        checkpoint = convert_checkpoint(
            args.src,
            args.out,
            family=args.family,
            weights=args.weights,
            dtype=args.dtype,
            force=args.force,
            progress_fn=stages.tell,
            **{name: getattr(args, name) for name in NETWORK_OPTIONS},
            input_size=size,
        )
    for title, part in (("", checkpoint), ("vae: ", checkpoint.vae)):
        if part is not None:
            print(title + _summary(part))
            for note in part.metadata.get("names", ()):
                print(f"{title}names: {note}")
            for note in part.metadata.get("notes", ()):
                print(f"  {title}{note}")
    if checkpoint.metadata.get("scheduler"):
        from qdit_jax.sampling import sampler_text

        print(f"  scheduler: {sampler_text(checkpoint)}")
    if args.family is None and checkpoint.metadata["layout"].startswith("DiT in the facebook"):
        print("SiT has the same names as DiT: if this is a SiT, convert with --family sit")
    print(f"wrote {args.out}")
    return {"out": args.out, **_facts(checkpoint)}


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns what `--json` prints about a converted network, its autoencoder included."""
    import jax

    from qdit_jax.models import config_of, family_of

    leaves = jax.tree.leaves(checkpoint.params)
    facts = {
        "family": family_of(checkpoint.model).name,
        "config": config_of(checkpoint.model),
        "values": num_values(checkpoint),
        "bytes": sum(leaf.nbytes for leaf in leaves),
        "metadata": checkpoint.metadata,
    }
    return facts if checkpoint.vae is None else {**facts, "vae": _facts(checkpoint.vae)}


def num_values(checkpoint: Checkpoint) -> int:
    """Returns the values that a network has; a quantized kernel counts as the weight that it stands for."""
    import math

    import jax

    from qdit_jax.quant import QTensor

    def is_kernel(node: object) -> bool:
        return isinstance(node, QTensor)

    leaves = jax.tree.leaves(checkpoint.params, is_leaf=is_kernel)
    return sum(math.prod(leaf.shape) for leaf in leaves)


def _summary(checkpoint: Checkpoint) -> str:
    """Returns one line on a converted network."""
    import jax

    from qdit_jax.models import config_of, family_of

    leaves = jax.tree.leaves(checkpoint.params)
    config = ", ".join(f"{name}={value}" for name, value in config_of(checkpoint.model).items())
    weights = checkpoint.metadata["weights"]
    return (
        f"family {checkpoint.metadata['source_family']} ({checkpoint.metadata['layout']}"
        f"{'' if weights == 'flat' else f', {weights} weights'}), stored as "
        f"{family_of(checkpoint.model).name}: {num_values(checkpoint):,} values, "
        f"{sum(leaf.nbytes for leaf in leaves):,} bytes\n  {config}"
    )
