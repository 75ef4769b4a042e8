"""Opens any supported file as one flat table of named tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qdit_convert import sniff
from qdit_convert.safetensors_file import read_safetensors
from qdit_convert.shards import read_shards
from qdit_convert.tensors import StateDict, StoredTensor, about, listing
from qdit_convert.torch_legacy import read_torch_legacy
from qdit_convert.torch_zip import read_torch_zip
from qdit_convert.training_args import saved_arguments
from qdit_jax.errors import UserError

# Names under which training scripts keep averaged and raw weights, in order of preference.
WRAPPERS = {
    "ema": ("ema", "state_dict_ema", "ema_state_dict", "model_ema"),
    "model": ("model", "state_dict", "model_state_dict", "module"),
}
PREFIXES = ("module.", "_orig_mod.")
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
    for stem in STEMS:
        for variant in VARIANTS:
            # diffusers writes model.fp16.safetensors, but model.safetensors.index.fp16.json.
            *middle, suffix = variant[1:].split(".")
            index = ".".join([stem, suffix, "index", *middle, "json"])
            for name in (stem + variant, index, stem + variant + INDEX_SUFFIX):
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


def _open(path: Path, weights: str | None) -> StateDict:
    kind = sniff.sniff(path)
    if kind == sniff.JSON:
        if ".index" not in path.name:
            raise UserError(
                "this is a JSON file, not weights; give the folder or the weights file."
            )
        tensors = read_shards(path, lambda shard: _open(shard, weights).tensors)
        return StateDict(str(path), tensors)
    readers: Mapping[str, Callable[[Path], Any]] = {
        sniff.ZIP: read_torch_zip,
        sniff.LEGACY: read_torch_legacy,
        sniff.SAFETENSORS: read_safetensors,
    }
    return unwrap(readers[kind](path), str(path), weights)


def unwrap(saved: Any, label: str, weights: str | None = None) -> StateDict:
    """Returns the state dict inside what a training script saved.

    Raises:
        UserError: if there is none, or none of the kind that `weights` asks for.
    """
    if weights not in (None, *WRAPPERS):
        raise UserError(f"weights={weights!r} is not known; use ema or model.")
    if not isinstance(saved, dict):
        kind = "a single tensor" if isinstance(saved, StoredTensor) else f"a {type(saved).__name__}"
        raise UserError(f"the file holds {kind}, not a table of named weights.")
    if not saved:
        raise UserError("the file holds an empty state dict.")
    known = {name for names in WRAPPERS.values() for name in names}
    tables = {key for key, value in saved.items() if key in known and isinstance(value, dict)}
    if not tables and any(isinstance(value, StoredTensor) for value in saved.values()):
        return _state_dict(saved, label, "flat", {})
    name = _wrapper(saved, tables, weights)
    return _state_dict(saved[name], label, name, saved_arguments(saved))


def _wrapper(saved: dict, tables: set[str], weights: str | None) -> str:
    """Returns the key of `saved` that holds the wanted weights."""
    wanted = [weights] if weights else ["ema", "model"]
    for kind in wanted:
        for name in WRAPPERS[kind]:
            if name in tables:
                return name
    if tables:
        raise UserError(
            f"the file has no {weights} weights; it holds {listing(sorted(tables))} "
            f"(choose with --weights)."
        )
    keys = listing([str(key)[:60] for key in saved])
    raise UserError(f"the file holds no state dict; its entries are {keys}.")


def _state_dict(table: dict, label: str, weights: str, hints: dict[str, object]) -> StateDict:
    if not table:
        raise UserError(f"the file holds an empty state dict ({weights}).")
    tensors = {str(k): v for k, v in table.items() if isinstance(v, StoredTensor)}
    others = {str(k): type(v).__name__ for k, v in table.items() if not isinstance(v, StoredTensor)}
    if not tensors:
        raise UserError(f"the entry {weights} holds no tensors; it holds {listing(list(others))}.")
    return StateDict(label, strip_prefixes(tensors), others, weights, hints)


def strip_prefixes(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Returns `tensors` without the prefixes that wrappers such as DDP put before every name."""
    for prefix in PREFIXES:
        if all(name.startswith(prefix) and len(name) > len(prefix) for name in tensors):
            return strip_prefixes({name[len(prefix) :]: v for name, v in tensors.items()})
    return tensors
