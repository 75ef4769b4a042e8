"""The modules and variables of an NNX network, by path; putting others in their place."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from flax import nnx

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a node hangs: `parent.key`, or `parent[key]`."""

    parent: Any
    key: Any

    def put(self, node: object) -> None:
        """Hangs another node here."""
        if isinstance(self.parent, dict | list) or isinstance(self.key, int):
            self.parent[self.key] = node
        else:
            setattr(self.parent, self.key, node)


@dataclasses.dataclass(frozen=True)
class Found:
    """A module or variable: its first path, and all the places where it hangs; the root has none."""

    path: Path
    node: Any
    places: list[Place]

    @property
    def name(self) -> str:
        """The path as recipes write it."""
        return "/".join(self.path)

    @property
    def parents(self) -> list[object]:
        """What it hangs in."""
        return [place.parent for place in self.places]


def found_in(model: nnx.Module) -> list[Found]:
    """Returns the modules and variables of a network, each once, in the order of its graph.

    Raises:
        ValueError: if a module hangs in a tuple, in which nothing can be put.
    """
    found = {id(model): Found((), model, [])}
    for path, place, node in children(model, (), set()):
        found.setdefault(id(node), Found(path, node, [])).places.append(place)
    return list(found.values())


def children(node: Any, path: Path, seen: set[int]) -> Iterator[tuple[Path, Place, Any]]:
    """Yields what hangs below a node, depth first; what hangs in several places, once for each."""
    seen.add(id(node))
    for key, child in nnx.iter_children(node):
        if not isinstance(child, nnx.Module | nnx.Pytree | nnx.Variable | dict | list | tuple):
            continue
        below = (*path, str(key))
        if isinstance(child, nnx.Module | nnx.Variable):
            yield below, Place(node, key), child
        if not isinstance(child, nnx.Variable) and id(child) not in seen:
            yield from children(child, below, seen)
