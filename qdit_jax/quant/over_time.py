"""Bits of activations and weights that change over the sampling timesteps.

One entry at the root of a parameter tree says which bits the activation quantizers and the kernels of
the whole tree have at which timestep. A kernel of other bits than its own stands beside it, as
`kernel_w8`; without such entries weights are shared by all timesteps.

Dimensions: S entries of the table, L levels (different bits), B samples.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from qdit_jax.quant.act import ActQuant
from qdit_jax.quant.specs import ActSpec
from qdit_jax.types import Numbers, Tree

OVER_TIME = "act_bits_over_time"  # the entry's name in a parameter tree
UNQUANTIZED = 16
KERNEL = "kernel"
OTHER_KERNEL = re.compile(rf"(.*?){KERNEL}_w(\d+)")
# Bits of weights and of activations, None for a kernel's or quantizer's own.
Level = tuple[int | None, int | None]


def other_kernel(bits: int) -> str:
    """Returns the name of the entry beside a layer's `kernel` that holds it at other bits."""
    return f"{KERNEL}_w{bits}"


def kernel_of_other(path: str) -> tuple[str, int] | None:
    """Returns the path of the kernel that the entry `path` replaces, and its bits; else None."""
    match = OTHER_KERNEL.fullmatch(path)
    return None if match is None else (match[1] + KERNEL, int(match[2]))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["timesteps", "level"],
    meta_fields=["bits", "weight_bits"],
)
@dataclasses.dataclass(frozen=True)
class BitsOverTime:
    """Which bits activations and weights have at which timestep; the nearest entry decides.

    Attributes:
        timesteps: `[S]` float32, as the network is given them.
        level: `[S]` int32, numbers of `bits`. Data: another schedule of the same length and levels
            does not recompile.
        bits: static, one per level: 2 to 8, 16 for no quantizer, None for each quantizer's own.
        weight_bits: static, one per level; None where no level changes weights.
    """

    # Any: as in `ActQuant`.
    timesteps: Any
    level: Any
    bits: tuple[int | None, ...]
    weight_bits: tuple[int | None, ...] | None = None

    @property
    def levels(self) -> list[Level]:
        """The bits of weights and activations of every level."""
        weight_bits = self.weight_bits or (None,) * len(self.bits)
        return list(zip(weight_bits, self.bits, strict=True))

    def at(self, timestep: Numbers) -> Int[Array, "*batch"]:
        """Returns the level at `timestep`, a number or one per sample `[B]`.

        Raises:
            ValueError: if it has more axes, such as one per token.
        """
        timestep = jnp.asarray(timestep, jnp.float32)
        if timestep.ndim > 1:
            raise ValueError(
                f"timestep has shape {timestep.shape}; bits over time need one number per "
                "sample, [B]."
            )
        away = jnp.abs(timestep[..., None] - self.timesteps)
        return jnp.asarray(self.level)[jnp.argmin(away, axis=-1)]


def bits_over_time(
    timesteps: Sequence[float | int],
    act_bits: Sequence[int | None],
    levels: Sequence[int | None] | None = None,
) -> BitsOverTime:
    """Returns the table of one entry of `act_bits` per timestep.

    `levels` are the bits that may be chosen, by default those that occur.
    """
    of_levels = None if levels is None else [(None, bits) for bits in levels]
    return levels_over_time(timesteps, [(None, bits) for bits in act_bits], of_levels)


def levels_over_time(
    timesteps: Sequence[float | int],
    chosen: Sequence[Level],
    levels: Sequence[Level] | None = None,
) -> BitsOverTime:
    """Returns the table of one entry of `chosen` per timestep.

    `levels` are those that may be chosen, by default those that occur.
    """
    levels = list(dict.fromkeys(chosen)) if levels is None else list(levels)
    level = np.array([levels.index(one) for one in chosen], np.int32)
    weight_bits, act_bits = zip(*levels, strict=True)
    own = set(weight_bits) == {None}
    times = np.asarray(timesteps, np.float32)
    return BitsOverTime(times, level, act_bits, None if own else weight_bits)


