"""What `qdit sample` does with its options."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax.errors import ScopeParamShapeError
from tqdm import tqdm

from qdit_jax import checkpoint as checkpoints
from qdit_jax import diffusion, sampling
from qdit_jax.cli.sample_shards import (
    check_room,
    fingerprint,
    make_shards,
    unfinished_folder,
)
from qdit_jax.errors import UserError
from qdit_jax.evaluation import first_samples, merge
from qdit_jax.files import AnyPath, check_free
from qdit_jax.models import AutoencoderKL
from qdit_jax.report import media

SMALLEST_CELL = 64  # pixels; smaller pictures are enlarged in a grid


def run_sample(args: argparse.Namespace) -> None:
    """Samples, decodes and writes; prints what was made and how long it took.

    Raises:
        UserError: on options that do not fit the checkpoint or each other.
    """
    check_output(args)
    checkpoint = checkpoints.load(args.checkpoint)
    if not hasattr(checkpoint.model, "velocity"):
        kind = type(checkpoint.model).__name__
        raise UserError(f"{args.checkpoint} holds a {kind}, which makes no pictures by itself.")
    if args.vae is not None:
        checkpoint = dataclasses.replace(checkpoint, vae=checkpoints.load(args.vae))
    label = chosen_labels(args.labels, args.num_samples, checkpoint.model.num_classes)
    sampler = chosen_sampler(args, checkpoint)
    check_pictures(args, checkpoint)
    sampling.checked_labels(checkpoint.model, label)
    # What these refuse shows before anything is computed.
    sampling.denoiser(checkpoint.model, checkpoint.params, args.guidance, args.guidance_channels)
    shape = image_shape(args, checkpoint)
    check_room(args.out, shape, len(label), 4 if is_latent(checkpoint) else 1)
    start = time.perf_counter()
    with (
        unfinished_folder(args.out) as folder,
        tqdm(total=len(label), unit="sample", file=sys.stderr) as bar,
    ):
        ranges = make_shards(
            folder,
            batches_of(args, checkpoint, sampler, label),
            settings_of(args, checkpoint, sampler, label),
            bar.update,
            latents=is_latent(checkpoint),
            force=args.force,
        )
        write(args, checkpoint, folder, ranges, label)
    seconds = time.perf_counter() - start
    print(
        f"{args.out}: {len(label)} samples, {type(sampler).__name__} {args.steps} steps, "
        f"guidance {args.guidance:g}, {precision(checkpoint, args.execution)}, {seconds:.1f} s."
    )


def check_output(args: argparse.Namespace) -> None:
    """Raises `UserError` if what is to be written, or how many, cannot be."""
    if args.out.suffix not in (".png", ".npz"):
        raise UserError(f"--out {args.out}: the name must end with .png or .npz.")
    kind = "picture" if args.out.suffix == ".png" else "samples"
    check_free(args.out, args.force, kind, [args.checkpoint, args.vae])
    if args.num_samples is not None and args.num_samples < 1:
        raise UserError(f"--num-samples {args.num_samples}: use a positive number.")
    if args.columns is not None and args.columns < 1:
        raise UserError(f"--columns {args.columns}: use a positive number.")
    if args.columns is not None and args.out.suffix == ".npz":
        raise UserError(f"--columns {args.columns} is of a grid, and --out {args.out} is none.")
    try:
        jax.random.key(args.seed)
    except (OverflowError, ValueError, TypeError) as error:
        raise UserError(f"--seed {args.seed}: {error}.") from None


def image_shape(args: argparse.Namespace, checkpoint: checkpoints.Checkpoint) -> tuple[int, ...]:
    """Returns the shape of one sample, an image or a latent.

    Raises:
        UserError: if the autoencoder is none, or not of the model's latents.
    """
    shape = sampling.latent_shape(checkpoint.model)
    vae = checkpoint.vae
    if vae is None:
        return shape
    where = args.checkpoint if args.vae is None else f"--vae {args.vae}"
    if not isinstance(vae.model, AutoencoderKL):
        raise UserError(f"{where} holds a {type(vae.model).__name__}, which is no autoencoder.")
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
        guidance_channels=args.guidance_channels,
        execution=args.execution,
    )


def settings_of(
    args: argparse.Namespace,
    checkpoint: checkpoints.Checkpoint,
    sampler: diffusion.Sampler,
    label: np.ndarray,
) -> dict[str, Any]:
    """Returns what decides every sample, in JSON's types; a batch size of None is open."""
    size = args.batch_size
    return {
        **fingerprint(checkpoint, sampler, label),
        "steps": args.steps,
        "eta": args.eta,
        "clip": args.clip,
        "guidance": args.guidance,
        "guidance_channels": args.guidance_channels or "all",
        "seed": args.seed,
        "execution": args.execution,
        "batch_size": None if size is None else sampling.checked_batch_size(len(label), size),
    }


def precision(checkpoint: checkpoints.Checkpoint, execution: str) -> str:
    """Returns how the numbers were computed, in words."""
    return "full precision" if checkpoint.recipe is None else f"quantised, {execution} execution"


def chosen_labels(text: str | None, num_samples: int | None, num_classes: int) -> np.ndarray:
    """Returns one label a sample: those of `text`, or all classes, in turn.

    Raises:
        UserError: if `text` is no list of numbers and ranges.
    """
    if text is None:
        return np.arange(num_samples or 8) % num_classes
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(
                f"--labels {text}: {part!r} is no class; use numbers such as 207,360 or 0-9."
            )
        found += range(int(first), int(last or first) + 1)
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
    model = checkpoint.model
    name = args.sampler or ("flow" if model.velocity else "ddim")
    if model.velocity != (name == "flow"):
        kind, fitting = ("a velocity", "flow") if model.velocity else ("noise", "ddim or ddpm")
        raise UserError(f"--sampler {name}: this model predicts {kind}; use {fitting}.")
    if args.eta and name != "ddim":
        raise UserError(f"--eta {args.eta} is an option of ddim, not of {name}.")
    if name == "flow":
        if not args.steps.isdecimal() or int(args.steps) < 1:
            raise UserError(f"--steps {args.steps}: flow takes a positive number.")
        return diffusion.flow(int(args.steps))
    options = {"schedule": sampling.trained_schedule(checkpoint.metadata), "clip": args.clip}
    if name == "ddim":
        return diffusion.ddim(args.steps, args.eta, **options)
    variance_fn = diffusion.learned_range if model.learn_sigma else diffusion.fixed_large
    return diffusion.ddpm(args.steps, variance_fn=variance_fn, **options)


def check_pictures(args: argparse.Namespace, checkpoint: checkpoints.Checkpoint) -> None:
    """Raises `UserError` if a picture is asked of latents that nothing decodes."""
    if is_latent(checkpoint) and args.out.suffix == ".png":
        raise UserError(
            f"the model's {checkpoint.model.in_channels} channels are latents and {args.checkpoint} "
            "holds no autoencoder; give --vae CHECKPOINT, or --out latents.npz."
        )


def is_latent(checkpoint: checkpoints.Checkpoint) -> bool:
    return checkpoint.vae is None and checkpoint.model.in_channels not in (1, 3)


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
    media.save_grid(args.out, images, columns=args.columns, labels=captions, scale=scale)
