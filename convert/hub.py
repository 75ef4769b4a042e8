"""Checkpoints of the Hugging Face hub by their id: only the files that a conversion reads.

`huggingface_hub` downloads, resumes, caches and takes the token from the environment (`HF_TOKEN`); it
is imported here alone, the extra `[hub]`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from qdit_convert.folders import PIPELINE_INDEX
from qdit_convert.readers import SHARD, SUFFIXES, usual_names
from qdit_convert.tensors import listing
from qdit_jax.errors import UserError
from qdit_jax.files import local_copy

PREFIX = "hf:"
ID = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/]+))?(/(?P<inside>.+?)/?)?")
# The parts of a pipeline whose weights are read; of others nothing is.
PARTS = ("transformer", "transformer_2", "vae")
CONFIG = "config.json"


class HubId(NamedTuple):
    """What `hf:OWNER/NAME[@REVISION][/PATH]` says."""

    repo: str
    revision: str | None
    inside: str


def is_hub_id(src: str | os.PathLike) -> bool:
    """Returns whether `src` is `hf:OWNER/NAME...`; `hf://` is a URL of a file system."""
    text = os.fspath(src)
    return text.startswith(PREFIX) and not text.startswith(f"{PREFIX}/") and not Path(text).exists()


def parse(src: str | os.PathLike) -> HubId:
    """Returns the parts of an id.

    Raises:
        UserError: if it is none.
    """
    found = ID.fullmatch(os.fspath(src))
    if found is None:
        raise UserError(
            f"{src} is no id of the hub; write hf:OWNER/NAME, hf:OWNER/NAME@REVISION or "
            "hf:OWNER/NAME/FILE."
        )
    return HubId(found["repo"], found["revision"], found["inside"] or "")


def downloaded(src: str | os.PathLike) -> tuple[Path, str]:
    """Returns the local file or folder of an id, downloaded where it is not cached, and its commit.

    Raises:
        UserError: if the package is missing, the hub does not have it or does not give it, or it is
            not clear which of its files to read.
    """
    wanted = parse(src)
    try:
        import huggingface_hub as hub
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise UserError(
            f"{src} needs the package huggingface_hub: pip install 'qdit-jax[hub]', or "
            "pip install huggingface_hub."
        ) from None
    try:
        info = hub.HfApi().model_info(wanted.repo, revision=wanted.revision)
        files = chosen_files([found.rfilename for found in info.siblings or ()], wanted, src)
        folder = Path(
            hub.snapshot_download(wanted.repo, revision=info.sha, allow_patterns=list(files))
        )
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no")
        raise UserError(
            f"{src}: the hub answers {status} ({first_line(error)}). Check the name and the revision; "
            "a private or gated repository needs HF_TOKEN."
        ) from None
    except (LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"{src}: the hub cannot be reached ({first_line(error)}).") from None
    single = [name for name in files if name.endswith(SUFFIXES)]
    is_file = wanted.inside in files or (len(files) == 1 and len(single) == 1)
    return folder / (single[0] if is_file else wanted.inside), f"{wanted.repo}@{info.sha}"


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def chosen_files(names: Iterable[str], wanted: HubId, src: str | os.PathLike = "") -> list[str]:
    """Returns which files of a repository a conversion reads.

    Of a pipeline, its settings and the weights of its transformers and its autoencoder; of a network's
    folder, its settings and weights, full precision first; else the one file of weights.

    Raises:
        UserError: if there are none, or several.
    """
    names = sorted(names)
    if wanted.inside in names:
        beside = str(PurePosixPath(wanted.inside).parent / CONFIG)
        shards = shards_of(wanted.inside, names) if ".index" in wanted.inside else []
        return [wanted.inside, *shards, *([beside] if beside in names else [])]
    root = f"{wanted.inside}/" if wanted.inside else ""
    here = [name.removeprefix(root) for name in names if name.startswith(root)]
    if wanted.inside and not here:
        raise UserError(
            f"{src}: the repository has no {wanted.inside}; it has {listing(names, 6)}."
        )
    if PIPELINE_INDEX in here:
        found = [name for name in here if name == PIPELINE_INDEX or is_setting(name)]
        for part in PARTS:
            found += weights_in(here, f"{part}/")
    else:
        found = [CONFIG] if CONFIG in here else []
        weights = weights_in(here, "")
        if not weights:
            weights = [name for name in here if name.endswith(SUFFIXES)]
            if len(weights) != 1:
                what = (
                    f"several files of weights: {listing(weights, 6)}" if weights else "no weights"
                )
                raise UserError(
                    f"{src}: the repository has {what}; write hf:{wanted.repo}/FILE for one of "
                    f"its files, of which there are {listing(here, 6)}."
                )
        found += weights
    return [root + name for name in found]


def is_setting(name: str) -> bool:
    """Returns whether a file of a pipeline is the settings of a part that is read."""
    folder, _, rest = name.partition("/")
    return (folder in PARTS and rest == CONFIG) or (folder == "scheduler" and ".json" in rest)


def weights_in(names: Iterable[str], folder: str) -> list[str]:
    """Returns the weights of a network in diffusers' names: an index with its shards, or a file."""
    names = list(names)
    for usual in usual_names():
        if (name := folder + usual) in names:
            return [name, *(shards_of(name, names) if ".index" in usual else ())]
    return []


def shards_of(index: str, names: Iterable[str]) -> list[str]:
    """Returns the shards that an index may list: beside it, of its stem, suffix and variant."""
    folder, _, name = index.rpartition("/")
    stem, suffix = name.split(".")[:2]
    variant = ".fp16" if ".fp16" in name else ""
    start = f"{folder}/{stem}{variant}-" if folder else f"{stem}{variant}-"
    return [
        n for n in names if n.startswith(start) and SHARD.search(n) and n.endswith(f".{suffix}")
    ]


@contextmanager
def source(src: str | os.PathLike) -> Iterator[tuple[Path, str | None]]:
    """Yields the local file or folder of a path, a URL or an id, and the commit of an id."""
    if is_hub_id(src):
        yield downloaded(src)
        return
    with local_copy(src) as local:
        yield local, None
