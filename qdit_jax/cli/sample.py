"""`qdit sample`: pictures from a checkpoint, full precision or quantized."""

from __future__ import annotations

import argparse
import re
import time
from typing import TYPE_CHECKING, Any

from qdit_jax.cli.numerics_option import add_dtype, add_numerics
from qdit_jax.cli.options import (
    LARGEST_COUNT,
    SubParsers,
    positive_int,
    refuse_inert,
    seed_number,
    verb_parser,
)
from qdit_jax.cli.paths import path_option
from qdit_jax.cli.process import Process, add_process
from qdit_jax.errors import UserError
from qdit_jax.files import AnyPath

if TYPE_CHECKING:  # help is printed without them
    import numpy as np

    from qdit_jax.checkpoint import Checkpoint

HELP = """\
Sample images (or latents) from a full-precision or quantized checkpoint. A run that was stopped
resumes: finished batches are kept beside OUT, in the folder .OUT.unfinished.
"""
EXAMPLE = """examples:
  qdit sample ckpt_dir --labels 207,360 --steps 50 --guidance 1.5 --seed 0 --out grid.png
  qdit sample ckpt_dir --num-samples 10000 --sampler ddpm --steps 250 --out samples.npz
"""
WHOLE = re.compile("[0-9]+")


def add_parser(subparsers: SubParsers) -> None:
    """Adds the verb with its options."""
    parser = verb_parser(
        subparsers,
        "sample",
        HELP,
        epilog=EXAMPLE,
    )
    add = parser.add_argument
    add("checkpoint", type=path_option, help="a checkpoint folder or an exported file")
    add(
        "--out",
        type=path_option,
        default="grid.png",
        help="a .png of all samples, or an .npz with arr_0, uint8 [N, H, W, C] (%(default)s)",
    )
    add(
        "--labels",
        help="classes such as 207,360 or 0-9, cycled over the samples (default: all classes)",
    )
    add(
        "--num-samples",
        type=positive_int,
        help="number of samples (default: one per label of --labels, else 8)",
    )
    add_process(add)
    add(
        "--seed",
        type=seed_number,
        default=0,
        help="seed of the noise; sample i depends on it, i and its label only (%(default)s)",
    )
    add(
        "--batch-size",
        type=positive_int,
        help="samples per batch, over all devices (default: 16 per device, 4 on CPU)",
    )
    add_numerics(
        add,
        "simulated",
        "arithmetic of quantized layers: simulated computes in float with the quantized values; "
        "integer multiplies the stored codes and scales the result, which needs quantized inputs "
        "(%(default)s)",
    )
    add_dtype(add)
    add("--vae", type=path_option, help="a converted autoencoder, for checkpoints without one")
    add("--columns", type=positive_int, help="pictures per row of the .png")
    add("--force", action="store_true", help="replace OUT if it exists")
    parser.set_defaults(run=run, resumes=lambda args: True)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Samples, decodes and writes; prints and returns what was written and how long it took."""
    from qdit_jax import sampling
    from qdit_jax.checkpoint import dtype_of
    from qdit_jax.cli.checkpoints import diffusion_checkpoint, with_autoencoder
    from qdit_jax.cli.progress import Bar
    from qdit_jax.evaluation import SampleFile

    check_output(args.out, args.columns, args.force, [args.checkpoint, args.vae])
    process = Process.of(vars(args))
    checkpoint = with_autoencoder(diffusion_checkpoint(args.checkpoint, args.dtype), args.vae)
    classes = checkpoint.model.all_conditions()
    if classes is None:
        raise UserError(
            f"{args.checkpoint} takes no class labels, which --labels and --num-samples choose; "
            "give its conditions to qdit_jax.generate in Python."
        )
    label = chosen_labels(args.labels, args.num_samples, len(classes))
    job = SampleFile(
        checkpoint,
        process.sampler_of(checkpoint),
        label,
        seed=args.seed,
        guidance=process.guidance,
        guidance_channels=process.channels,
        numerics=args.numerics,
        batch_size=args.batch_size,
        settings={"steps": process.steps, "eta": process.eta, "clip": process.clip},
    )
    if job.is_latent and args.out.suffix == ".png":
        raise UserError(
            f"the model's {checkpoint.model.sample_shape()[-1]} channels are latents and "
            f"{args.checkpoint} holds no autoencoder; give --vae CHECKPOINT, or --out latents.npz."
        )
    checkpoint.model.check_condition(label)
    # These raise their errors before anything is computed.
    sampling.denoiser(checkpoint.model, checkpoint.params, process.guidance, process.channels)
    sampling.check_numerics(checkpoint.params, args.numerics)
    if (text := process.scheduler_text(checkpoint)) is not None:
        print(text)
    start = time.perf_counter()
    with Bar(len(label), "sample", "sampling", resumes=True) as bar:
        job.write(args.out, columns=args.columns, force=args.force, progress_fn=bar.update)
    seconds = time.perf_counter() - start
    settings = {
        "sampler": type(job.sampler).__name__,
        "steps": process.steps,
        "guidance": process.guidance,
        "seed": args.seed,
        "precision": precision(checkpoint, args.numerics),
        "dtype": dtype_of(checkpoint),
    }
    print(
        f"{args.out}: {len(label)} samples, {settings['sampler']} {process.steps} steps, "
        f"guidance {process.guidance:g}, {settings['precision']} in {settings['dtype']}, {seconds:.1f} s with compilation."
    )
    found = {"out": args.out, "num_samples": len(label), "labels": label}
    return {**found, **settings, "seconds_with_compilation": seconds}


def check_output(
    out: AnyPath, columns: int | None, force: bool, inputs: list[AnyPath | None]
) -> None:
    """Raises `UserError` if what is to be written cannot be."""
    from qdit_jax.files import check_free

    if out.suffix not in (".png", ".npz"):
        raise UserError(f"--out {out}: the name must end with .png or .npz.")
    if out.suffix == ".npz":
        refuse_inert({"columns": columns}, {"columns": None}, "an .npz has no grid")
    check_free(out, force, "picture" if out.suffix == ".png" else "samples", inputs)


def precision(checkpoint: Checkpoint, numerics: str) -> str:
    """Returns how the numbers were computed and by what, in words."""
    from qdit_jax.kernels import implementations_used
    from qdit_jax.models import rows_per_sample

    if checkpoint.recipe is None:
        return "full precision"
    used = implementations_used(checkpoint.params, numerics, rows=rows_per_sample(checkpoint.model))
    names = ", ".join(f"{name} ({count} layers)" for name, count in used.items())
    return f"quantized, {numerics} numerics" + (f" by {names}" if names else "")


def chosen_labels(text: str | None, num_samples: int | None, num_classes: int) -> np.ndarray:
    """Returns one label per sample: those of `text`, or all classes, repeated cyclically.

    Raises:
        UserError: if `text` is not a list of numbers and ranges, or one is beyond the null class.
    """
    import numpy as np

    if text is None:
        return np.arange(num_samples or 8) % num_classes
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not WHOLE.fullmatch(first) or (dash and not WHOLE.fullmatch(last)):
            raise UserError(
                f"--labels {text}: {part!r} is not a class; use numbers such as 207,360 or 0-9."
            )
        if len(last or first) > 9 or int(last or first) > num_classes:
            raise UserError(
                f"--labels {text}: label {last or first} is out of range; this model knows 0 to "
                f"{num_classes - 1}."
            )
        found += range(int(first), int(last or first) + 1)
        if len(found) > LARGEST_COUNT:
            raise UserError(f"--labels names more than {LARGEST_COUNT:,} samples; use fewer.")
    if not found:
        raise UserError(f"--labels {text} gives no class; a range runs from low to high.")
    return np.resize(np.array(found), num_samples or len(found))
