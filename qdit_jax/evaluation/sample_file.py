"""Samples to one file. Finished batches are kept in a folder beside it, so that a run resumes.

The folder is that of an evaluation (`store`): settings, and one archive per batch.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.errors import ScopeParamShapeError

from qdit_jax.checkpoint import Checkpoint, fingerprint
from qdit_jax.diffusion import Sampler
from qdit_jax.errors import UserError
from qdit_jax.evaluation.shared_run import (
    begun,
    held,
    meet_at_the_shards,
    shares,
    unless_unbegun_alone,
)
from qdit_jax.evaluation.store import first_samples, merge, open_run, write_shard
from qdit_jax.files import AnyPath, check_space, is_remote, remove_folder
from qdit_jax.processes import ALONE, Processes
from qdit_jax.report import CLIPS, FPS, frame_rows, is_video, save_clip, save_grid, to_uint8
from qdit_jax.sampling import (
    PUBLISHED,
    Guidance,
    checked_batch_size,
    chosen_guidance,
    decode,
    generated_batches,
    guidance_record,
    num_conditions,
    sample_count,
    shape_of_sample,
)
from qdit_jax.types import Condition, Progress, ProgressFn, untold

REMEDY = "use the same to resume, another --out, or --force to start from scratch"
SMALLEST_CELL = 64  # pixels; smaller pictures are enlarged in a grid


class NotFiniteError(UserError):
    """A network returned values that are not finite; the same run would return them again."""


@dataclasses.dataclass(frozen=True)
class SampleFile:
    """What to sample: everything that determines the samples.

    `settings` are recorded too in the unfinished folder; a run with other ones is not resumed.
    `condition` are labels, a dict of embeddings, or None of a network that takes none; they are
    assigned cyclically to `num_samples` samples, one per condition by default. `prompts` are texts for
    captions, one per condition. `shape` is that of one sample, the network's own by default.
    `batch_size` None takes that of an unfinished run, or the device's default. `first_frames` are latents
    that videos begin with; `shard_tokens` devices share each sample, and `hoist` computes modulation before the
    loop: see `sampling.generate`. These two change no value beyond rounding, and may differ when a run resumes.
    """

    checkpoint: Checkpoint
    sampler: Sampler
    condition: Condition
    seed: int = 0
    guidance: Guidance | None = PUBLISHED
    guidance_channels: int | str | None = PUBLISHED
    numerics: str = "simulated"
    batch_size: int | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    num_samples: int | None = None
    prompts: Sequence[str] | None = None
    shape: Sequence[int] | None = None
    first_frames: np.ndarray | None = None
    shard_tokens: int = 1
    hoist: bool | None = None

    @property
    def count(self) -> int:
        """How many samples there are."""
        return self.num_samples or sample_count(self.condition, None)

    @property
    def rows(self) -> np.ndarray:
        """The number of each sample's condition, `[N]`."""
        return np.arange(self.count) % (num_conditions(self.condition) or self.count)

    @property
    def is_latent(self) -> bool:
        """Whether samples are latents that nothing here decodes."""
        checkpoint = self.checkpoint
        return checkpoint.vae is None and checkpoint.model.sample_shape()[-1] not in (1, 3)

    def write(
        self,
        out: AnyPath,
        *,
        columns: int | None = None,
        fps: float | int | None = None,
        force: bool = False,
        progress_fn: ProgressFn = untold,
        processes: Processes = ALONE,
    ) -> None:
        """Samples and writes `out`: a `.png` grid with captions, an `.npz` archive, or a clip.

        A grid of videos has a row of frames per video; a clip is a `.gif`, or an `.mp4` where the package
        for it is installed.

        A run that was stopped resumes from the folder `.NAME.unfinished`, removed on success.

        Args:
            columns: pictures per row of the grid, videos per row of a clip.
            fps: frames per second of a clip.
            force: start from scratch if the folder holds a run with other settings.
            progress_fn: called with the number of samples just done, first with those on disk.
            processes: that sample, each every so-many-th batch on its own devices; the first one
                writes `out`, on a disk that all see.

        Raises:
            UserError: if the folder holds another run and `force` is off, a sample is not finite,
                or the disk is too small.
        """
        itemsize = 4 if self.is_latent else 1
        shape = sample_shape(self.checkpoint, self.shape)
        check_room(out, shape, self.count, itemsize)
        with unfinished_folder(out, processes) as folder:
            ranges = self.make_shards(folder, progress_fn, force=force, processes=processes)
            if processes.is_first:
                self.write_joined(out, folder, ranges, columns, fps)
            processes.meet("the file is written")

    def write_joined(
        self,
        out: AnyPath,
        folder: AnyPath,
        ranges: Sequence[tuple[int, int]],
        columns: int | None,
        fps: float | int | None,
    ) -> None:
        """Writes `out` from the shards in `folder`."""
        if out.suffix == ".npz":
            name, member = ("latents",) * 2 if self.is_latent else ("images", "arr_0")
            merge(folder, ranges, name, out, member, **self.named())
            return
        images = first_samples(folder, ranges, "images", self.count)
        assert images is not None, "the batches of a grid hold images"
        scale = -(-SMALLEST_CELL // images.shape[-3])
        labels: list[str] | None = self.captions()
        if out.suffix in CLIPS:
            save_clip(out, images, fps=fps or FPS, columns=columns, labels=labels, scale=scale)
            return
        if is_video(images):
            images, columns, labels = frame_rows(images, labels)
        save_grid(out, images, columns=columns, labels=labels, scale=scale)

    def named(self) -> dict[str, np.ndarray]:
        """Returns what stands beside the samples of an archive: labels, or the rows of prompts."""
        if self.condition is None:
            return {}
        if not isinstance(self.condition, Mapping):
            return {"label": np.asarray(self.condition)[self.rows]}
        texts = {} if self.prompts is None else {"prompts": np.array(self.prompts)[self.rows]}
        return {"row": self.rows, **texts}

    def captions(self) -> list[str]:
        """Returns the prompt or the class name of each sample, or its number."""
        if self.prompts is not None:
            return [self.prompts[i] for i in self.rows]
        if self.condition is None or isinstance(self.condition, Mapping):
            return [str(i) for i in self.rows]
        names = self.checkpoint.metadata.get("id2label", {})
        labels = np.asarray(self.condition)[self.rows]
        return [str(names.get(str(i), i)).partition(",")[0] for i in labels]

    def make_shards(
        self,
        folder: AnyPath,
        progress_fn: ProgressFn,
        *,
        force: bool,
        processes: Processes = ALONE,
    ) -> list[tuple[int, int]]:
        """Samples the batches that `folder` lacks and returns the range of samples of each."""
        count = self.count
        size = self.begun(folder, force, processes)["batch_size"]
        ranges, mine, done = shares(folder, count, size, processes)
        if done and processes.is_first:
            print(f"resuming from {done:,} of {count:,} samples", flush=True)
        if done or processes.are_several:
            progress_fn(Progress(done, total=done + sum(stop - start for start, stop in mine)))
        batches = generated_batches(
            self.checkpoint,
            self.sampler,
            self.condition,
            [start for start, _ in mine],
            batch_size=size,
            num_samples=count,
            seed=self.seed,
            guidance=self.guidance,
            guidance_channels=self.guidance_channels,
            numerics=self.numerics,
            shape=self.shape,
            first_frames=self.first_frames,
            shard_tokens=self.shard_tokens,
            hoist=self.hoist,
        )
        for start, images in batches:
            check_finite(images, start, count)
            kept = {"latents": images} if self.is_latent else {"images": to_uint8(images)}
            processes.check()
            write_shard(folder, start, kept)
            progress_fn(Progress(len(images)))
        meet_at_the_shards(folder, ranges, processes)
        return ranges

    def begun(self, folder: AnyPath, force: bool, processes: Processes = ALONE) -> dict[str, Any]:
        """Returns the settings of the run in `folder`: those of an earlier run, or these."""
        settings = self.all_settings()
        default = {"batch_size": checked_batch_size(self.count, None, self.shard_tokens)}

        def opened() -> dict[str, Any]:
            try:
                return open_run(folder, settings, default, REMEDY)
            except UserError:
                if not force:
                    raise
            remove_folder(folder, keep="lock")
            return open_run(folder, settings, default, REMEDY)

        return begun(folder, settings, default, processes, opened)

    def all_settings(self) -> dict[str, Any]:
        """Returns what determines every sample, in JSON's types; a batch size of None is open."""
        size, vae = self.batch_size, self.checkpoint.vae
        is_labels = not isinstance(self.condition, Mapping) and self.condition is not None
        conditions = np.asarray(self.condition)[self.rows] if is_labels else self.condition
        texts = None if self.prompts is None else list(self.prompts)
        return {
            **fingerprint(
                model=(self.checkpoint.model, self.checkpoint.params),
                vae=vae and (vae.model, vae.params),
                sampler=self.sampler,
                **{"labels" if is_labels else "conditions": conditions},
                **({} if texts is None else {"prompts": texts}),
                **({} if self.shape is None else {"shape": tuple(self.shape)}),
                **({} if self.first_frames is None else {"first_frames": self.first_frames}),
            ),
            **self.settings,
            "num_samples": self.count,
            "guidance": guidance_record(chosen_guidance(self.checkpoint.model, self.guidance)),
            "guidance_channels": self.guidance_channels or "all",
            "seed": self.seed,
            "numerics": self.numerics,
            "batch_size": None
            if size is None
            else checked_batch_size(self.count, size, self.shard_tokens),
        }


@contextmanager
def unfinished_folder(out: AnyPath, processes: Processes = ALONE) -> Iterator[AnyPath]:
    """Yields the folder of batches beside `out`, locked for this process, or for several.

    It is removed on success, and also if no batch was finished or a sample is not finite; of several
    processes only on success.
    """
    target = out if is_remote(out) else Path(os.path.realpath(out))
    folder = target.with_name(f".{target.name}.unfinished")
    with held(folder, processes), unless_unbegun_alone(folder, processes):
        try:
            yield folder
        except NotFiniteError:
            if not processes.are_several:
                remove_folder(folder)
            raise
    if processes.is_first:
        remove_folder(folder)


def sample_shape(
    checkpoint: Checkpoint, latents_shape: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Returns the shape of one sample: rows, columns and channels of an image or a latent.

    Videos have frames first. `latents_shape` is what the network samples, its own shape by default.

    Raises:
        ValueError: if the autoencoder does not fit the model's latents.
    """
    shape, vae = shape_of_sample(checkpoint.model, latents_shape), checkpoint.vae
    if vae is None:
        return shape
    try:
        latents = jax.ShapeDtypeStruct((1, *shape), np.float32)
        return jax.eval_shape(lambda z: decode(vae, z), latents).shape[1:]
    except (TypeError, ValueError, ScopeParamShapeError) as error:
        raise ValueError(
            f"the autoencoder decodes other latents than the {shape[-1]} channels of the model: "
            "give the one that the model was trained with "
            f"({str(error).splitlines()[0][:120]})."
        ) from None


def check_finite(images: np.ndarray, start: int, count: int) -> None:
    """Raises `NotFiniteError` if a sample is not a finite number everywhere."""
    bad = int((~np.isfinite(images).all(axis=tuple(range(1, images.ndim)))).sum())
    if bad:
        which = (
            f"samples {start} to {start + len(images) - 1}" if len(images) < count else "samples"
        )
        raise NotFiniteError(f"{bad} of {len(images)} {which} are not finite; nothing was written.")


def check_room(out: AnyPath, shape: tuple[int, ...], count: int, itemsize: int) -> None:
    """Raises `UserError` if the disk cannot hold the samples twice: in batches, and in the end."""
    check_space(out, 2 * count * int(np.prod(shape)) * itemsize)
