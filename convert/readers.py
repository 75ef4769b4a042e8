"""Opens any supported file as one flat table of named tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from qdit_convert import sniff
from qdit_convert.quantized import with_quantized
from qdit_convert.safetensors_file import read_file_metadata, read_safetensors
from qdit_convert.shards import read_shards
from qdit_convert.tensors import StateDict, about, listing
from qdit_convert.torch_legacy import read_torch_legacy
from qdit_convert.torch_zip import read_torch_zip
from qdit_convert.wrappers import unwrap
from qdit_jax.errors import UserError

INDEX_SUFFIX = ".index.json"
# The order of preference within a folder; `{stem}` is the usual name of the model's file.
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
VARIANTS = (".safetensors", ".bin", ".fp16.safetensors", ".fp16.bin")
SHARD = re.compile(r"-\d+-of-\d+\.")
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


def open_weights(path: Path, weights: str | None = None) -> StateDict:
    """Returns the tensors of a file, an index, or a folder that holds one of them.

    Args:
        weights: `"ema"` or `"model"` for a file that holds both; None prefers `"ema"`.

    Raises:
        UserError: with one sentence on what is wrong with the file.
    """
    try:
        file = weights_file(path) if path.is_dir() else path
        if SHARD.search(file.name) and not file.name.endswith(".json"):
            raise UserError(f"{file}: this is one shard of several; give the folder or its index.")
        with about(file):
            return _open(file, weights)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}.") from None


def weights_file(folder: Path) -> Path:
    """Returns the file of weights in `folder`: full precision before fp16, safetensors first."""
    for name in usual_names():
        if (folder / name).is_file():
            return folder / name
    found = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file())
    if len(found) == 1:
        return found[0]
    if any(SHARD.search(p.name) for p in found):
        raise UserError(f"{folder}: the folder holds shards, but no index.json that lists them.")
    if found:
        names = listing([p.name for p in found])
        raise UserError(f"{folder}: the folder holds several files of weights ({names}); name one.")
    indices = sorted(folder.glob("*.index*.json"))
    if len(indices) == 1:
        return indices[0]
    raise UserError(
        f"{folder}: the folder holds no weights (.safetensors, .bin, .pt, or an index)."
    )


def usual_names() -> Iterator[str]:
    """Yields the names that weights have in folders of diffusers, the preferred first."""
    for stem in STEMS:
        for variant in VARIANTS:
            # diffusers writes model.fp16.safetensors, but model.safetensors.index.fp16.json.
            *middle, suffix = variant[1:].split(".")
            index = ".".join([stem, suffix, "index", *middle, "json"])
            yield from (stem + variant, index, stem + variant + INDEX_SUFFIX)


def _open(path: Path, weights: str | None) -> StateDict:
    said: dict[str, str] = {}

    def saved(file: Path) -> object:
        if sniff.sniff(file) == sniff.SAFETENSORS:
            said.update(read_file_metadata(file))
        return _saved(file)

    if sniff.sniff(path) != sniff.JSON:
        content = saved(path)
    elif ".index" not in path.name:
        raise UserError("this is a JSON file, not weights; give the folder or the weights file.")
    else:
        content = read_shards(path, saved)
    return with_quantized(unwrap(content, str(path), weights), said)


def _saved(path: Path) -> object:
    """Returns the object that the file `path` holds."""
    readers: Mapping[str, Callable[[Path], object]] = {
        sniff.ZIP: read_torch_zip,
        sniff.LEGACY: read_torch_legacy,
        sniff.SAFETENSORS: read_safetensors,
    }
    kind = sniff.sniff(path)
    if kind not in readers:
        raise UserError("this is a JSON file, not weights.")
    return readers[kind](path)
