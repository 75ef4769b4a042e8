"""The input coordinates of a layer's choices as arrays that a traced choice selects from.

A search evaluates every transform as a map of the input at run time, also where quantizing folds it
into what makes the input: the function is the same.

Dimensions: C choices, T scales and shifts, D dense rotations, B branches, K input channels, N output
channels, S channels of a rotated block, R the largest rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int

from qdit_jax.allocation.space import Space
from qdit_jax.methods import FittedChoice
from qdit_jax.quant import LowRank, Rotation
from qdit_jax.types import AnyArray, Numbers, Params

ARRAYS = ("scale", "shift", "matrix", "down", "up", "index")  # fields of `Coordinates`
HIGHEST = jax.lax.Precision.HIGHEST
NO_TURN = "none"
KINDS = (NO_TURN, "regular", "dense")  # of rotations that a transform's name can ask for
Choice: TypeAlias = Int[AnyArray, ""] | np.integer | int
# (kind, S) of every rotation among a layer's choices.
Turns: TypeAlias = tuple[tuple[str, int], ...]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["scale", "shift", "turn", "matrix"],
    meta_fields=["turns"],
)
@dataclasses.dataclass(frozen=True)
class ChosenMap:
    """The input map of one choice: `x' = ((x - shift) / scale) R`, R `turns[turn]`, `turn` traced.

    It stands in the `input_map` entry of a layer.

    Attributes:
        scale, shift: `[K]`, or None where no choice has any.
        turn: int32.
        matrix: `[K / S, S, S]` of a dense rotation, or None.
    """

    scale: Any
    shift: Any
    turn: Any
    matrix: Any
    turns: Turns

    def __call__(self, x: Float[Array, "*lead K"]) -> Float[Array, "*lead K"]:
        """Returns the mapped input, in the dtype of `x`."""
        moved = x if self.shift is None else x - self.shift
        scaled = moved if self.scale is None else moved * (1 / self.scale)
        return self.turned(scaled.astype(x.dtype))

    def of_kernel(self, kernel: Float[Array, "K N"]) -> Float[Array, "K N"]:
        """Returns the kernel that belongs to the mapped input."""
        scaled = kernel if self.scale is None else kernel * self.scale[:, None]
        return self.turned(scaled.T).T

    def turned(self, x: Float[Array, "*lead K"]) -> Float[Array, "*lead K"]:
        branches = [partial(turn, kind, size) for kind, size in self.turns]
        if len(branches) == 1:
            return branches[0](x, self.matrix)
        return jax.lax.switch(self.turn, branches, x, self.matrix)


def turn(kind: str, size: int, x: Float[Array, "*lead K"], matrix: Any) -> Float[Array, "*lead K"]:
    """Returns `x` after a rotation of that kind; `matrix` belongs to a dense one."""
    if kind == NO_TURN:
        return x
    return Rotation(kind, size, matrix=matrix if kind == "dense" else None)(x)


class InCoordinates(NamedTuple):
    """A layer in full precision in the coordinates of one choice; its function is the same.

    Attributes:
        kernel: `[K, N]`, without what the branch computes.
        bias: `[N]`, or None.
    """

    kernel: Array
    bias: Any
    input_map: ChosenMap
    low_rank: LowRank | None


@partial(
    jax.tree_util.register_dataclass,
    data_fields=list(ARRAYS),
    meta_fields=["turns"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Coordinates:
    """The coordinates of all choices of one layer, float32; what no choice has is None.

    Attributes:
        scale, shift: `[T, K]`.
        matrix: `[D, K / S, S, S]`, of dense rotations.
        down, up: `[B, K, R]` and `[B, R, N]`, of branches; a lower rank is filled with zeros.
        index: int32 `[C, 4]`: each choice's row of scales and shifts, turn, matrix and branch.
        turns: kind and block size of every rotation.
    """

    scale: Any
    shift: Any
    matrix: Any
    down: Any
    up: Any
    index: Any
    turns: Turns

    def at(
        self, choice: Choice, kernel: Float[AnyArray, "K N"], bias: Float[AnyArray, " N"] | None
    ) -> InCoordinates:
        """Returns a layer in the coordinates of one choice, traced or not."""
        index = jnp.asarray(self.index)[choice]
        scale, shift, matrix = (
            None if all_of is None else jnp.asarray(all_of)[row]
            for all_of, row in (
                (self.scale, index[0]),
                (self.shift, index[0]),
                (self.matrix, index[2]),
            )
        )
        chosen = ChosenMap(scale, shift, index[1], matrix, self.turns)
        stored = jnp.asarray(kernel)
        exact = stored.astype(jnp.float32)
        if shift is not None and bias is not None:
            bias = (bias + jnp.matmul(shift, exact, precision=HIGHEST)).astype(bias.dtype)
        new = chosen.of_kernel(exact).astype(stored.dtype)
        if self.down is None:
            return InCoordinates(new, bias, chosen, None)
        down, up = (jnp.asarray(all_of)[index[3]] for all_of in (self.down, self.up))
        rest = new.astype(jnp.float32) - jnp.matmul(down, up, precision=HIGHEST)
        return InCoordinates(rest.astype(stored.dtype), bias, chosen, LowRank(down, up))

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns everything as arrays by name, to be stored; see `of_arrays`."""
        found = {name: getattr(self, name) for name in ARRAYS}
        found["turns"] = np.array([(KINDS.index(k), size) for k, size in self.turns], np.int32)
        return {name: np.asarray(array) for name, array in found.items() if array is not None}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Coordinates:
        """Returns the coordinates that `arrays` described."""
        turns = tuple((KINDS[kind], int(size)) for kind, size in arrays["turns"])
        fields = {name: arrays.get(name) for name in ARRAYS}
        return cls(**fields, turns=turns)

    @classmethod
    def of(cls, choices: Sequence[FittedChoice]) -> Coordinates:
        """Returns the coordinates of fitted choices, of which equal ones are stored once."""
        transforms = list({id(c.transform): c.transform for c in choices}.values())
        rotations = [t.rotation for t in transforms]
        turns = tuple(dict.fromkeys(turn_of(rotation) for rotation in rotations))
        dense = [r.matrix for r in rotations if r is not None and r.kind == "dense"]
        branches = [c.branch for c in choices if c.branch is not None]
        row_of = {id(t): i for i, t in enumerate(transforms)}
        matrix_of = {id(matrix): i for i, matrix in enumerate(dense)}
        index = np.zeros((len(choices), 4), np.int32)
        count = 0
        for number, one in enumerate(choices):
            rotation = one.transform.rotation
            matrix = matrix_of.get(id(rotation.matrix), 0) if rotation is not None else 0
            # Branch 0 is that of the choices without one.
            count += one.branch is not None
            branch = count if one.branch is not None else 0
            index[number] = (
                row_of[id(one.transform)],
                turns.index(turn_of(rotation)),
                matrix,
                branch,
            )
        return cls(
            stacked([t.scale for t in transforms], 1.0),
            stacked([t.shift for t in transforms], 0.0),
            np.stack([np.asarray(m, np.float32) for m in dense]) if dense else None,
            *padded_branches(branches),
            index,
            turns,
        )


