"""`qdit evaluate`: how good samples are, and how far a quantized model is from full precision."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, TypeVar

from qdit_jax.cli.numerics_option import add_dtype, add_numerics
from qdit_jax.cli.options import (
    AddArgument,
    SubParsers,
    count,
    positive_int,
    refuse_inert,
    seed_number,
    verb_parser,
    whole_number,
)
from qdit_jax.cli.paths import path_option
from qdit_jax.cli.process import Process, add_process
from qdit_jax.cli.processes_option import NAMES, add_processes
from qdit_jax.cli.prompts_option import add_embeds, add_size
from qdit_jax.errors import UserError

Value = TypeVar("Value")

HELP = """\
Sample a checkpoint, compare it sample by sample with another one (--against), and score it against
a reference (--reference); or score ready-made samples of any generator (--samples).

For a checkpoint, the folder --out gets report.html (self-contained), metrics.json, pictures.png and
samples.npz (arr_0, uint8 [N, H, W, C], which other evaluators read). Finished batches are kept
there: after an interruption, the same command resumes.

A reference is an .npz in the form of OpenAI's evaluator: arr_0 with images, or mu and sigma (and
mu_s, sigma_s), or both; `demo` is the packaged one of digits. Of videos, it is an .npz with uint8
[N, T, H, W, C] in arr_0, or statistics, or a folder of clips (.gif, .mp4, .npz) of one size and length.

examples:
  qdit evaluate xl2-w4a8 --against xl2 --num-samples 100 --out compared
  qdit evaluate xl2-w4a8 --against xl2 --compare xl2-w4a8-channel --num-samples 100
  qdit evaluate xl2-w4a8 --num-samples 10000 --reference VIRTUAL_imagenet256_labeled.npz \\
      --features inception inception_ckpt
  qdit evaluate wan-w4a8 --against wan --embeds prompts.npz --num-samples 2048 --reference clips/ \\
      --features i3d i3d_ckpt
  qdit evaluate xl2-w4a8 --against xl2 --num-samples 10000 --distributed    # on every host
  qdit evaluate --samples samples.npz --reference demo
  qdit evaluate --samples a.npz --reference real.npz --features inception inception_ckpt \\
      --out metrics.json --pictures compare.png

