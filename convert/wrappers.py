"""Finds the weights in a training script's file: raw or averaged, at any depth."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from qdit_convert.tensors import StateDict, StoredTensor, listing
from qdit_convert.training_args import saved_arguments
from qdit_jax.errors import UserError

# Names under which training scripts keep averaged and raw weights, in order of preference.
WRAPPERS = {
    "ema": ("ema", "state_dict_ema", "ema_state_dict", "model_ema", "ema_model"),
    "model": ("model", "state_dict", "model_state_dict", "module"),
}
AVERAGED = re.compile(r"(?!.*(opt|sched))(ema|ema_\w+|\w+_ema|shadow|shadow_\w+|averaged_model)")
# torch.compile, FSDP and checkpointing put these into the middle of names; DDP puts its own in front.
INSERTED = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
PREFIX = "module."
RAW = "; --weights model reads the raw ones"
MAX_DEPTH = 6


def unwrap(saved: object, label: str, weights: str | None = None) -> StateDict:
    """Returns the state dict in a training script's file, nested tables by dotted names.

    Raises:
        UserError: if there is none, or none of the kind that `weights` asks for.
    """
    if weights not in (None, *WRAPPERS):
        raise UserError(f"weights={weights!r} is not known; use ema or model.")
    if not isinstance(saved, dict):
        what = "a single tensor" if isinstance(saved, StoredTensor) else f"a {type(saved).__name__}"
        raise UserError(f"the file holds {what}, not a table of named weights.")
    if not saved:
        raise UserError("the file holds an empty state dict.")
    kinds = {key: kind for key, value in saved.items() if (kind := _kind(key, value))}
    if _is_flat(saved) or not kinds:
        return _state_dict(saved, label, "flat", saved_arguments(saved))
    name = _wrapper(saved, kinds, weights)
    state = _state_dict(
        saved[name], label, name, saved_arguments(saved), bool(_of_kind("model", saved, kinds))
    )
    unused = [key for key, kind in kinds.items() if kind == kinds[name] and key != name]
    notes = (f"left out the {kinds[name]} weights in {listing(unused)}",) if unused else ()
    return replace(state, notes=state.notes + notes)


def is_averaged(name: str) -> bool:
    """Returns whether one of the dotted parts of `name` is a name for averaged weights."""
    return any(AVERAGED.fullmatch(part) for part in name.split("."))


def _kind(key: object, value: object) -> str | None:
    """Returns "ema" or "model" for an entry that holds such weights, readable or not."""
    if not isinstance(key, str) or not isinstance(value, dict | list | tuple):
        return None
    for kind, names in WRAPPERS.items():
        if key in names and (kind == "ema" or isinstance(value, dict)):
            return kind
    return "ema" if is_averaged(key) and any(_all_tensors(value)) else None


def _is_flat(saved: dict) -> bool:
    """Returns whether the weights are at the top level: unlike counters, they have dotted names."""
    return any(isinstance(v, StoredTensor) and "." in str(key) for key, v in saved.items())


def _wrapper(saved: dict, kinds: dict[str, str], weights: str | None) -> str:
    """Returns the key of `saved` that holds the wanted weights."""
    averaged, raw = (_of_kind(kind, saved, kinds) for kind in WRAPPERS)
    if weights == "ema" and not averaged:
        # Lightning keeps both sets in one table: the names tell them apart.
        averaged = [key for key in raw if any(is_averaged(str(name)) for name in saved[key])]
    if weights != "model" and len(averaged) > 1:
        raise UserError(
            f"the file holds several averaged sets of weights ({listing(averaged)}), and convert cannot "
            f"tell which is meant: save one of them alone{RAW if raw else ''}."
        )
    found = raw if weights == "model" else averaged or (raw if weights is None else [])
    if not found:
        raise UserError(
            f"the file has no {weights} weights; it holds {listing(sorted(kinds))} "
            f"(choose with --weights)."
        )
    return found[0]


def _of_kind(kind: str, saved: dict, kinds: dict[str, str]) -> list[str]:
    """Returns the entries of one kind in order of preference, those with tensors if any has some."""
    names = [name for name in WRAPPERS[kind] if kinds.get(name) == kind]
    names += [name for name in kinds if kinds[name] == kind and name not in names]
    return [name for name in names if any(_all_tensors(saved[name]))] or names


def _state_dict(
    table: dict | list | tuple,
    label: str,
    weights: str,
    hints: dict[str, object],
    has_raw: bool = False,
) -> StateDict:
    remedy = RAW if has_raw and is_averaged(weights) else ""
    if not table:
        raise UserError(f"the file holds an empty state dict ({weights}){remedy}.")
    leaves = _flattened(table) if isinstance(table, dict) else {}
    tensors = {k: v for k, v in leaves.items() if isinstance(v, StoredTensor)}
    others = {k: type(v).__name__ for k, v in leaves.items() if k not in tensors}
    if not tensors and weights == "flat":
        keys = listing([str(key)[:60] for key in table])
        raise UserError(f"the file holds no state dict; its entries are {keys}.")
    if not tensors:
        which = " with names" if any(_all_tensors(table)) else ""
        what = f"; it holds {listing(list(others))}" if others else ""
        raise UserError(f"the entry {weights} holds no tensors{which}{what}{remedy}.")
    renamed, notes = strip_prefixes(tensors)
    if is_averaged(weights):
        others = {}  # the decay and the like
    return StateDict(label, renamed, others, weights, hints, bool(remedy), notes)


def _flattened(table: dict) -> dict[str, Any]:
    """Returns what a table and the tables inside it hold, by dotted names."""
    leaves: dict[str, Any] = {}
    for name, value in _leaves(table):
        if name in leaves:
            raise UserError(f"the name {name[:200]!r} stands twice in the file.")
        leaves[name] = value
    return leaves


def _leaves(table: dict, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yields what a table and the tables inside it hold, by dotted names."""
    for key, value in table.items():
        if isinstance(value, dict) and value and depth < MAX_DEPTH:
            yield from _leaves(value, f"{prefix}{key}.", depth + 1)
        else:
            yield f"{prefix}{key}", value


def _all_tensors(value: object, depth: int = 0) -> Iterator[StoredTensor]:
    """Yields the tensors inside tables and lists."""
    if isinstance(value, StoredTensor):
        yield value
    elif isinstance(value, dict | list | tuple) and depth < MAX_DEPTH:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _all_tensors(item, depth + 1)


def strip_prefixes(
    tensors: dict[str, StoredTensor],
) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """Returns `tensors` without what wrappers such as DDP insert into names, and notes on it.

    Raises:
        UserError: if two names are then the same.
    """
    renamed, notes = tensors, []
    inserted = {part for name in tensors for part in INSERTED.findall(name)}
    if inserted:
        renamed = _renamed({name: INSERTED.sub("", name) for name in tensors}, tensors)
        notes += [f'removed "{part}"' for part in sorted(inserted)]
    while all(name.startswith(PREFIX) and len(name) > len(PREFIX) for name in renamed):
        renamed = {name.removeprefix(PREFIX): tensor for name, tensor in renamed.items()}
        notes.append(f'stripped "{PREFIX}"')
    return renamed, tuple(notes)


def _renamed(names: dict[str, str], tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    renamed: dict[str, StoredTensor] = {}
    for old, new in names.items():
        if not new or new in renamed:
            raise UserError(
                f"the name {old!r} is that of another tensor once wrappers are removed."
            )
        renamed[new] = tensors[old]
    return renamed
