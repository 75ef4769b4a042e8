"""Runs of blocks that are alike, stacked and scanned: one compiled block for all of a run.

A checkpoint's tree has an entry for every block. An execution form of it has, in the entry `RUNS`, one
tree for each run of consecutive blocks whose trees agree in all but the arrays' values, its arrays
stacked on a new first axis. The function is the same; a program of it compiles in the time of one
block for each run. Where blocks differ in turn, such as in frames and over time, a run is of whole
periods: one stack for each block of a period.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn

from qdit_jax.quant import ActQuant
from qdit_jax.types import Params

RUNS = "block_runs"  # the entry's name in a parameter tree
# Fewer are compiled one by one: a scanned block copies its weights on CPU.
LEAST = 8
NUMBERED = re.compile(r"(.+)_(\d+)")
# The names of the blocks of each period, in the order in which they run.
Periods: TypeAlias = Sequence[tuple[str, ...]]


class BlockKind(NamedTuple):
    """How one block of a period is made and called.

    Attributes:
        make_fn: makes the block: called with `name=` of one, or with `parent=None` for a run.
        call: returns `x` after the block, `call(block, x)`; closes over all else that the block takes.
    """

    make_fn: Callable[..., nn.Module]
    call: Callable[[Callable[..., Any], Any], Any]


def apply_blocks(
    module: nn.Module,
    make_fn: Callable[..., nn.Module],
    prefix: str,
    count: int,
    x: Any,
    *args: Any,
    first: int = 0,
) -> Any:
    """Returns `x` after `count` blocks `prefix_0`, `prefix_1`, ..., those of a run scanned.

    Args:
        module: whose params hold the blocks, inside its compact method.
        make_fn: as of a `BlockKind`.
        x: what a block takes first and returns: a pytree.
        args: what every block takes beside it.
        first: the number of the first one. A network whose blocks are not all made alike calls this
            for each neighborhood of equal ones; their parameters must differ from their neighbors'
            in shape or name, so that no run holds both.
    """
    kind = BlockKind(make_fn, lambda block, x: block(x, *args))
    periods = [(f"{prefix}_{number}",) for number in range(first, first + count)]
    return apply_periods(module, (kind,), periods, x)


def apply_periods(module: nn.Module, kinds: Sequence[BlockKind], periods: Periods, x: Any) -> Any:
    """Returns `x` after the blocks of all periods, those of a run scanned period by period.

    Args:
        module: whose params hold the blocks, inside its compact method.
        kinds: of the blocks of a period, in the order in which they run.
        periods: the names of the blocks of each.
        x: what a block takes first and returns: a pytree.
    """
    runs: Params = (
        module.get_variable("params", RUNS) if module.has_variable("params", RUNS) else {}
    )
    number = 0
    while number < len(periods):
        names = periods[number]
        if names[0] in runs:
            trees = tuple(runs[name] for name in names)
            x, number = scanned(kinds, trees, x), number + jax.tree.leaves(trees)[0].shape[0]
            continue
        for kind, name in zip(kinds, names, strict=True):
            x = kind.call(kind.make_fn(name=name), x)
        number += 1
    return x


def scanned(kinds: Sequence[BlockKind], trees: tuple[Params, ...], x: Any) -> Any:
    """Returns `x` after the periods of a run; `trees` are the stacked blocks of each kind."""
    blocks = [kind.make_fn(parent=None) for kind in kinds]

    def step(x: Any, trees: tuple[Params, ...]) -> tuple[Any, None]:
        for kind, block, tree in zip(kinds, blocks, trees, strict=True):
            x = kind.call(partial(block.apply, {"params": tree}), x)
        return x, None

    return jax.lax.scan(step, x, trees)[0]


def with_runs(
    params: Params, block: str, path: str = "", *, periods: Periods | None = None
) -> Params:
    """Returns `params` with runs of `LEAST` or more equal blocks stacked.

    Args:
        block: pattern of the paths of blocks, such as `Family.block`: at the root of the tree, or of
            an entry that holds the blocks of an expert.
        path: of `params`, with a slash at its end.
        periods: of a network whose blocks differ in turn, the names of those that may be in runs
            (`NetworkModule.block_periods`): a run is of whole periods, each block of the first one
            naming a stack. None: every block is a period of its own, in the order of numbers.
    """
    if RUNS in params:
        return params
    names = [name for name in params if re.fullmatch(block, f"{path}{name}")]
    if not names and not path:
        return {
            name: with_runs(tree, block, f"{name}/") if isinstance(tree, Mapping) else tree
            for name, tree in params.items()
        }
    runs: dict[str, Params] = {}
    rest = dict(params)
    for chain in numbered(names) if periods is None else [periods]:
        for group in equal_neighbors(params, chain):
            if len(group) * len(group[0]) >= LEAST and len(group) > 1:
                for members in zip(*group, strict=True):
                    runs[members[0]] = stacked([rest.pop(name) for name in members])
    return {**rest, RUNS: runs} if runs else params


def run_members(first: str, length: int, periods: Periods | None = None) -> list[str]:
    """Returns the names of the blocks in the stack that has the name of its `first` one.

    Args:
        periods: those that `with_runs` was given.
    """
    if periods is None:
        prefix, number = split(first)
        return [f"{prefix}_{number + i}" for i in range(length)]
    (names,) = (names for names in zip(*periods, strict=True) if first in names)
    start = names.index(first)
    return list(names[start : start + length])


def split(name: str) -> tuple[str, int]:
    """Returns the prefix and the number of a block's name."""
    found = NUMBERED.fullmatch(name)
    return (found[1], int(found[2])) if found else (name, -1)


def numbered(names: Iterable[str]) -> list[Periods]:
    """Returns blocks in chains of consecutive numbers, each block a period of its own."""
    chains: list[list[tuple[str]]] = []
    for name in sorted(names, key=split):
        if chains and follows(chains[-1][-1][0], name):
            chains[-1].append((name,))
        else:
            chains.append([(name,)])
    return list(chains)


def equal_neighbors(params: Mapping[str, Any], periods: Periods) -> list[Periods]:
    """Returns consecutive periods in groups whose trees can be stacked."""
    groups: list[list[tuple[str, ...]]] = []
    for names in periods:
        pairs = zip(groups[-1][-1], names, strict=True) if groups else ()
        if groups and all(alike(params[first], params[second]) for first, second in pairs):
            groups[-1].append(names)
        else:
            groups.append([names])
    return list(groups)


def follows(first: str, second: str) -> bool:
    """Returns whether two names are of consecutive blocks."""
    (prefix, number), other = split(first), split(second)
    return other == (prefix, number + 1)


def alike(first: Any, second: Any) -> bool:
    """Returns whether two trees agree in structure, static settings, shapes and dtypes.

    Trees with static scales are never alike: the row of a timestep is chosen before the network runs.
    """
    structures = [jax.tree.structure(tree) for tree in (first, second)]
    if len(set(structures)) > 1 or has_static(first):
        return False
    shapes = ([(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(t)] for t in (first, second))
    return next(shapes) == next(shapes)


def has_static(tree: Any) -> bool:
    """Returns whether an activation quantizer of a tree has calibrated scales."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, ActQuant))
    return any(isinstance(node, ActQuant) and node.spec.mode == "static" for node in nodes)


@jax.jit
def stacked(trees: list[Any]) -> Any:
    """Returns one tree of the trees' arrays, each on a new first axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