Make inception_ckpt with `qdit convert pt_inception-2015-12-05-6726825d.pth inception_ckpt`.
Only Inception's features give scores called FID, sFID, Inception Score and KID, only I3D's FVD; videos are
uint8 [N, T, H, W, C] in arr_0.
"""
# Options of one way to call the verb, None where they are not given; the other way refuses them.
OF_CHECKPOINTS = (
    *("against", "compare", "num_samples", "steps", "sampler", "eta", "clip", "guidance"),
    *("shift", "spacing"),
    *("guidance_channels", "numerics", "dtype", "vae", "range_samples"),
    *("embeds", "prompts_from", "size", "frames", "fps"),
)
OF_FILES = ("samples", "pictures")
OF_SCORES = {
    "features": ["demo"],
    "preprocessing": "published",
    "min_samples": None,
    "split_size": 5000,
    "kernel_samples": 10_000,
}


def add_parser(subparsers: SubParsers) -> None:
    """Adds the verb with its options."""
    parser = verb_parser(subparsers, "evaluate", HELP)
    parser.add_argument(
        "checkpoint", metavar="CKPT", type=path_option, nargs="?", help="the checkpoint to sample"
    )
    add_checkpoint_options(parser.add_argument_group("options of checkpoints").add_argument)
    files = parser.add_argument_group("options of ready-made files").add_argument
    files(
        "--samples", type=path_option, help="images to score instead of a CKPT: an .npz with arr_0"
    )
    files(
        "--pictures",
        type=path_option,
        help="write a .png with samples and reference images side by side",
    )
    add_score_options(parser.add_argument_group("options of both").add_argument)
    add_processes(parser)
    parser.set_defaults(
        run=run, check=check_options, resumes=lambda args: args.checkpoint is not None
    )


def add_checkpoint_options(add: AddArgument) -> None:
    add(
        "--against",
        metavar="REF",
        type=path_option,
        help="the checkpoint to compare with, mostly the full-precision one",
    )
    add(
        "--compare",
        metavar="OTHER",
        type=path_option,
        help="a second quantized checkpoint: a paired test of whether it or CKPT is closer to REF",
    )
    add(
        "--num-samples",
        type=whole_number(2),
        help="number of samples, cycling through the classes or prompts (100)",
    )
    add_embeds(add)
    add_size(add)
    add_process(add)
    add_numerics(add, None, "arithmetic of quantized layers, see qdit sample (simulated)")
    add_dtype(add)
    add("--vae", type=path_option, help="a converted autoencoder, for checkpoints without one")
    add(
        "--range-samples",
        type=count,
        help="trajectories from which the report draws ranges of activations, 0 for none (4)",
    )


def add_score_options(add: AddArgument) -> None:
    add(
        "--reference",
        help="the reference: an .npz, a folder of clips, or `demo` for the packaged statistics of digits",
    )
    add(
        "--features",
        nargs="+",
        default=OF_SCORES["features"],
        metavar=("demo|inception|i3d", "CKPT"),
        help="the feature network: `demo` (of digits, the default), or `inception`, or for videos "
        "`i3d`, and its converted checkpoint",
    )
    add(
        "--preprocessing",
        choices=("published", "port"),
        default="published",
        help="how Inception's input is prepared: as the published TensorFlow graph does, or as its "
        "common PyTorch port does (%(default)s)",
    )
    add("--out", type=path_option, help="of a checkpoint: folder to write (qdit-evaluate); of files: .json")  # fmt: skip
    add(
        "--batch-size",
        type=positive_int,
        help="images per batch (scoring 64, or 8 videos; sampling 16 per device, 4 on CPU)",
    )
    add(
        "--min-samples",
        type=whole_number(2),
        help="the fewest samples to score (default: one more than the network has features)",
    )
    add(
        "--split-size",
        type=positive_int,
        default=5000,
        help="samples per split of the Inception Score (%(default)s)",
    )
    add(
        "--kernel-samples",
        type=positive_int,
        default=10_000,
        help="the most samples of each set for KID (%(default)s)",
    )
    add("--seed", type=seed_number, default=0, help="seed of noise and of subsets (%(default)s)")
    add("--force", action="store_true", help="replace the results of another evaluation")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Scores files or compares checkpoints, prints tables, and writes what was asked for."""
    check_options(vars(args))
    from qdit_jax.evaluation import Scoring, batch_size_of, check_features  # these load jax
    from qdit_jax.metrics import ScoreSettings

    check_features(args.features)
    scoring = None
    if args.reference is not None:
        names = ("split_size", "kernel_samples", "min_samples", "seed")
        scoring = Scoring(
            args.reference,
            tuple(args.features),
            args.preprocessing,
            ScoreSettings(**{name: getattr(args, name) for name in names}),
            args.batch_size or batch_size_of(args.features),
        )
    if args.checkpoint is None:
        from qdit_jax.cli.evaluate_files import evaluate_files

        assert scoring is not None, "check_options asks for a reference"
        outputs = {"out": args.out, "pictures": args.pictures}
        return evaluate_files(args.samples, scoring, **outputs, force=args.force)
    from qdit_jax.cli.evaluate_models import Comparison, evaluate_models
    from qdit_jax.processes import ALONE

    comparison = Comparison(
        args.checkpoint,
        args.against,
        args.compare,
        args.vae,
        Process.of(vars(args)),
        num_samples=given(args.num_samples, 100),
        seed=args.seed,
        batch_size=args.batch_size,
        numerics=given(args.numerics, "simulated"),
        dtype=args.dtype,
        range_samples=given(args.range_samples, 4),
        options=vars(args),
    )
    outputs = {"out": args.out, "force": args.force}
    return evaluate_models(comparison, scoring, **outputs, processes=args.processes or ALONE)


def given(value: Value | None, default: Value) -> Value:
    """Returns an option's value, or its default if it was not given."""
    return default if value is None else value


def check_options(options: Mapping[str, Any]) -> None:
    """Raises `UserError` if options contradict each other, before anything heavy is imported."""
    of_files = options["checkpoint"] is None
    if of_files == (options["samples"] is None):
        raise UserError("give a checkpoint to sample, or --samples FILE with ready-made images.")
    kind, others = ("checkpoints", OF_CHECKPOINTS) if of_files else ("ready-made files", OF_FILES)
    for name in others:
        if options[name] is not None:
            raise UserError(f"--{name.replace('_', '-')} is an option of evaluating {kind}.")
    if of_files:
        nothing = {**dict.fromkeys(NAMES), "distributed": False}
        refuse_inert(options, nothing, "one process scores ready-made files")
    if options["features"][0] in ("demo", "i3d"):
        reason = "it is of Inception's input: --features inception"
        refuse_inert(options, {"preprocessing": "published"}, reason)
    if options["compare"] is not None and options["against"] is None:
        raise UserError("--compare OTHER needs --against REF: both are compared with it.")
    if options["reference"] is not None:
        return
    if of_files:
        raise UserError("--samples needs --reference: a .npz file, or `demo`.")
    if options["features"] != OF_SCORES["features"]:
        raise UserError("--features needs --reference: scores compare features with a reference's.")
    refuse_inert(options, OF_SCORES, "scores compare with a --reference, and none is given")