def with_bits(quantizer: ActQuant, bits: int) -> ActQuant:
    """Returns an activation quantizer with other bits; a static one keeps its range.

    Raises:
        ValueError: if it has a number format, whose bits are fixed.
    """
    spec = quantizer.spec
    if bits == spec.bits:
        return quantizer
    if spec.fmt is not None:
        raise ValueError(
            f"activations in format {spec.fmt.name!r} cannot have {bits} bits at some timesteps; "
            f"use {UNQUANTIZED} there (no quantizer), or integers in the recipe."
        )
    changed = dataclasses.replace(spec, bits=bits)
    if quantizer.scale is None:
        return dataclasses.replace(quantizer, spec=changed)
    ratio = unit_step(changed) / unit_step(spec)
    zero_point = quantizer.zero_point
    if zero_point is not None:
        zero_point = jnp.clip(jnp.round(zero_point / ratio), 0, 2**bits - 1)
    return ActQuant(changed, quantizer.scale * ratio, zero_point, quantizer.timesteps)


def unit_step(spec: ActSpec) -> Array:
    """Returns the step of the codes of `spec` on a range of unit size."""
    symmetric = spec.symmetric and not spec.unsigned
    low = -jnp.ones(()) if symmetric else jnp.zeros(())
    return spec.range_fn.scale(low, jnp.ones(()), spec.bits, symmetric)


def with_act_bits(tree: Tree, bits: int | None) -> Tree:
    """Returns nested dicts with every `ActQuant` at other bits; 16 leaves them out.

    None returns the tree as it is.

    Raises:
        ValueError: as `with_bits`.
    """
    if bits is None:
        return tree

    def changed(node: Any) -> Any:
        if isinstance(node, ActQuant):
            return with_bits(node, bits)
        if not isinstance(node, Mapping):
            return node
        return {
            name: changed(entry)
            for name, entry in node.items()
            if bits != UNQUANTIZED or not isinstance(entry, ActQuant)
        }

    return changed(tree)


def with_weight_bits(tree: Tree, bits: int | None) -> Tree:
    """Returns nested dicts with every kernel at other bits, where the tree holds it at those.

    None leaves each kernel as it is. Entries of further kernels are left out.
    """

    def changed(node: Any) -> Any:
        if not isinstance(node, Mapping):
            return node
        found = {n: changed(e) for n, e in node.items() if kernel_of_other(n) is None}
        if bits is not None and (other := node.get(other_kernel(bits))) is not None:
            found[KERNEL] = other
        return found

    return changed(tree)


def applied_over_time(
    apply_fn: Callable[[Any, int | None], Array], params: Any, timestep: Numbers
) -> Array:  # [B, ...]
    """Returns `apply_fn(params, bits)` with the bits that `params` say for `timestep`.

    `apply_fn` takes parameters whose quantizers and kernels have those bits already, and the bits of
    activations, and returns an array with the batch first; without a schedule the bits are None. Each level is a branch, of which those run that
    a sample of the batch needs: one, where all samples have the same timestep.
    """
    table = params.get(OVER_TIME) if isinstance(params, Mapping) else None
    if table is None:
        return apply_fn(params, None)
    shared = {name: entry for name, entry in params.items() if name != OVER_TIME}
    branches = [
        partial(apply_fn, with_act_bits(with_weight_bits(shared, weights), bits), bits)
        for weights, bits in table.levels
    ]
    if len(branches) == 1:
        return branches[0]()
    level = table.at(timestep)
    if not isinstance(level, jax.core.Tracer):
        needed = [bool((level == i).any()) for i in range(len(branches))]
        outputs = [run() if need else None for run, need in zip(branches, needed, strict=True)]
        return combined(level, outputs)
    shape = jax.eval_shape(branches[0])
    out = jnp.zeros(shape.shape, shape.dtype)
    for i, run in enumerate(branches):
        is_chosen = level == i

        def added(out: Array, run: Any = run, is_chosen: Array = is_chosen) -> Array:
            return where_sample(is_chosen, run(), out)

        out = jax.lax.cond(is_chosen.any(), added, lambda out: out, out)
    return out


def combined(level: Int[Array, "*batch"], outputs: Sequence[Array | None]) -> Array:
    """Returns each sample of the output of its level; None stands for those that no sample needs."""
    found = [(i, out) for i, out in enumerate(outputs) if out is not None]
    whole = found[0][1]
    for i, out in found[1:]:
        whole = where_sample(level == i, out, whole)
    return whole


def where_sample(chosen: Array, x: Array, y: Array) -> Array:
    """Returns the samples of `x` where `chosen` `[B]` or `[]` is true, those of `y` elsewhere."""
    return jnp.where(chosen.reshape(chosen.shape + (1,) * (x.ndim - chosen.ndim)), x, y)
