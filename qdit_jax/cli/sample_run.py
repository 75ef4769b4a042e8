"""What `qdit sample` does with its options."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax.errors import ScopeParamShapeError

from qdit_jax import checkpoint as checkpoints
from qdit_jax import diffusion, report, sampling
from qdit_jax.cli.checkpoints import diffusion_checkpoint, with_autoencoder
from qdit_jax.cli.options import LARGEST_COUNT, refuse_inert
from qdit_jax.cli.progress import Bar
from qdit_jax.cli.sample_shards import (
    check_room,
    make_shards,
    unfinished_folder,
)
from qdit_jax.errors import UserError
from qdit_jax.evaluation import first_samples, merge
from qdit_jax.files import AnyPath, check_free
from qdit_jax.kernels import implementations_used
from qdit_jax.models import rows_per_sample

WHOLE = re.compile("[0-9]+")
SMALLEST_CELL = 64  # pixels; smaller pictures are enlarged in a grid


def run_sample(args: argparse.Namespace) -> dict[str, Any]:
    """Samples, decodes and writes; prints what was made and how long it took, and returns it.

    Raises:
        UserError: on options that do not fit the checkpoint or each other.
    """
    check_output(args)
    checkpoint = with_autoencoder(diffusion_checkpoint(args.checkpoint), args.vae)
    classes = checkpoint.model.all_conditions()
    label = chosen_labels(args.labels, args.num_samples, len(classes))
    sampler = chosen_sampler(args, checkpoint)
    walk = own_walk_text(args, checkpoint)
    channels = chosen_channels(args)
    check_pictures(args, checkpoint)
    checkpoint.model.check_condition(label)
    # What these refuse shows before anything is computed.
    sampling.denoiser(checkpoint.model, checkpoint.params, args.guidance, channels)
    sampling.check_numerics(checkpoint.params, args.numerics)
    shape = image_shape(args, checkpoint)
    check_room(args.out, shape, len(label), 4 if is_latent(checkpoint) else 1)
    if walk is not None:
        print(walk)
    start = time.perf_counter()
    with (
        unfinished_folder(args.out) as folder,
        Bar(args, len(label), "sample", "sampling", resumes=True) as bar,
    ):
        ranges = make_shards(
            folder,
            batches_of(args, checkpoint, sampler, label, channels),
            settings_of(args, checkpoint, sampler, label),
            bar.update,
            latents=is_latent(checkpoint),
            force=args.force,
        )
        write(args, checkpoint, folder, ranges, label)
    seconds = time.perf_counter() - start
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


def check_output(args: argparse.Namespace) -> None:
    """Raises `UserError` if what is to be written cannot be."""
    if args.out.suffix not in (".png", ".npz"):
        raise UserError(f"--out {args.out}: the name must end with .png or .npz.")
    if args.out.suffix == ".npz":
        refuse_inert(args, {"columns": None}, "an .npz has no grid")
    kind = "picture" if args.out.suffix == ".png" else "samples"
    check_free(args.out, args.force, kind, [args.checkpoint, args.vae])


def image_shape(args: argparse.Namespace, checkpoint: checkpoints.Checkpoint) -> tuple[int, ...]:
    """Returns the shape of one sample, an image or a latent.

    Raises:
        UserError: if the autoencoder is not of the model's latents.
    """
    shape = checkpoint.model.sample_shape()
    vae = checkpoint.vae
    if vae is None:
        return shape
    where = args.checkpoint if args.vae is None else f"--vae {args.vae}"
    try:
        latents = jax.ShapeDtypeStruct((1, *shape), np.float32)
        return jax.eval_shape(lambda z: sampling.decode(vae, z), latents).shape[1:]
    except (TypeError, ValueError, ScopeParamShapeError) as error:
        raise UserError(
            f"{where} decodes other latents than the {shape[-1]} channels of {args.checkpoint}: give "
            f"the autoencoder that the model was trained with ({str(error).splitlines()[0][:120]})."
        ) from None


def batches_of(
    args: argparse.Namespace,
    checkpoint: checkpoints.Checkpoint,
    sampler: diffusion.Sampler,
    label: np.ndarray,
    channels: int | str | None,
) -> Callable[[list[int], int], Iterator[tuple[int, np.ndarray]]]:
    """Returns the function that makes batches, see `sampling.generated_batches`."""
    return lambda starts, size: sampling.generated_batches(
        checkpoint,
        sampler,
        label,
        starts,
        batch_size=size,
        seed=args.seed,
        guidance=args.guidance,
        guidance_channels=channels,
        numerics=args.numerics,
    )


def settings_of(
    args: argparse.Namespace,
    checkpoint: checkpoints.Checkpoint,
    sampler: diffusion.Sampler,
    label: np.ndarray,
) -> dict[str, Any]:
    """Returns what decides every sample, in JSON's types; a batch size of None is open."""
    size, vae = args.batch_size, checkpoint.vae
    return {
        **checkpoints.fingerprint(
            model=(checkpoint.model, checkpoint.params),
            vae=vae and (vae.model, vae.params),
            sampler=sampler,
            labels=label,
        ),
        "num_samples": len(label),
        "steps": args.steps,
        "eta": args.eta,
        "clip": args.clip,
        "guidance": args.guidance,
        "guidance_channels": args.guidance_channels or "all",
        "seed": args.seed,
        "numerics": args.numerics,
        "batch_size": None if size is None else sampling.checked_batch_size(len(label), size),
    }


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
    row = diffusion.sampler_named(name)
    if model.prediction not in row.predictions:
        raise UserError(f"--sampler {name}: {sampling.fitting_samplers(model)}")
    try:
        row.chosen(eta=args.eta or None)
    except ValueError as error:
        raise UserError(f"--eta {args.eta}: {error}") from None
    if "clip" not in row.options:
        refuse_inert(args, {"clip": None}, f"{name} predicts no data to clip")
    if not row.spacings and not (args.steps.isdecimal() and int(args.steps) > 0):
        raise UserError(f"--steps {args.steps}: {name} takes a positive number.")
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


def write(
    args: argparse.Namespace,
    checkpoint: checkpoints.Checkpoint,
    folder: AnyPath,
    ranges: list[tuple[int, int]],
    label: np.ndarray,
) -> None:
    """Writes the grid with its captions, or batch by batch the archive with its labels."""
    if args.out.suffix == ".npz":
        name, member = ("latents", "latents") if is_latent(checkpoint) else ("images", "arr_0")
        merge(folder, ranges, name, args.out, member, label=label)
        return
    images = first_samples(folder, ranges, "images", len(label))
    assert images is not None, "the batches of a grid hold images"
    names = checkpoint.metadata.get("id2label", {})
    captions = [str(names.get(str(i), i)).partition(",")[0] for i in label]
    scale = -(-SMALLEST_CELL // images.shape[1])
    report.save_grid(args.out, images, columns=args.columns, labels=captions, scale=scale)
