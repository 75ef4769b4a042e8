"""The kinds of files and folders that this program writes, and when one may be replaced."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Callable, Iterable
from typing import NamedTuple

from qdit_jax.errors import UserError
from qdit_jax.files.paths import AnyPath, PathLike, as_path, check_apart

GENERATOR = "made by qdit_jax"  # stands in the pictures, pages and archives that are written


def check_free(
    path: PathLike,
    overwrite: bool,
    kind: str = "checkpoint",
    inputs: Iterable[PathLike | None] = (),
) -> None:
    """Raises `UserError` unless a thing of `kind` may be written to `path`.

    It may if `path` does not exist or is an empty folder, or with `overwrite` if it is a thing of
    the same kind with nothing else inside. No input may be at `path`, inside it or around it, links
    included.
    """
    path = as_path(path)
    check_apart(path, inputs)
    wanted = KINDS[kind]
    if not path.exists() or (wanted.entries and is_empty(path)):
        return
    if not overwrite:
        raise UserError(
            f"{path} exists already; choose another path, or pass --force to replace it."
        )
    if not wanted.found_at(path):
        raise UserError(
            f"{path} is not {wanted.title}, and only such is replaced; choose another path, or "
            "remove it yourself."
        )
    if strange := strangers(path, wanted):
        raise UserError(
            f"{path} holds {strange[0]}, which is not part of {wanted.title} and would be lost; move "
            "it away, or choose another path."
        )


def is_empty(path: AnyPath) -> bool:
    return path.is_dir() and not any(path.iterdir())


class Kind(NamedTuple):
    """Something that this program writes, and how it is recognized.

    Attributes:
        title: its name in messages, with an article.
        found_at: whether a path holds one.
        entries: pattern of all names that a folder of it may hold; empty for a file.
        marker: a file that every folder of this kind has; written last if renaming is impossible.
    """

    title: str
    found_at: Callable[[AnyPath], bool]
    entries: str = ""
    marker: str = ""


def strangers(path: AnyPath, kind: Kind) -> list[str]:
    """Returns the names in a folder that do not belong to a thing of its kind."""
    if not kind.entries:
        return []
    found = [p.name for p in path.iterdir() if not re.fullmatch(kind.entries, p.name)]
    if (path / "vae").is_dir():
        found += [f"vae/{name}" for name in strangers(path / "vae", kind)]
    return sorted(found)


def json_with(*keys: str) -> Callable[[AnyPath], bool]:
    """Returns whether a path holds a JSON object with these keys."""

    def found_at(path: AnyPath) -> bool:
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError):
            return False
        return isinstance(content, dict) and set(keys) <= set(content)

    return found_at


def any_of(*tests: Callable[[AnyPath], bool]) -> Callable[[AnyPath], bool]:
    return lambda path: any(test(path) for test in tests)


def inside(name: str, test: Callable[[AnyPath], bool]) -> Callable[[AnyPath], bool]:
    """Returns whether a path is a folder whose file `name` passes a test."""
    return lambda path: path.is_dir() and test(path / name)


def archive_with(*members: str) -> Callable[[AnyPath], bool]:
    """Returns whether a path holds an `.npz` with these arrays; `low/` stands for all below it."""

    def found_at(path: AnyPath) -> bool:
        try:
            with path.open("rb") as file, zipfile.ZipFile(file) as archive:
                names = {name.removesuffix(".npy") for name in archive.namelist()}
        except (OSError, ValueError, zipfile.BadZipFile):
            return False
        names |= {name.partition("/")[0] + "/" for name in names if "/" in name}
        return set(members) <= names

    return found_at


def marked(path: AnyPath) -> bool:
    """Returns whether the beginning or the end of a file names this program."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
            file.seek(-min(len(head), 64), os.SEEK_END)
            return GENERATOR.encode() in head + file.read()
    except OSError:
        return False


