"""One sample over several devices: the tokens of every activation are split among them.

Every linear layer computes on a device's own tokens, whatever its numerics and quantizers (dynamic ones
are per token), and so does attention, for which keys and values are gathered; all else is left to the
compiler. A device thus holds its share of the activations, and of attention's weights, and all
parameters.

Dimensions: B batch, Q and T query and key positions, H heads, D channels of a head, K input channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from qdit_jax.kernels import Gated, Pending, followed, plain
from qdit_jax.models import AttentionModule, Linear
from qdit_jax.quant import ActQuant
from qdit_jax.types import Params

BATCH, TOKENS = "batch", "tokens"  # the axes of the mesh
Spec = tuple[str | None, ...]


class Shards:
    """The calls of one network's layers, split over a mesh; what it saw says whether that worked."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.is_inside = False
        self.most_rows = 0
        self.is_split = False  # of the call with the most rows

    @property
    def count(self) -> int:
        """How many devices share a sample's tokens."""
        return self.mesh.shape[TOKENS]

    def linear(
        self, call: Callable[[Linear, Array], Array], module: Linear, x: Array
    ) -> Array | None:
        """Returns a layer's output from split tokens; None if they cannot be split."""
        axis = self.axis_of(x.shape, range(1, x.ndim - 1))
        rows = math.prod(x.shape[1:-1])
        if rows > self.most_rows:
            self.most_rows, self.is_split = rows, axis is not None
        if axis is None:
            return None
        spec = self.spec(x.ndim, axis)
        return self.apart(module, call, (x,), (spec,), spec)

    def attention(
        self, module: nn.Module, q: Array, k: Array, v: Array, mask: Array | None = None
    ) -> Array | None:
        """Returns attention from split queries, or of split frames; None if a batch is not split."""
        if q.shape[0] % self.mesh.shape[BATCH]:
            return None
        axis = None if mask is not None else self.axis_of(q.shape, range(1, q.ndim - 3))
        if axis is not None:  # so many attentions apart: each has its own keys
            spec = self.spec(q.ndim, axis)
            return self.apart(module, "attend", (q, k, v), (spec, spec, spec), spec)
        positions = q.ndim - 3
        length = q.shape[positions]
        more = -length % self.count
        padding = [(0, more if i == positions else 0) for i in range(q.ndim)]
        split, whole = self.spec(q.ndim, positions), self.spec(k.ndim, None)
        given: list[Any] = [jnp.pad(q, padding), k, v]
        specs: list[Any] = [split, whole, whole]
        if mask is not None:
            given.append(padded_mask(mask, more))
            specs.append(self.mask_spec(mask, q.shape))
        out = self.apart(module, "attend", tuple(given), tuple(specs), split)
        return jax.lax.slice_in_dim(out, 0, length, axis=positions)

    def axis_of(self, shape: tuple[int, ...], candidates: range) -> int | None:
        """Returns the first axis that the devices can share evenly, or None."""
        if len(shape) < 3 or shape[0] % self.mesh.shape[BATCH]:
            return None
        return next((axis for axis in candidates if shape[axis] % self.count == 0), None)

    def spec(self, ndim: int, axis: int | None) -> PartitionSpec:
        """Returns the split of an array: the batch, and one axis of tokens."""
        return PartitionSpec(BATCH, *(TOKENS if i == axis else None for i in range(1, ndim)))

    def mask_spec(self, mask: Array, q_shape: tuple[int, ...]) -> PartitionSpec:
        """Returns the split of a mask `[B, T]` or `[1 or B, 1 or H, 1 or Q, T]`."""
        batch = BATCH if mask.shape[0] == q_shape[0] else None
        if mask.ndim == 2:
            return PartitionSpec(batch)
        queries = TOKENS if mask.shape[2] > 1 else None
        return PartitionSpec(batch, None, queries, None)

    def apart(
        self,
        module: nn.Module,
        method: str | Callable[..., Array],
        given: tuple[Array, ...],
        specs: tuple[PartitionSpec, ...],
        out_spec: PartitionSpec,
    ) -> Array:
        """Returns what a module's method computes on every device from its own part."""
        alone = module.clone(parent=None, name=None)
        params = dict(module.variables.get("params", {}))

        def run(params: Params, *parts: Array) -> Array:
            return cast(Array, alone.apply({"params": params}, *parts, method=method))

        call = jax.shard_map(
            run,
            mesh=self.mesh,
            in_specs=(specs_of(params), *specs),
            out_specs=out_spec,
            check_vma=False,
        )
        self.is_inside = True
        try:
            return call(params, *given)
        finally:
            self.is_inside = False


def split_fused(
    shards: Shards,
    module: Linear,
    x: Array | Pending,
    activation: str | None = None,
    gated: Gated | None = None,
) -> Array | None:
    """Returns `Linear.fused` from split tokens, with the norm before and the sum after by XLA."""

    def call(layer: Linear, x: Array) -> Array:
        return layer.fused(x, activation)

    y = shards.linear(call, module, plain(x))
    return y if y is None or gated is None else gated.plus(y)


def split_parts(
    shards: Shards, module: Linear, x: Array | Pending, parts: int
) -> tuple[Array, ...] | None:
    """Returns `Linear.fused_parts` from split tokens."""
    y = split_fused(shards, module, x)
    return None if y is None else followed(y, None, parts)


def specs_of(params: Params) -> Any:
    """Returns how a layer's parameters lie: on every device, but for what each sample has its own of."""

    def of(leaf: Any) -> Any:
        if isinstance(leaf, ActQuant):  # static scales of each sample's timestep, [B, 1, G]
            own = partial(jax.tree.map, lambda a: PartitionSpec(*(BATCH,) * (jnp.ndim(a) == 3)))
            return own(leaf)
        return jax.tree.map(lambda _: PartitionSpec(), leaf)

    return jax.tree.map(of, params, is_leaf=lambda leaf: isinstance(leaf, ActQuant))


def padded_mask(mask: Array, more: int) -> Array:
    """Returns a mask with rows for queries that are added; they may look everywhere."""
    if mask.ndim == 2 or mask.shape[2] == 1:
        return mask
    return jnp.pad(mask, ((0, 0), (0, 0), (0, more), (0, 0)), constant_values=True)


@contextmanager
def split_tokens(mesh: Mesh | None) -> Iterator[None]:
    """Splits the tokens of the networks that are applied while the context lasts; nothing for None.

    Raises:
        ValueError: if the devices cannot share the tokens of a network evenly.
    """
    if mesh is None:
        yield
        return
    shards = Shards(mesh)

    def intercept(
        next_fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        found: Any = None
        module = context.module
        if not shards.is_inside and not module.is_initializing():
            if isinstance(module, Linear) and context.method_name == "__call__":
                found = shards.linear(Linear.__call__, module, *args, **kwargs)
            elif isinstance(module, Linear) and context.method_name == "fused":
                found = split_fused(shards, module, *args, **kwargs)
            elif isinstance(module, Linear) and context.method_name == "fused_parts":
                found = split_parts(shards, module, *args, **kwargs)
            elif isinstance(module, AttentionModule) and context.method_name == "attend":
                found = shards.attention(module, *args, **kwargs)
        return next_fn(*args, **kwargs) if found is None else found

    with nn.intercept_methods(intercept):
        yield
    if not shards.is_split:
        raise ValueError(
            f"shard_tokens={shards.count}: {shards.count} devices cannot share the {shards.most_rows} "
            "tokens of a sample evenly; use a number that divides its frames, or the tokens of a frame."
        )