def turn_of(rotation: Rotation | None) -> tuple[str, int]:
    """Returns the kind and block size of a rotation."""
    return (NO_TURN, 1) if rotation is None else (rotation.kind, rotation.size)


def stacked(vectors: Sequence[np.ndarray | None], neutral: float) -> np.ndarray | None:
    """Returns vectors `[T, K]`, `neutral` where one is None; None if all are."""
    given = next((vector for vector in vectors if vector is not None), None)
    if given is None:
        return None
    plain = np.full(np.shape(given), neutral, np.float32)
    return np.stack([plain if v is None else np.asarray(v, np.float32) for v in vectors])


def padded_branches(
    branches: Sequence[LowRank],
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Returns `down [B, K, R]` and `up [B, R, N]`, the first of zeros, padded to the largest rank."""
    if not branches:
        return None, None
    pairs = [tuple(np.asarray(a, np.float32) for a in (b.down, b.up)) for b in branches]
    rank = max(down.shape[1] for down, _ in pairs)
    shape = (len(pairs) + 1, len(pairs[0][0]), rank)
    down, up = (
        np.zeros(shape, np.float32),
        np.zeros((shape[0], rank, pairs[0][1].shape[1]), np.float32),
    )
    for number, (one, other) in enumerate(pairs, start=1):
        down[number, :, : one.shape[1]] = one
        up[number, : len(other)] = other
    return down, up


def coordinated_params(
    params: Params, space: Space, assignment: Numbers, coordinates: Mapping[str, Coordinates]
) -> Params:
    """Returns `params` of the same function in the coordinates that `assignment` `[L]` chooses.

    Args:
        coordinates: by layer path; other layers stay as they are.
    """
    assignment = jnp.asarray(assignment)
    flat = dict(flatten_dict(params, sep="/"))
    for number, layer in enumerate(space.layers):
        if layer.path not in coordinates:
            continue
        kernel, bias = flat[f"{layer.path}/kernel"], flat.get(f"{layer.path}/bias")
        matrix = kernel.reshape(layer.shape)
        found = coordinates[layer.path].at(assignment[number], matrix, bias)
        beside = {
            "kernel": found.kernel.reshape(kernel.shape),
            "bias": found.bias,
            "input_map": found.input_map,
            "low_rank": found.low_rank,
        }
        flat |= {f"{layer.path}/{name}": leaf for name, leaf in beside.items() if leaf is not None}
    return unflatten_dict(flat, sep="/")