def safetensors_saying(key: str) -> Callable[[AnyPath], bool]:
    """Returns whether a path holds a safetensors file with this entry in its metadata."""

    def found_at(path: AnyPath) -> bool:
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size)) if size < 1 << 30 else {}
            return key in header.get("__metadata__", {})
        except (OSError, ValueError, AttributeError, TypeError):
            return False

    return found_at


def has_states(path: AnyPath) -> bool:
    """Returns whether a folder holds what a search keeps in `state`: its own states, and its fits."""
    return are_states(path / "state", "fits")


def has_steps(path: AnyPath) -> bool:
    """Returns whether a folder holds what `qdit schedule` keeps in `steps`."""
    return are_states(path / "steps")


def are_states(folder: AnyPath, inner: str | None = None) -> bool:
    """Returns whether a folder holds numbered states and nothing else, maybe half-written ones.

    `inner` is the name of a folder of the same kind that may lie beside them.
    """
    if not folder.is_dir():
        return False
    names = [entry.name for entry in folder.iterdir()]
    if inner in names:
        names.remove(inner)
        if not are_states(folder / inner):
            return False
    whole = [name for name in names if re.fullmatch(r"\d+", name)]
    half = [name for name in names if re.fullmatch(r"\d+\.orbax-checkpoint-tmp.*", name)]
    is_ours = all((folder / name / "settings").is_dir() for name in whole)
    return is_ours and len(whole) + len(half) == len(names)


def is_unbegun_evaluation(path: AnyPath) -> bool:
    """Returns whether a folder holds what an evaluation writes before its first shard."""
    return path.is_dir() and all(
        entry.name == "lock" or (entry.name == "shards" and is_empty(entry))
        for entry in path.iterdir()
    )


KINDS = {
    "checkpoint": Kind(
        "a checkpoint",
        inside("model.json", json_with("format_version", "family", "config", "params")),
        r"model\.json|recipe\.json|params|vae",
        "model.json",
    ),
    "search": Kind(
        "a search",
        any_of(has_states, inside("history.json", json_with("method", "budget", "assignment"))),
        r"recipe\.json|history\.json|front\.png|map\.png|state",
    ),
    "schedule": Kind(
        "a schedule of bits",
        any_of(has_steps, inside("history.json", json_with("schedule"))),
        r"recipe\.json|history\.json|schedule\.png|steps",
    ),
    "evaluation": Kind(
        "an evaluation",
        any_of(is_unbegun_evaluation, inside("run.json", json_with("num_samples", "seed"))),
        r"run\.json|shards|lock|metrics\.json|pictures\.png|report\.html|ranges\.npz|"
        r"((reference_|compared_)?samples|samples_\d+)\.npz",
        "run.json",
    ),
    "vbench": Kind(
        "a folder for VBench",
        inside("vbench.json", json_with("vbench", "clips")),
        r"vbench\.json|prompts\.json|videos",
        "vbench.json",
    ),
    "bench": Kind(
        "a bench",
        inside("bench.json", json_with("settings", "entries")),
        r"bench\.json|bench\.png|latency\.json",
    ),
    "demonstration": Kind("a demonstration", inside("demo.json", json_with("demonstration")), ".*"),
    "export": Kind("an exported checkpoint", safetensors_saying("qdit_jax")),
    "weights": Kind("weights that qdit export wrote", safetensors_saying("qdit_jax_weights")),
    "statistics": Kind("a file of calibration statistics", archive_with("timesteps", "low/")),
    "inputs": Kind("a file of calibration inputs", archive_with("x", "timestep", "sample")),
    "conditions": Kind("a file of conditions", archive_with("text")),
    "samples": Kind("a file of samples from here", marked),
    "picture": Kind("a picture from here", marked),
    "report": Kind("a report from here", marked),
    "figures": Kind(
        "a file of figures from here",
        any_of(
            json_with("settings", "models"),
            json_with("samples", "reference", "scores"),
            json_with("protocol", "outlier_factor"),
            json_with("layers", "failures", "limits"),
        ),
    ),
}  # fmt: skip
