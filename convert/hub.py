"""Which files of a repository of the Hugging Face hub a conversion reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from qdit_convert.folders import PIPELINE_INDEX
from qdit_convert.readers import SHARD, SUFFIXES, usual_names
from qdit_convert.tensors import listing
from qdit_jax.errors import UserError
from qdit_jax.files import HubId, PathLike, downloaded, is_hub_id, local_copy

# The parts of a pipeline whose weights are read; of others nothing is.
PARTS = ("transformer", "transformer_2", "vae")
CONFIG = "config.json"


def chosen_files(names: Sequence[str], wanted: HubId) -> list[str]:
    """Returns which files of a repository a conversion reads.

    Of a pipeline, its settings and the weights of its transformers and its autoencoder; of a network's
    folder, its settings and weights, full precision first; else the one file of weights.

    Raises:
        UserError: if there are none, or several.
    """
    src = f"hf:{wanted.repo}"
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
def source(src: PathLike) -> Iterator[tuple[Path, str | None]]:
    """Yields the local file or folder of a path, a URL or an id, and the commit of an id."""
    if is_hub_id(src):
        yield downloaded(src, chosen_files)
        return
    with local_copy(src) as local:
        yield local, None
