"""Budgets: an upper limit of one cost, written like `bitops=1.0x-g128` or `bytes=351.3M`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from qdit_jax.allocation.choices import act_sizes_vary
from qdit_jax.allocation.cost import CostFn, MeanGroup, cost_table, named_costs, total_cost
from qdit_jax.allocation.space import SearchLayer, Space
from qdit_jax.recipes import LayerSpec
from qdit_jax.types import Numbers

SUFFIXES = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
NUMBER = r"(\d+\.?\d*|\.\d+)"
RELATIVE = re.compile(NUMBER + r"x-(?:w(\d+)a(\d+)-)?g(\d+)")
ABSOLUTE = re.compile(NUMBER + r"(e[+-]?\d+)?([KMGTP]?)")


@dataclasses.dataclass(frozen=True)
class Budget:
    """The costs of a space's choices and the most that an assignment may cost.

    Attributes:
        text: as the user wrote it.
        table: the cost of every choice, one array per layer.
        limit: the greatest total allowed.
        is_mean_group: whether costs are negative group sizes, of which people see the mean.
    """

    text: str
    table: tuple[np.ndarray, ...]
    limit: float
    is_mean_group: bool = False

    @property
    def name(self) -> str:
        """Returns the name of the cost."""
        return self.text.partition("=")[0]

    def shown(self, cost: float) -> float:
        """Returns a total cost, or the limit, as people read it: never negative."""
        return -cost / len(self.table) if self.is_mean_group else cost

    def cost(self, assignment: Numbers) -> np.ndarray | np.float64:
        """Returns the cost of every assignment: `[..., L] -> [...]`, float64."""
        return total_cost(list(self.table), assignment)

    def allows(self, assignment: Numbers) -> np.ndarray | np.bool_:
        """Returns whether assignments are within the limit (to rounding): `[..., L] -> [...]`."""
        return self.cost(assignment) <= self.limit + self.slack

    @property
    def slack(self) -> float:
        """Returns the rounding of a sum of costs."""
        return 1e-9 * max(abs(self.limit), sum(float(np.abs(row).max()) for row in self.table))

    @property
    def leaves_no_choice(self) -> bool:
        """Returns whether only the cheapest assignment is legal."""
        costs = [np.sort(row) for row in self.table]
        steps = [row[1] - row[0] for row in costs if len(row) > 1]
        return bool(min(steps, default=np.inf) > self.limit + self.slack - self.least)

    @property
    def least(self) -> float:
        """Returns the cost of the cheapest assignment."""
        return float(sum(row.min() for row in self.table))

    @property
    def most(self) -> float:
        """Returns the cost of the dearest assignment."""
        return float(sum(row.max() for row in self.table))


@dataclasses.dataclass(frozen=True)
class Priced:
    """A budget of costs of the caller's own.

    Attributes:
        text: the budget, which may name them; None takes the strategy's own.
        costs: cost functions by name, such as `{"latency": Latency.read("latency.json")}`.
    """

    text: str | None
    costs: Mapping[str, CostFn]

    @classmethod
    def of(cls, budget: str | Priced | None, text: str) -> Priced:
        """Returns a budget of all known costs, with `text` where it has none of its own."""
        own = budget if isinstance(budget, Priced) else Priced(budget, {})
        return cls(text if own.text is None else own.text, {**named_costs(), **own.costs})


def parse_budget(text: str, space: Space, costs: Mapping[str, CostFn]) -> Budget:
    """Returns the budget that `text` names.

    The text is one of:

    - `NAME=NUMBER`, with an optional suffix K, M, G, T or P;
    - `NAME=1.0x-g128`, relative to the uniform assignment of that group size at the first bits of
      every layer;
    - `NAME=1.0x-w4a8-g128`, the same at given bits;
    - `mean-group=128`, the release's rule: the mean of the group sizes is at least 128.

    Args:
        costs: cost functions by name: `cost.named_costs()` and any of the user's own.

    Raises:
        ValueError: if the text cannot be read, or no assignment is cheap enough.
    """
    name, _, value = text.partition("=")
    if name not in costs:
        raise ValueError(f"budget={text!r}: the cost {name!r} is not known; use {sorted(costs)}.")
    limit = parse_limit(text, value, space, costs[name])
    if isinstance(costs[name], MeanGroup) and RELATIVE.fullmatch(value) is None:
        limit = -limit * len(space.layers)
    is_mean_group = isinstance(costs[name], MeanGroup)
    return checked(Budget(text, tuple(cost_table(space, costs[name])), limit, is_mean_group))


def whole_cost(text: str, space: Space, costs: Mapping[str, CostFn]) -> Budget:
    """Returns the costs that `text` names, with a limit that allows every assignment.

    Raises:
        ValueError: if `text` is not a cost's name.
    """
    if text not in costs:
        name = text.partition("=")[0]
        more = "; a cost that is minimized has no limit" if name in costs else ""
        raise ValueError(
            f"minimize={text!r} is not a cost's name{more}: use one of {sorted(costs)}."
        )
    is_mean_group = isinstance(costs[text], MeanGroup)
    budget = Budget(text, tuple(cost_table(space, costs[text])), 0.0, is_mean_group)
    return dataclasses.replace(budget, limit=budget.most)


def checked(budget: Budget) -> Budget:
    """Returns the budget; raises `ValueError` if no assignment meets it."""
    if budget.least <= budget.limit + budget.slack:
        return budget
    limit, least = budget.shown(budget.limit), budget.shown(budget.least)
    if budget.is_mean_group:
        raise ValueError(
            f"budget={budget.text!r} is impossible: the mean of the group sizes that the choices "
            f"offer is {least:.6g} at most; ask for less, or offer larger groups."
        )
    raise ValueError(
        f"budget={budget.text!r} is impossible: the limit is {limit:.6g} and the "
        f"cheapest assignment costs {least:.6g}; allow more, or offer cheaper choices."
    )


def check_limiting(budget: Budget) -> None:
    """Raises `ValueError` if even the dearest assignment stays below the limit: nothing to trade."""
    if budget.limit <= budget.most + budget.slack or budget.least == budget.most:
        return
    limit, least, most = (budget.shown(c) for c in (budget.limit, budget.least, budget.most))
    dearest = "the dearest assignment costs"
    if budget.is_mean_group:
        dearest = "the mean of the group sizes is never below"
    raise ValueError(
        f"budget={budget.text!r} limits nothing: {dearest} {most:.6g}; use a number "
        f"from {min(least, most):.6g} to {max(least, most):.6g}, not {limit:.6g}."
    )


def parse_limit(text: str, value: str, space: Space, cost_fn: CostFn) -> float:
    if match := RELATIVE.fullmatch(value):
        factor, weight_bits, act_bits, size = match.groups()
        bits = None if weight_bits is None else (int(weight_bits), int(act_bits))
        specs = [reference_spec(layer, int(size), bits) for layer in space.layers]
        costs = map(cost_fn, space.layers, specs)
        return float(factor) * sum(costs)
    if match := ABSOLUTE.fullmatch(value):
        return float(match[1] + (match[2] or "")) * SUFFIXES[match[3]]
    raise ValueError(
        f"budget={text!r} cannot be read; write NAME=1.0x-g128 or NAME=NUMBER such as bytes=351.3M."
    )


def reference_spec(layer: SearchLayer, group_size: int, bits: tuple[int, int] | None) -> LayerSpec:
    """Returns the layer's first choice at another group size (and bits); pinned layers stay.

    Where no choice varies the inputs' group size, the inputs keep theirs, as they do where the first
    choice has one scale per token.
    """
    spec = layer.choices[0]
    if len(layer.choices) == 1:
        return spec
    weight, act = spec.weight, spec.act
    if act_sizes_vary(layer.choices) or not weight:
        act = act and dataclasses.replace(act, group_size=group_size)
    weight = weight and dataclasses.replace(weight, group_size=group_size)
    if bits is not None:
        weight = weight and dataclasses.replace(weight, bits=bits[0])
        act = act and dataclasses.replace(act, bits=bits[1])
    return LayerSpec(weight, act)
