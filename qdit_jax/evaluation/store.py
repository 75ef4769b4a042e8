"""The folder of an evaluation: settings and finished shards, which are merged in the end.

    run.json       the settings that every shard was made with
    shards/        one archive per batch, written to a temporary name and renamed (atomic)
    lock           held while a run writes here, by its first process

A killed run therefore resumes: finished shards are kept, missing ones are computed. Several processes
write shards, each its own; all else is written by the first.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from qdit_jax import files
from qdit_jax.errors import UserError
from qdit_jax.files import GENERATOR, AnyPath, PathLike, is_remote, replaced_file, write_arrays

RUN_FILE = "run.json"
SHARDS = "shards"
SAMPLES = ("/images", "/latents")  # ends of the names of a shard's large arrays
EARLIER_NAMES = {"execution": "numerics", "walk": "scheduler"}  # of settings in RUN_FILE
DAMAGE = (zipfile.BadZipFile, OSError, ValueError, KeyError, EOFError)


@contextmanager
def locked(folder: AnyPath) -> Iterator[None]:
    """Locks `folder` for this process; the lock of a killed process is released.

    Raises:
        UserError: if another process has the lock, or `folder` is a file or holds other things.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose a folder for the results.")
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not is_remote(folder):
        (folder / "lock").touch()
    with files.locked(folder / "lock") as is_ours:
        if is_ours is False:
            raise UserError(f"another process writes to {folder} now; wait for it.")
        yield


def open_run(
    folder: AnyPath,
    settings: Mapping[str, Any],
    default: Mapping[str, Any],
    remedy: str = "use the same to continue it, or another --out",
) -> dict[str, Any]:
    """Returns the settings of the run in `folder`: those stored there, else `settings`, now stored.

    A setting that is None and has a default takes the stored value, or in a new run its default, so
    that a run that moves to another machine keeps its batches. Stored settings count only if a
    shard is finished.

    Raises:
        UserError: if the folder holds a run with other settings; `remedy` ends the sentence.
    """
    file = folder / RUN_FILE
    (folder / SHARDS).mkdir(exist_ok=True)
    open_ = open_names(settings, default)
    if not file.exists() or not any((folder / SHARDS).glob("[0-9]*.npz")):
        complete = {**settings, **{name: default[name] for name in open_}}
        with replaced_file(file) as temporary:
            temporary.write_text(json.dumps(complete, indent=1))
        return complete
    try:
        stored = with_present_names(json.loads(file.read_text()))
        differing = differences(settings, stored, open_)
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{file} is damaged; remove {folder} to start again.") from None
    if differing:
        raise UserError(
            f"{folder} holds a run with other settings ({'; '.join(differing[:4])}); {remedy}."
        )
    for leftover in (folder / SHARDS).glob(".*"):  # of a process that was killed
        leftover.unlink()
    return stored


def open_names(settings: Mapping[str, Any], default: Mapping[str, Any]) -> set[str]:
    """Returns the settings that take the stored value: those that are None and have a default."""
    return {name for name in default if settings[name] is None}


def differences(
    settings: Mapping[str, Any], stored: Mapping[str, Any], open_: set[str]
) -> list[str]:
    """Returns in words where settings differ from those of a run, the `open_` ones left out."""
    names = [*settings, *(name for name in stored if name not in settings)]
    return [
        f"{name} {show(stored.get(name))}, not {show(settings.get(name))}"
        for name in names
        if name not in open_ and settings.get(name) != stored.get(name)
    ]


