"""One network of a source, opened and planned."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from qdit_convert.layout import Layout
from qdit_convert.plan import Plan
from qdit_convert.tensors import StateDict


class Network(NamedTuple):
    """One network of a source, opened and planned, its values not yet read."""

    label: str
    state: StateDict
    layout: Layout
    plan: Plan

    def noted(self, note: str) -> Network:
        """Returns the network with one more note on how it was understood."""
        return self._replace(plan=replace(self.plan, notes=(*self.plan.notes, note)))
