"""Weights split over several files, named by an `index.json`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qdit_convert.json_file import read_json
from qdit_convert.tensors import StoredTensor, about, listing
from qdit_jax.errors import UserError


def read_shards(index: Path, read_file: Callable[[Path], object]) -> dict[str, StoredTensor]:
    """Returns the tensors of all files that `index` names.

    Raises:
        UserError: if a file is missing or outside the folder, or holds other tensors than the
            index says.
    """
    places = _weight_map(index)
    files = sorted(set(places.values()))
    for name in files:
        _check_name(name)
    absent = [name for name in files if not (index.parent / name).is_file()]
    if absent:
        raise UserError(f"{len(absent)} of its {len(files)} shards are missing: {listing(absent)}.")
    tensors: dict[str, StoredTensor] = {}
    for name in files:
        with about(name):
            found = _tensors(read_file(index.parent / name))
        _check_shard(name, set(found), places)
        tensors.update(found)
    return tensors


def _tensors(saved: object) -> dict[str, StoredTensor]:
    if not isinstance(saved, dict) or not all(isinstance(v, StoredTensor) for v in saved.values()):
        raise UserError("this shard is not a plain table of tensors.")
    return saved


def _weight_map(index: Path) -> dict[str, str]:
    content = read_json(index)
    places = content.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError("the index has no weight_map that says which shard holds what.")
    if any(not isinstance(name, str) for name in places.values()):
        raise UserError("the weight_map of the index must give a file name for every tensor.")
    return places


def _check_name(name: str) -> None:
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise UserError(f"the index names the shard {name!r}, which leaves the folder.")


def _check_shard(name: str, found: set[str], places: dict[str, str]) -> None:
    expected = {key for key, place in places.items() if place == name}
    absent = sorted(expected - found)
    if absent:
        raise UserError(
            f"the shard {name} lacks {len(absent)} tensors that the index puts there: "
            f"{listing(absent)}."
        )
    extra = sorted(found - expected)
    if extra:
        raise UserError(
            f"the shard {name} holds {len(extra)} tensors that the index does not put there: "
            f"{listing(extra)}."
        )
