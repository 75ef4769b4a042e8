"""What `qdit sample` does with its options."""

from __future__ import annotations

import argparse
import re
import time
from typing import Any

import numpy as np

from qdit_jax import checkpoint as checkpoints
from qdit_jax import diffusion, sampling
from qdit_jax.cli.checkpoints import diffusion_checkpoint, with_autoencoder
from qdit_jax.cli.options import LARGEST_COUNT, refuse_inert
from qdit_jax.cli.progress import Bar
from qdit_jax.errors import UserError
from qdit_jax.kernels import implementations_used
from qdit_jax.models import rows_per_sample
from qdit_jax.report import media

WHOLE = re.compile("[0-9]+")
SMALLEST_CELL = 64  # pixels; smaller pictures are enlarged in a grid


def run_sample(args: argparse.Namespace) -> dict[str, Any]:
    """Samples, decodes and writes; prints what was made and how long it took, and returns it.

    Raises:
        UserError: on options that do not fit the checkpoint or each other.
    """
    if args.out.suffix not in (".png", ".npz"):
        raise UserError(f"--out {args.out}: the name must end with .png or .npz.")
    if args.out.suffix == ".npz":
        refuse_inert(args, {"columns": None}, "an .npz has no grid")
    checkpoint = with_autoencoder(diffusion_checkpoint(args.checkpoint), args.vae)
    classes = checkpoint.model.all_conditions()
    label = chosen_labels(args.labels, args.num_samples, len(classes))
    sampler = chosen_sampler(args, checkpoint)
    walk = own_walk_text(args, checkpoint)
    channels = chosen_channels(args)
    check_pictures(args, checkpoint)
    checkpoint.model.check_condition(label)  # before the progress bar appears
    if walk is not None:
        print(walk)
    start = time.perf_counter()
    with Bar(args, len(label), "sample", "sampling") as bar:
        images = sampling.generate(
            checkpoint,
            sampler,
            label,
            seed=args.seed,
            guidance=args.guidance,
            guidance_channels=channels,
            batch_size=args.batch_size,
            numerics=args.numerics,
            progress_fn=bar.update,
        )
    seconds = time.perf_counter() - start
    check_finite(images)
    write(args, checkpoint, images, label)
    print(
        f"{args.out}: {len(label)} samples, {type(sampler).__name__} {args.steps} steps, "
        f"guidance {args.guidance:g}, {precision(checkpoint, args.numerics)}, {seconds:.1f} s "
        "with compilation."
    )
    return {
        "out": args.out,
        "num_samples": len(label),
        "labels": label,
        "sampler": type(sampler).__name__,
        "steps": args.steps,
        "guidance": args.guidance,
        "seed": args.seed,
        "precision": precision(checkpoint, args.numerics),
        "seconds_with_compilation": seconds,
    }


def chosen_channels(args: argparse.Namespace) -> int | str | None:
    """Returns how many channels are guided, None for all; refuses a choice that guidance 1 ignores."""
    if args.guidance == 1:
        refuse_inert(args, {"guidance_channels": sampling.PUBLISHED}, "--guidance 1 guides none")
    return None if args.guidance_channels == "all" else args.guidance_channels


def precision(checkpoint: checkpoints.Checkpoint, numerics: str) -> str:
    """Returns how the numbers were computed and by what, in words."""
    if checkpoint.recipe is None:
        return "full precision"
    used = implementations_used(checkpoint.params, numerics, rows=rows_per_sample(checkpoint.model))
    names = ", ".join(f"{name} ({count} layers)" for name, count in used.items())
    return f"quantised, {numerics} numerics" + (f" by {names}" if names else "")


