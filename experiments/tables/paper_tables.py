"""Measures methods x bits on several states of a model: one command, resumable.

    python experiments/tables/paper_tables.py --out runs/tables
    python experiments/tables/paper_tables.py --out runs/tables --dry-run
    python experiments/tables/paper_tables.py --out runs/text --states text --num-samples 64 --seeds 0
    python experiments/tables/paper_tables.py --out runs/video --states video --num-samples 64 \\
        --seeds 0 --guidance 2.5 --methods rtn gptq smoothquant svdquant best --bits w8a8 w4a8 w4a4
    python experiments/tables/paper_tables.py --out runs/xl2 --checkpoint xl2=xl2 --vae vae \\
        --num-samples 10000 --seeds 0 --steps 100 --group-size 128 \\
        --reference VIRTUAL_imagenet256_labeled.npz --features inception inception_ckpt

Without --checkpoint the states are those of the packaged digit model: `as_trained`, `injected` with
outlier channels, `finetuned` with them (the packaged one), and `mixed`, whose outliers lie in no
single channel (`mix_outliers.py`). With a checkpoint of yours, a reference and Inception weights, the
command runs the papers' protocol; --vae is the autoencoder of a checkpoint without one, as a published
`.pt` is. A method is a name of `qdit methods`, or `name:G` with groups of G
channels (0: one scale per output channel); a method's own group size comes before --group-size.

`--states text` and `video` are the packaged models under captions and of moving digits; a checkpoint
that takes prompts wants their embeddings, --embeds. Where the network of features does not know the
pictures, only closeness is measured; of videos the flicker error too.

Every cell is a file in OUT/cells; a cell that is there is not computed again. Paired measures hold
each sample against full precision from the same noise and condition; intervals are over samples and
seeds (95 % bootstrap). Times are those of a busy or free machine as it was: compare within one run.
Writes tables.json, tables.md and tables.png; every cell says when, where and with which versions it was made. --dry-run measures one short rollout and prints how many
cells are left, about how long their sampling takes, without quantizing, decoding and scoring, and
what they hold in memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from paper_report import write_report
from table_states import DIGITS, STATES, State, states_of

import qdit_jax as qdit
from qdit_jax import metrics
from qdit_jax.calibration import Items, default_sampler
from qdit_jax.checkpoint import Checkpoint
from qdit_jax.evaluation import Judge, Scoring, reference_path, sample_shape
from qdit_jax.methods import METHODS, CalibrationData, method_named
from qdit_jax.recipes import Recipe
from qdit_jax.report import provenance, to_uint8
from qdit_jax.sampling import cyclic_conditions, decode

BITS = ("w8a8", "w6a8", "w4a8", "w4a4", "w3a8")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of the table: a method and, where it has none of its own, a group size."""

    method: str
    group_size: int

    @classmethod
    def of(cls, text: str, group_size: int) -> Entry:
        """Returns the entry that `name` or `name:G` means."""
        name, _, size = text.partition(":")
        return cls(
            name, int(size) if size else method_named(name).settings.get("group_size", group_size)
        )

    @property
    def title(self) -> str:
        return f"{self.method}, " + (f"g{self.group_size}" if self.group_size else "per channel")

    def recipe(self, bits: str, checkpoint: Checkpoint) -> Recipe | None:
        """Returns the recipe; None if the method has no such bits."""
        method = method_named(self.method)
        if method.settings.get("weight_format") and not bits.startswith("w4"):
            return None
        return method.preset(bits, checkpoint.params, group_size=self.group_size)


@dataclasses.dataclass(frozen=True)
class Bed:
    """One state of a model, with what its cells are held against."""

    name: str
    checkpoint: Checkpoint
    conditions: Any
    items: Items
    full: dict[int, np.ndarray]  # final latents of full precision, by seed


def latents(
    checkpoint: Checkpoint, conditions: Any, args: argparse.Namespace, seed: int
) -> np.ndarray:
    """Returns the final latents of all samples of one seed."""
    return qdit.generate(
        checkpoint,
        default_sampler(checkpoint, args.steps),
        cyclic_conditions(checkpoint.model, conditions, np.arange(args.num_samples)),
        seed=seed,
        guidance=args.guidance,
        batch_size=args.batch_size,
        decode_fn=None,
    )


def bed_of(name: str, state: State, args: argparse.Namespace) -> Bed:
    """Returns a state with its calibration items and its samples in full precision, kept on disk."""
    checkpoint = state.read()
    folder = args.out / "beds" / name
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "items.npz").exists():
        qdit.collect_items(
            checkpoint,
            jax.random.key(1000),
            args.num_items,
            conditions=state.conditions,
            sampler=default_sampler(checkpoint, args.steps),
            guidance=args.guidance,
        ).save(folder / "items.npz")
    full = {}
    for seed in args.seeds:
        file = folder / f"{args.num_samples}x{args.steps}-{seed}.npy"
        if not file.exists():
            partial = file.with_suffix(".partial.npy")
            np.save(partial, latents(checkpoint, state.conditions, args, seed))
            partial.rename(file)
        full[seed] = np.load(file)
    return Bed(name, checkpoint, state.conditions, Items.load(folder / "items.npz"), full)


