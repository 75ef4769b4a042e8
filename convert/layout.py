"""One row of the table of layouts: a way in which a family's tensors are named."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qdit_convert.choices import Choices
from qdit_convert.plan import Example, Plan
from qdit_convert.tensors import StateDict

Planner = Callable[[StateDict, Choices, Mapping[str, Any] | None], Plan]


@dataclass(frozen=True)
class Layout:
    """One way in which a family's tensors are named.

    Attributes:
        name: a short name of its own.
        title: what it is called in messages.
        families: the values of `--family` that have this layout, the likeliest first.
        names: pattern of the names; a file has the layout that matches most of its names.
        class_names: diffusers' classes whose config.json describes such a network.
        tells: settings that only its config.json has, if that names no class.
        plan: returns the `Plan` of the conversion.
        wants_config: whether a folder of this layout must hold a config.json.
        parts: the first parts of its names, for files that hold other networks too.
        options: the fields of `Choices` that the plan uses.
        rename: returns the tensors under the names that `plan` knows.
        own_names: returns a message about renamed tensors with the file's own names.
        told: whether the file says that it has this layout, of several with the same names.
        example: a small network in it, for the contract tests.
        writes: the family whose networks are written under these names (`inverse`); empty for none.
    """

    name: str
    title: str
    families: tuple[str, ...]
    names: re.Pattern[str]
    plan: Planner
    wants_config: bool = False
    parts: frozenset[str] = frozenset()
    options: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    tells: frozenset[str] = frozenset()
    rename: Callable[[StateDict], StateDict] = lambda state: state
    own_names: Callable[[str, StateDict], str] = lambda text, state: text
    told: Callable[[StateDict], bool] = lambda state: False
    example: Callable[[], Example] = lambda: Example(())
    writes: str = ""
