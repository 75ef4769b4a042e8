"""`qdit sample`: pictures from a checkpoint, full precision or quantized."""

from __future__ import annotations

import argparse
import dataclasses
import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qdit_jax.cli.first_frames_option import add_first_frames, first_frames_of
from qdit_jax.cli.numerics_option import (
    add_dtype,
    add_expand,
    add_hoist,
    add_numerics,
    note_if_slow,
)
from qdit_jax.cli.options import (
    LARGEST_COUNT,
    AddArgument,
    SubParsers,
    positive_int,
    refuse_inert,
    seed_number,
    verb_parser,
)
from qdit_jax.cli.paths import path_option
from qdit_jax.cli.process import Process, add_process
from qdit_jax.cli.processes_option import add_processes, share_text
from qdit_jax.cli.prompts_option import CLIPS, Inputs, add_embeds, add_size
from qdit_jax.errors import UserError
from qdit_jax.files import AnyPath

if TYPE_CHECKING:  # help is printed without them
    import numpy as np

    from qdit_jax.checkpoint import Checkpoint
    from qdit_jax.evaluation import SampleFile
    from qdit_jax.processes import Processes
    from qdit_jax.types import Condition

HELP = """\
Sample images, videos or latents from a full-precision or quantized checkpoint. A run that was stopped
resumes: finished batches are kept beside OUT, in the folder .OUT.unfinished.

Networks that take prompts need --embeds, an .npz of prepared conditions (`qdit embed-text`, or your
own), or --prompt with --text-encoders.
"""
EXAMPLE = """examples:
  qdit sample ckpt_dir --labels 207,360 --steps 50 --guidance 1.5 --seed 0 --out grid.png
  qdit sample ckpt_dir --num-samples 10000 --sampler ddpm --steps 250 --out samples.npz
  qdit sample pixart --embeds prompts.npz --size 1024x1024 --out grid.png
  qdit sample wan --embeds prompts.npz --prompts-from 0-3 --size 480x832 --frames 81 --out clip.gif
  qdit sample wan5b --embeds prompts.npz --first-frames picture.npz --out clip.mp4
  qdit sample ckpt_dir --num-samples 50000 --out samples.npz --distributed    # on every host
  qdit sample pixart --prompt "a cat" --text-encoders PixArt-XL-2-512x512/
"""
WHOLE = re.compile("[0-9]+")
DEFAULT_COUNT = 8


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
    add_output(add)
    add_conditions(add)
    add(
        "--num-samples",
        type=positive_int,
        help="number of samples (default: one per label or prompt, else 8)",
    )
    add_size(add)
    add_first_frames(add)
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
    add(
        "--shard-tokens",
        type=positive_int,
        default=1,
        metavar="N",
        help="devices that share each sample: each holds its part of the activations, for samples longer "
        "than one device's memory; N divides the devices, and the tokens (%(default)s)",
    )
    add_numerics(
        add,
        "simulated",
        "arithmetic of quantized layers: simulated computes in float with the quantized values; "
        "integer multiplies the stored codes and scales the result, which needs quantized inputs "
        "(%(default)s)",
    )
    add_dtype(add)
    add_expand(add)
    add_hoist(add)
    add("--vae", type=path_option, help="a converted autoencoder, for checkpoints without one")
    add_processes(parser)
    parser.set_defaults(run=run, resumes=lambda args: True)


def add_output(add: AddArgument) -> None:
    """Adds the options of what is written."""
    add(
        "--out",
        type=path_option,
        default="grid.png",
        help="a .png of all samples (of videos, a row of frames each), an .npz with arr_0, uint8 [N, H, "
        "W, C] or [N, T, H, W, C], or a clip of videos: .gif, .mp4 (%(default)s)",
    )
    add(
        "--columns",
        type=positive_int,
        help="pictures per row of the .png, videos per row of a clip",
    )
    add("--force", action="store_true", help="replace OUT if it exists")