def images_of(checkpoint: Checkpoint, final: np.ndarray, batch_size: int) -> np.ndarray:
    """Returns latents as images, uint8."""
    if checkpoint.vae is None:
        return to_uint8(final)
    starts = range(0, len(final), batch_size)
    parts = (decode(checkpoint.vae, jnp.asarray(final[i : i + batch_size])) for i in starts)
    return np.concatenate([to_uint8(np.asarray(part)) for part in parts])


def scored(judge: Judge, images: np.ndarray, folder: Path) -> tuple[float, np.ndarray]:
    """Returns the Fréchet distance to the reference, and every image's features of length 1."""
    file = folder / "scored.npz"
    np.savez(file, images)
    features = judge.features_of(file, "scored", lambda batches, count, name: batches)
    distance = metrics.scores(features, judge.reference, None, judge.settings)["frechet_distance"]
    file.unlink()
    pool = features.pool / np.maximum(np.linalg.norm(features.pool, axis=1, keepdims=True), 1e-12)
    return float(distance), pool


def full_precision_cell(bed: Bed, judge: Judge | None, args: argparse.Namespace) -> dict[str, Any]:
    """Returns what full precision itself scores, seed by seed."""
    found: dict[str, Any] = {
        "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(bed.checkpoint.params)),
    }
    if judge is not None:
        found["frechet_distance"] = [
            scored(judge, images_of(bed.checkpoint, bed.full[seed], args.batch_size), args.out)[0]
            for seed in args.seeds
        ]
    return found


def cell(
    bed: Bed, entry: Entry, bits: str, judge: Judge | None, args: argparse.Namespace
) -> dict[str, Any]:
    """Returns the measures of one method at one precision on one state."""
    began = time.perf_counter()
    data = CalibrationData(items=bed.items, batch_size=args.batch_size)
    recipe = entry.recipe(bits, bed.checkpoint)
    quantized = qdit.quantize(bed.checkpoint, entry.method, recipe, data=data)
    jax.block_until_ready(quantized.params)
    seconds = time.perf_counter() - began
    finals = {seed: latents(quantized, bed.conditions, args, seed) for seed in args.seeds}
    found: dict[str, Any] = {"closeness_db": closeness(bed.full, finals)}
    if finals[args.seeds[0]].ndim == 5:
        found["flicker_error"] = flicker(bed.full, finals)
    if judge is not None:
        found |= scores_of(bed, quantized, judge, finals, args)
    return found | {
        "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(quantized.params)),
        "seconds_to_quantize": seconds,
        "notes": quantized.metadata["quantization"]["notes"],
        "transforms": quantized.metadata["quantization"].get("transforms", {}),
    }


def closeness(full: dict[int, np.ndarray], finals: dict[int, np.ndarray]) -> dict[str, float]:
    """Returns the signal to error in dB over all samples of all seeds, with its interval."""
    ratios = [metrics.signal_to_noise_db(full[seed], final) for seed, final in finals.items()]
    return dataclasses.asdict(metrics.bootstrap_interval(np.concatenate(ratios)))


def flicker(full: dict[int, np.ndarray], finals: dict[int, np.ndarray]) -> dict[str, float]:
    """Returns how much of the change between frames is wrong, with its interval."""
    seen = [[np.clip(of[seed], -1, 1) for of in (full, finals)] for seed in finals]
    errors = np.concatenate([metrics.flicker_error(*pair) for pair in seen])
    return dataclasses.asdict(metrics.bootstrap_interval(errors))


def scores_of(
    bed: Bed,
    quantized: Checkpoint,
    judge: Judge,
    finals: dict[int, np.ndarray],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Returns the distance to the reference by seed, and that of paired features."""
    apart, distances = [], []
    for seed, final in finals.items():
        pairs = (images_of(quantized, x, args.batch_size) for x in (final, bed.full[seed]))
        (distance, ours), (_, theirs) = (scored(judge, images, args.out) for images in pairs)
        distances.append(distance)
        apart.append(np.square(ours - theirs).sum(axis=1))
    interval = dataclasses.asdict(metrics.bootstrap_interval(np.concatenate(apart)))
    return {"feature_distance": interval, "frechet_distance": distances}


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what a cell depends on beside its own name."""
    names = ("num_samples", "num_items", "seeds", "steps", "guidance", "reference", "features")
    found = {name: getattr(args, name) for name in names}
    return found if args.vae is None else found | {"vae": args.vae}


def estimate(states: Sequence[State], num_cells: int, args: argparse.Namespace) -> str:
    """Returns about how long the cells that are left take, from one short rollout."""
    checkpoint, conditions = states[0].read(), states[0].conditions
    few = argparse.Namespace(**{**vars(args), "num_samples": args.batch_size, "steps": 2})
    latents(checkpoint, conditions, few, 0)
    began = time.perf_counter()
    latents(checkpoint, conditions, few, 0)
    each = (time.perf_counter() - began) / (2 * args.batch_size)
    seconds = num_cells * each * args.num_samples * args.steps * len(args.seeds)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(checkpoint.params))
    shape = checkpoint.model.sample_shape()
    held = 2 * size + (3 * args.num_samples * len(args.seeds)) * 4 * int(np.prod(shape))
    return (
        f"{num_cells} cells are left: about {seconds / 3600:.1f} h of sampling on this machine; "
        "quantizing, and decoding and scoring, are not in that time; "
        f"{held / 1e9:.2f} GB for parameters and latents"
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/tables"))
    parser.add_argument(
        "--checkpoint",
        action="append",
        metavar="NAME=PATH",
        help="a full-precision checkpoint folder in place of the packaged states; repeatable",
    )
    parser.add_argument("--states", nargs="+", choices=STATES, default=DIGITS)
    parser.add_argument("--embeds", help="embeddings of prompts (.npz), of --checkpoint")
    parser.add_argument("--vae", help="a converted autoencoder, for a --checkpoint without one")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="NAME[:G]")
    parser.add_argument("--bits", nargs="+", default=list(BITS))
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--num-samples", type=int, default=1000, help="per seed")
    parser.add_argument("--num-items", type=int, default=64, help="trajectories to calibrate on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--reference", default="demo", help="an .npz of images or statistics")
    parser.add_argument("--features", nargs="+", default=["demo"], help="demo, or inception CKPT")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.vae is not None and not args.checkpoint:
        parser.error(f"--vae {args.vae} has no effect: it goes with --checkpoint")
    return args