def chosen_labels(text: str | None, num_samples: int | None, num_classes: int) -> np.ndarray:
    """Returns one label a sample: those of `text`, or all classes, in turn.

    Raises:
        UserError: if `text` is no list of numbers and ranges, or one is beyond the null class.
    """
    if text is None:
        return np.arange(num_samples or 8) % num_classes
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not WHOLE.fullmatch(first) or (dash and not WHOLE.fullmatch(last)):
            raise UserError(
                f"--labels {text}: {part!r} is no class; use numbers such as 207,360 or 0-9."
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
        raise UserError(f"--labels {text} names no class; a range runs from low to high.")
    return np.resize(np.array(found), num_samples or len(found))


def chosen_sampler(
    args: argparse.Namespace, checkpoint: checkpoints.Checkpoint
) -> diffusion.Sampler:
    """Returns the sampler of the options, on the schedule that the checkpoint was trained on.

    Raises:
        UserError: if the sampler does not fit what the network predicts, or the number of steps.
    """
    name, model = args.sampler or sampling.own_walk(checkpoint), checkpoint.model
    is_flow = model.prediction == "velocity"
    if is_flow != (name == "flow"):
        kind, fitting = ("a velocity", "flow") if is_flow else ("noise", "ddim or ddpm")
        raise UserError(f"--sampler {name}: this model predicts {kind}; use {fitting}.")
    if args.eta and name != "ddim":
        raise UserError(f"--eta {args.eta} is an option of ddim, not of {name}.")
    if args.clip is not None and name == "flow":
        raise UserError(f"--clip {args.clip} is an option of ddim and ddpm, not of flow.")
    if name == "flow" and not (args.steps.isdecimal() and int(args.steps) > 0):
        raise UserError(f"--steps {args.steps}: flow takes a positive number.")
    return sampling.checkpoint_sampler(
        checkpoint, args.steps, walk=name, eta=args.eta, clip=args.clip
    )


def own_walk_text(args: argparse.Namespace, checkpoint: checkpoints.Checkpoint) -> str | None:
    """Returns in words what of the checkpoint's own scheduler is walked, None without one."""
    text = sampling.sampler_text(checkpoint)
    if text is None:
        return None
    changes = [f"--sampler {args.sampler}"] if args.sampler is not None else []
    changes += [] if args.steps.isdecimal() else [f"--steps {args.steps}"]
    changes += [] if args.clip is None else [f"--clip {args.clip:g}"]
    ending = f"; changed by {', '.join(changes)}" if changes else ""
    return f"sampling as the checkpoint's scheduler says: {text}{ending}"


def check_pictures(args: argparse.Namespace, checkpoint: checkpoints.Checkpoint) -> None:
    """Raises `UserError` if a picture is asked of latents that nothing decodes."""
    if is_latent(checkpoint) and args.out.suffix == ".png":
        raise UserError(
            f"the model's {checkpoint.model.sample_shape()[-1]} channels are latents and {args.checkpoint} "
            "holds no autoencoder; give --vae CHECKPOINT, or --out latents.npz."
        )


def is_latent(checkpoint: checkpoints.Checkpoint) -> bool:
    return checkpoint.vae is None and checkpoint.model.sample_shape()[-1] not in (1, 3)


def check_finite(images: np.ndarray) -> None:
    """Raises `UserError` if a sample is not a finite number everywhere."""
    bad = int((~np.isfinite(images).all(axis=(1, 2, 3))).sum())
    if bad:
        raise UserError(f"{bad} of {len(images)} samples are not finite; nothing was written.")


def write(
    args: argparse.Namespace,
    checkpoint: checkpoints.Checkpoint,
    images: np.ndarray,
    label: np.ndarray,
) -> None:
    """Writes the grid with its captions, or the archive with its labels."""
    if is_latent(checkpoint):
        media.save_arrays(args.out, latents=images, label=label)
    elif args.out.suffix == ".npz":
        media.save_npz(args.out, images, label=label)
    else:
        names = checkpoint.metadata.get("id2label", {})
        captions = [str(names.get(str(i), i)).partition(",")[0] for i in label]
        scale = -(-SMALLEST_CELL // images.shape[1])
        media.save_grid(args.out, images, columns=args.columns, labels=captions, scale=scale)
