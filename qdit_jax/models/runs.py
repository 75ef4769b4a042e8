"""Runs of blocks that are alike, stacked and scanned: one compiled block for all of a run.

A checkpoint's tree has an entry for every block. An execution form of it has, in the entry `RUNS`, one
tree for each run of consecutive blocks whose trees agree in all but the arrays' values, its arrays
stacked on a new first axis. The function is the same; a program of it compiles in the time of one
block for each run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from qdit_jax.quant import ActQuant
from qdit_jax.types import Params

RUNS = "block_runs"  # the entry's name in a parameter tree
# Fewer are compiled one by one: a scanned block copies its weights on CPU.
LEAST = 8
NUMBERED = re.compile(r"(.+)_(\d+)")


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
        make_fn: makes a block: called with `name=` of one, or with `parent=None` for a run.
        x: what a block takes first and returns: a pytree.
        args: what every block takes beside it.
        first: the number of the first one. A network whose blocks are not all made alike calls this
            for each neighborhood of equal ones; their parameters must differ from their neighbors'
            in shape or name, so that no run holds both.
    """
    runs: Params = (
        module.get_variable("params", RUNS) if module.has_variable("params", RUNS) else {}
    )
    number = first
    while number < first + count:
        name = f"{prefix}_{number}"
        if name not in runs:
            x, number = make_fn(name=name)(x, *args), number + 1
            continue
        block = make_fn(parent=None)

        def step(x: Any, params: Params, block: nn.Module = block) -> tuple[Any, None]:
            return block.apply({"params": params}, x, *args), None

        x, _ = jax.lax.scan(step, x, runs[name])
        number += jax.tree.leaves(runs[name])[0].shape[0]
    return x


def with_runs(params: Params, block: str) -> Params:
    """Returns `params` with runs of `LEAST` or more equal blocks stacked.

    Args:
        block: pattern of the names of blocks, such as `Family.block`, at the root of the tree.
    """
    names = sorted(
        (name for name in params if re.fullmatch(block, name)), key=lambda name: split(name)
    )
    rest = {name: tree for name, tree in params.items() if name not in names}
    runs: dict[str, Params] = {}
    for group in equal_neighbors(params, names):
        if len(group) < LEAST:
            rest |= {name: params[name] for name in group}
        else:
            runs[group[0]] = stacked([params[name] for name in group])
    return {**rest, RUNS: runs} if runs else params


def split(name: str) -> tuple[str, int]:
    """Returns the prefix and the number of a block's name."""
    found = NUMBERED.fullmatch(name)
    return (found[1], int(found[2])) if found else (name, -1)


def equal_neighbors(params: Mapping[str, Any], names: list[str]) -> list[list[str]]:
    """Returns the names in groups of consecutive blocks whose trees can be stacked."""
    groups: list[list[str]] = []
    for name in names:
        if groups and follows(groups[-1][-1], name) and alike(params[groups[-1][-1]], params[name]):
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


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