def main() -> None:
    args = parse_args()
    (args.out / "cells").mkdir(parents=True, exist_ok=True)
    states = states_of(args)
    entries = [Entry.of(text, args.group_size) for text in args.methods]
    kept = args.out / "settings.json"
    settings = json.loads(json.dumps(settings_of(args)))
    if kept.exists() and json.loads(kept.read_text()) != settings:
        raise SystemExit(f"{args.out} holds cells of other settings ({kept}); use another --out.")
    kept.write_text(json.dumps(settings, indent=1))
    files = {
        (name, entry, bits): args.out
        / "cells"
        / f"{name}-{entry.method}-{entry.group_size}-{bits}.json"
        for name in states
        for bits in args.bits
        for entry in entries
    }
    left = [key for key, file in files.items() if not file.exists()]
    for name in dict.fromkeys(name for name, _, _ in left):
        check_images(name, states[name], args.reference)
    if args.dry_run:
        print(estimate(list(states.values()), len(left), args))
        return
    few = metrics.ScoreSettings(min_samples=2)
    scoring = Scoring(
        args.reference, tuple(args.features), settings=few, batch_size=args.batch_size
    )
    beds: dict[str, Bed] = {}
    for i, key in enumerate(left):
        name, entry, bits = key
        if name not in beds:
            beds = {name: bed_of(name, states[name], args)}
            shape = beds[name].full[args.seeds[0]].shape
            judge = None
            if states[name].scored and len(shape) == 4:
                judge = scoring.judge(image_shape(beds[name].checkpoint, shape), name)
            own = args.out / "cells" / f"{name}-full.json"
            of_full = {"made": provenance(), **full_precision_cell(beds[name], judge, args)}
            own.write_text(json.dumps(of_full))
        if entry.recipe(bits, beds[name].checkpoint) is None:
            continue
        found = {"made": provenance(), **cell(beds[name], entry, bits, judge, args)}
        jax.clear_caches()  # else a long run holds the programs of all cells
        partial = files[key].with_suffix(".partial")
        partial.write_text(json.dumps(found))
        partial.rename(files[key])
        near = found["closeness_db"]
        print(
            f"{i + 1}/{len(left)} {name} {bits} {entry.title}: {near['estimate']:.1f} dB",
            flush=True,
        )
    rows = [
        {"state": name, "bits": bits, "method": entry.title, **json.loads(file.read_text())}
        for (name, entry, bits), file in files.items()
        if file.exists()
    ]
    full = {name: json.loads((args.out / f"cells/{name}-full.json").read_text()) for name in states}
    write_report(args.out, {"made": provenance(), "settings": settings, "full": full, "rows": rows})


def check_images(name: str, state: State, reference: str) -> None:
    """Raises `SystemExit` if a state that is scored makes no pictures, or others than the reference.

    That is found before the first sample; a network without its autoencoder makes latents.
    """
    if not state.scored or len(shape := sample_shape(state.read())) != 3:
        return
    path = reference_path(reference)
    known = metrics.read_reference(path).has_images
    needed = metrics.image_shape(path)[-1:] if known else (1, 3)
    if shape[-1] not in needed:
        raise SystemExit(
            f"{name} makes samples of {shape[-1]} channels, and --reference {reference} needs images of "
            f"{' or '.join(map(str, needed))}: give the autoencoder that the model was trained with, "
            "--vae FOLDER (`qdit convert sd-vae-ft-mse/ FOLDER`)."
        )


def image_shape(checkpoint: Checkpoint, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of all images that latents of `shape` decode to."""
    one = images_of(checkpoint, np.zeros((1, *shape[1:]), np.float32), 1)
    return (shape[0], *one.shape[1:])


if __name__ == "__main__":
    main()