def add_conditions(add: AddArgument) -> None:
    """Adds the options of what is sampled."""
    add(
        "--labels",
        help="classes such as 207,360 or 0-9, cycled over the samples (default: all classes)",
    )
    add_embeds(add)
    add("--prompt", action="append", help="a prompt, embedded first; may be given several times")
    add(
        "--text-encoders",
        type=path_option,
        metavar="DIR",
        help="of --prompt: the diffusers folder whose text encoders embed it (needs the extra [text])",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Samples, decodes and writes; prints and returns what was written and how long it took."""
    from qdit_jax.checkpoint import dtype_of, with_expanded_weights
    from qdit_jax.cli.checkpoints import diffusion_checkpoint
    from qdit_jax.evaluation import SampleFile, with_autoencoder
    from qdit_jax.processes import ALONE
    from qdit_jax.sampling import guidance_record, guidance_text, sample_attention

    inputs = [args.checkpoint, args.vae, args.embeds, args.first_frames]
    check_output(args.out, args.columns, args.force, inputs)
    process = Process.of(vars(args))
    checkpoint = with_autoencoder(diffusion_checkpoint(args.checkpoint, args.dtype), args.vae)
    if args.expand == "load":
        checkpoint = with_expanded_weights(checkpoint)
    chosen = conditions_of(vars(args), checkpoint)
    job = SampleFile(
        checkpoint,
        process.sampler_of(checkpoint, chosen.shape),
        chosen.conditions,
        seed=args.seed,
        guidance=process.guidance_of(checkpoint.model),
        guidance_channels=process.channels,
        numerics=args.numerics,
        batch_size=args.batch_size,
        settings=process.settings,
        num_samples=args.num_samples or default_count(chosen.conditions),
        prompts=chosen.prompts,
        shape=chosen.shape,
        first_frames=first_frames_of(vars(args), checkpoint, chosen.shape),
        shard_tokens=args.shard_tokens,
        hoist=args.hoist,
    )
    check_job(job, args.out, args.columns)
    count = job.count
    if (text := process.scheduler_text(checkpoint)) is not None:
        print(text)
    processes = args.processes or ALONE
    if processes.is_first:
        note_if_slow([checkpoint], args.numerics)
    seconds = write_samples(job, vars(args), processes)
    settings = {
        "sampler": type(job.sampler).__name__,
        "steps": process.steps,
        "guidance": guidance_record(job.guidance),
        "seed": args.seed,
        "precision": precision(job),
        "dtype": dtype_of(checkpoint),
        "attention": sample_attention(
            checkpoint.model, checkpoint.params, job.shape, job.condition
        ),
    }
    print(
        share_text(processes, args.out)
        or f"{args.out}: {count} samples, {settings['sampler']} {process.steps} steps, "
        f"guidance {guidance_text(job.guidance)}, {settings['precision']} in {settings['dtype']}, {attention_text(settings)}{seconds:.1f} s with compilation."
    )
    named = {"prompts" if isinstance(chosen.conditions, Mapping) else "labels": labels_of(job)}
    found = {"out": args.out, "num_samples": count, **named}
    return {**found, **settings, "seconds_with_compilation": seconds}


def write_samples(job: SampleFile, options: Mapping[str, Any], processes: Processes) -> float:
    """Writes the samples, with a bar; returns how many seconds it took."""
    from qdit_jax.cli.progress import Bar

    start = time.perf_counter()
    given = {name: options[name] for name in ("columns", "force", "fps")}
    with Bar(job.count, "sample", "sampling", resumes=True) as bar:
        job.write(options["out"], **given, progress_fn=bar.tell, processes=processes)
    return time.perf_counter() - start


def conditions_of(options: Mapping[str, Any], checkpoint: Checkpoint) -> Inputs:
    """Returns what is sampled: labels, embeddings of a file or of prompts, or nothing; and its size.

    Raises:
        UserError: if options do not fit the network or each other.
    """
    import numpy as np

    path, model = options["checkpoint"], checkpoint.model
    classes = model.all_conditions()
    if classes is None:
        reason = f"{path} takes no class labels"
        refuse_inert(options, {"labels": None}, reason)
    if options["prompt"] or options["text_encoders"] is not None:
        from qdit_jax.cli.embed_run import embedded_prompts

        return embedded_prompts(options, checkpoint)
    found = Inputs.of(options, checkpoint, path)
    if found.conditions is not None or classes is None:
        return found
    given = (options["labels"], options["num_samples"])
    labels = chosen_labels(*given, len(np.asarray(classes)))
    model.check_condition(labels)
    return dataclasses.replace(found, conditions=labels)


def default_count(conditions: Condition) -> int:
    """Returns the number of samples if none is given."""
    from qdit_jax.sampling import num_conditions

    return num_conditions(conditions) or DEFAULT_COUNT


def check_job(job: SampleFile, out: AnyPath, columns: int | None) -> None:
    """Raises if the samples cannot be made, or not be written to `out`, before anything is computed."""
    from qdit_jax import sampling

    checkpoint, model = job.checkpoint, job.checkpoint.model
    is_video = len(model.sample_shape()) == 4
    if out.suffix in CLIPS and not is_video:
        raise UserError(f"--out {out}: this model makes images; give a name with .png or .npz.")
    if is_video and out.suffix == ".png":
        refuse_inert({"columns": columns}, {"columns": None}, "a .png of videos has a row for each")
    if job.is_latent and out.suffix != ".npz":
        if reason := getattr(model, "latents_only", None):
            raise UserError(f"--out {out}: {reason}; give --out latents.npz.")
        raise UserError(
            f"the model's {model.sample_shape()[-1]} channels are latents and the checkpoint "
            "holds no autoencoder; give --vae CHECKPOINT, or --out latents.npz."
        )
    denoise_fn = sampling.denoiser(model, checkpoint.params, job.guidance, job.guidance_channels)
    sampling.check_numerics(checkpoint.params, job.numerics)
    if job.hoist:
        sampling.check_hoisting(
            model,
            checkpoint.params,
            first_frames=job.first_frames,
            shard_tokens=job.shard_tokens,
        )
    sampling.check_takes(denoise_fn, model, job.shape, job.condition)


def check_output(
    out: AnyPath, columns: int | None, force: bool, inputs: list[AnyPath | None]
) -> None:
    """Raises `UserError` if what is to be written cannot be."""
    from qdit_jax.files import check_free

    if out.suffix not in (".png", ".npz", *CLIPS):
        raise UserError(f"--out {out}: the name must end with .png or .npz, or for videos .gif.")
    if out.suffix in CLIPS:
        from qdit_jax.report import check_clip

        check_clip(out)
    if out.suffix == ".npz":
        refuse_inert({"columns": columns}, {"columns": None}, "an .npz has no grid")
    check_free(out, force, "samples" if out.suffix == ".npz" else "picture", inputs)


def labels_of(job: SampleFile) -> list[Any]:
    """Returns what the samples were made from: classes, or the texts of prompts, or their rows."""
    named = job.named()
    found = named.get("label", named.get("prompts", named.get("row")))
    return [] if found is None else found.tolist()


def precision(job: SampleFile) -> str:
    """Returns how the numbers were computed and by what, in words."""
    from qdit_jax.checkpoint import dtype_of
    from qdit_jax.kernels import implementations_used
    from qdit_jax.sampling import on_one_device, sample_rows

    checkpoint, numerics = job.checkpoint, job.numerics
    if checkpoint.recipe is None:
        return "full precision"
    rows = sample_rows(checkpoint.model, job.shape, job.condition)
    dtype = dtype_of(checkpoint)
    with on_one_device():  # as each of them computes
        used = implementations_used(checkpoint.params, numerics, dtype=dtype, rows=rows)
    names = ", ".join(f"{name} ({count} layers)" for name, count in used.items())
    return f"quantized, {numerics} numerics" + (f" by {names}" if names else "")


def attention_text(settings: Mapping[str, Any]) -> str:
    """Returns who computed attention, for a line; nothing of a network without."""
    used = settings["attention"]
    names = ", ".join(name if len(used) == 1 else f"{name} {n}" for name, n in used.items())
    return f"attention by {names}, " if names else ""


def chosen_labels(text: str | None, num_samples: int | None, num_classes: int) -> np.ndarray:
    """Returns one label per sample: those of `text`, or all classes, repeated cyclically.

    Raises:
        UserError: if `text` is not a list of numbers and ranges, or one is beyond the null class.
    """
    import numpy as np

    if text is None:
        return np.arange(num_samples or DEFAULT_COUNT) % num_classes
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