def with_present_names(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns stored settings with their present names in place of earlier ones."""
    return {EARLIER_NAMES.get(name, name): value for name, value in settings.items()}


def forget_unbegun(folder: AnyPath) -> None:
    """Removes a run that has no finished shard, and its folder where nothing else is in it."""
    if any((folder / SHARDS).glob("[0-9]*.npz")):
        return
    for name in (RUN_FILE, "lock"):
        (folder / name).unlink(missing_ok=True)
    for place in (folder / SHARDS, folder):
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()


def check_folder(folder: AnyPath) -> None:
    """Raises `UserError` if `folder` holds things, but no run."""
    if (folder / RUN_FILE).exists() or not folder.exists():
        return
    strangers = [p.name for p in folder.iterdir() if not re.match(r"lock$|shards$|\.", p.name)]
    if strangers:
        raise UserError(
            f"{folder} holds {strangers[0]} and no evaluation; choose another --out, or an empty "
            "folder."
        )


def show(value: object) -> str:
    return "none" if value is None else str(value)


def shard_ranges(num_samples: int, batch_size: int) -> list[tuple[int, int]]:
    """Returns the first and one past the last sample of every shard, in order."""
    starts = range(0, num_samples, batch_size)
    return [(start, min(start + batch_size, num_samples)) for start in starts]


def shard_path(folder: AnyPath, start: int) -> AnyPath:
    return folder / SHARDS / f"{start:08d}.npz"


def missing_shards(folder: AnyPath, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns the ranges that have no whole shard yet."""
    return [(start, stop) for start, stop in ranges if not is_whole(shard_path(folder, start))]


def is_whole(path: AnyPath) -> bool:
    """Returns whether the archive is there and its checksums hold."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except DAMAGE:
        return False


@contextmanager
def opened(path: AnyPath) -> Iterator[Any]:
    """Yields the arrays of an `.npz`, read when they are asked for."""
    with path.open("rb") as file, np.load(file) as data:
        yield data


def write_shard(folder: AnyPath, start: int, arrays: Mapping[str, Any]) -> None:
    write_arrays(shard_path(folder, start), arrays, compressed=False)


def collect(folder: AnyPath, ranges: Sequence[tuple[int, int]]) -> dict[str, list[np.ndarray]]:
    """Returns the measures in all shards by name, in order; the samples stay on disk."""
    found: dict[str, list[np.ndarray]] = {}
    for start, _ in ranges:
        with opened(shard_path(folder, start)) as data:
            for name in data.files:
                if not name.endswith(SAMPLES):
                    found.setdefault(name, []).append(data[name])
    return found


def first_samples(
    folder: AnyPath, ranges: Sequence[tuple[int, int]], name: str, count: int
) -> np.ndarray | None:
    """Returns the first `count` samples of the array `name`, or None where it was not stored."""
    found: list[np.ndarray] = []
    for start, _ in ranges:
        if start >= count:
            break
        with opened(shard_path(folder, start)) as data:
            if name not in data.files:
                return None
            found.append(data[name])
    return np.concatenate(found)[:count]


def merge(
    folder: AnyPath,
    ranges: Sequence[tuple[int, int]],
    name: str,
    path: PathLike,
    member: str,
    **others: np.ndarray,
) -> None:
    """Writes the arrays `name` of all shards as one array `member` of an `.npz`, shard by shard."""
    with opened(shard_path(folder, 0)) as data:
        first = data[name]
    shape = (ranges[-1][1], *first.shape[1:])
    header = {
        "descr": np.lib.format.dtype_to_descr(first.dtype),
        "fortran_order": False,
        "shape": shape,
    }
    with replaced_file(path, "samples") as temporary, zipfile.ZipFile(temporary, "w") as archive:
        archive.comment = GENERATOR.encode()
        with archive.open(zip_entry(member), "w", force_zip64=True) as stream:
            np.lib.format.write_array_header_1_0(stream, header)
            for start, _ in ranges:
                with opened(shard_path(folder, start)) as data:
                    stream.write(np.ascontiguousarray(data[name]).tobytes())
        for other, array in others.items():
            with archive.open(zip_entry(other), "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, np.asarray(array), allow_pickle=False)


def zip_entry(name: str) -> zipfile.ZipInfo:
    """Returns an entry with a fixed date, so that equal samples make equal files."""
    return zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
