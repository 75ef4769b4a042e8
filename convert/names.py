"""Finds the network that convert knows among a file's names, whatever their prefixes.

Trainers put `model.`, `net.`, `model.diffusion_model.` and the like before every name, and may keep
the averaged weights, or other networks, in the same table.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import NamedTuple

from qdit_convert.families import NAMINGS, Layout, serves, unsupported_title
from qdit_convert.tensors import StateDict, StoredTensor, listing
from qdit_convert.wrappers import is_averaged
from qdit_jax.errors import UserError

MANY = 64  # prefixes that are tried
FEW = 8  # fewer names of a layout than this are a coincidence, unless the file holds little else
BESIDE = ("vae", "inception")  # networks that a file holds beside the one that is meant


class Root(NamedTuple):
    """A network in the file: the prefix of its names, and how many match its layout."""

    prefix: str
    layout: Layout
    num_names: int


def select_network(
    state: StateDict, family: str | None = None, weights: str | None = None
) -> StateDict:
    """Returns the tensors of one network, without the prefix of their names; `notes` say so.

    A table without a known network is returned as it is.

    Args:
        family: of which the network must be, where the file holds several.
        weights: `"ema"` or `"model"`; None prefers averaged weights.

    Raises:
        UserError: if the file holds no such weights, or several that could be meant.
    """
    roots = _roots(list(state.tensors))
    served = [root for root in roots if family is None or serves(root.layout, family)]
    if not served:
        _check_kind(state, [], weights)
        return state
    root = _chosen(_check_kind(state, served, weights))
    return _only(state, root, roots, family)


def _roots(keys: list[str]) -> list[Root]:
    """Returns the networks in a table, those with a comparable number of names."""
    counts: Counter[tuple[str, int]] = Counter()
    for key in keys:
        for i, layout in enumerate(NAMINGS):
            prefix = _prefix(key, layout)
            if prefix is not None:
                counts[prefix, i] += 1
    best: dict[str, tuple[int, int]] = {}
    for (prefix, i), count in counts.most_common(MANY):
        best.setdefault(prefix, (i, count))
    roots = [Root(prefix, NAMINGS[i], count) for prefix, (i, count) in best.items()]
    return [root for root in roots if _is_network(root, keys)]


def _prefix(key: str, layout: Layout) -> str | None:
    """Returns the shortest dotted prefix of `key` without which it is a name of `layout`."""
    start = 0
    while True:
        if layout.names.match(key, start):
            return key[:start]
        start = key.find(".", start) + 1
        if start == 0:
            return None


def _is_network(root: Root, keys: list[str]) -> bool:
    if 2 * root.num_names >= len(keys):
        return True
    # Beside other networks: among the parts that the layout has, most names must be its own.
    under = [key[len(root.prefix) :] for key in keys if key.startswith(root.prefix)]
    parts = {name.split(".")[0] for name in under if root.layout.names.match(name)}
    akin = [name for name in under if name.split(".")[0] in parts]
    return root.num_names >= FEW and 2 * root.num_names >= len(akin)


def _check_kind(state: StateDict, roots: list[Root], weights: str | None) -> list[Root]:
    """Returns the networks whose weights are of the wanted kind, averaged or raw."""
    averaged = [root for root in roots if is_averaged(root.prefix)]
    raw = [root for root in roots if root not in averaged]
    if is_averaged(state.weights):
        return averaged or raw
    if weights == "ema" and not averaged:
        raise UserError(
            "the file has no averaged weights that convert can tell by their names; leave out "
            "--weights ema to read the weights that it has."
        )
    if weights == "model" and roots and not raw:
        raise UserError(
            f"the file has no raw weights; it holds {listing([r.prefix for r in averaged])} "
            "(choose with --weights ema)."
        )
    return raw if weights == "model" or not averaged else averaged


def _chosen(roots: list[Root]) -> Root:
    """Returns the one network of `roots`."""
    most = {layout: max(r.num_names for r in roots if r.layout is layout) for _, layout, _ in roots}
    roots = [root for root in roots if 2 * root.num_names > most[root.layout]]
    mains = [root for root in roots if root.layout.families[0] not in BESIDE]
    if len(roots) == 1 or len(mains) == 1:
        return (mains or roots)[0]
    found = listing([f'"{root.prefix}" ({root.layout.title})' for root in roots])
    families = dict.fromkeys(root.layout.families[0] for root in roots)
    remedy = "save the one that is meant alone"
    if len(families) == len(roots):
        remedy = f"choose with --family {' or '.join(families)}"
    raise UserError(
        f"the file holds several networks, with names before theirs: {found}; {remedy}."
    )


def _only(state: StateDict, root: Root, roots: list[Root], family: str | None) -> StateDict:
    """Returns `state` with the tensors of `root` alone."""
    deeper = tuple(
        other.prefix
        for other in roots
        if other.prefix != root.prefix and other.prefix.startswith(root.prefix)
    )
    own = [
        key
        for key in state.tensors
        if key.startswith(root.prefix)
        and not (deeper and key.startswith(deeper))
        and _belongs(key[len(root.prefix) :], root.layout)
        and not (is_averaged(state.weights) and _is_counter(key, state.tensors[key]))
    ]
    left = sorted(set(state.tensors) - set(own))
    if root.prefix and family is None:
        known = tuple(other.prefix for other in roots if other.prefix and other != root)
        _refuse_main_network([key for key in left if not key.startswith(known)], root)
    others = {
        key.removeprefix(root.prefix): kind
        for key, kind in state.others.items()
        if key.startswith(root.prefix)
    }
    notes = [f'stripped "{root.prefix}"'] if root.prefix else []
    if left:
        notes.append(f"left out {len(left)} tensors: {_summary(left)}")
    notes += [
        f"the {other.layout.title} in the file is read with --family {other.layout.families[0]}"
        for other in roots
        if family is None and other.layout.families[0] in BESIDE and other.layout is not root.layout
    ]
    return replace(
        state,
        tensors={key.removeprefix(root.prefix): state.tensors[key] for key in own},
        others=others,
        weights=_kind(state, root, roots),
        raw=state.raw
        or (is_averaged(root.prefix) and any(not is_averaged(r.prefix) for r in roots)),
        notes=(*state.notes, *notes),
    )


def _belongs(name: str, layout: Layout) -> bool:
    return not layout.parts or name.split(".")[0] in layout.parts


def _is_counter(key: str, tensor: StoredTensor) -> bool:
    """Returns whether a tensor is the decay or the number of steps of an average."""
    return "." not in key and tensor.shape == ()


def _kind(state: StateDict, root: Root, roots: list[Root]) -> str:
    """Returns what the chosen weights are called: the file's own word, or ema or model."""
    if is_averaged(root.prefix):
        return state.weights if is_averaged(state.weights) else "ema"
    return "model" if any(is_averaged(other.prefix) for other in roots) else state.weights


def _refuse_main_network(left: list[str], root: Root) -> None:
    title = unsupported_title(left)
    if title is not None:
        raise UserError(
            f"the names of its tensors are of {title}, which convert does not support yet; "
            f"--family {root.layout.families[0]} reads the {root.layout.title} that it also holds."
        )


def _summary(keys: list[str]) -> str:
    """Returns the first parts of the names, and how many names each has."""
    counts = Counter(key.split(".")[0] + (".*" if "." in key else "") for key in keys)
    return listing([f"{part} ({count})" if count > 1 else part for part, count in counts.items()])
