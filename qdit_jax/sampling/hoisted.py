"""Modulation computed before the sampling loop ("hoisted"): once for all timesteps, not in every step.

The layers of a family's part `rounded_first` (adaLN) see the timestep and the condition only. On a fixed grid of
timesteps their outputs are one table: a step reads its row, and none of their weights.

Dimensions: T timesteps, B samples, L blocks of a run, N channels of a layer.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Num

from qdit_jax.diffusion import on_one_device
from qdit_jax.models import (
    KNOWN_OUTPUT,
    RUNS,
    Linear,
    NetworkModule,
    family_of,
    run_members,
    without_null,
)
from qdit_jax.quant import OVER_TIME
from qdit_jax.sampling.conditions import num_conditions
from qdit_jax.sampling.denoisers import Denoiser, denoiser
from qdit_jax.sampling.own_guidance import PUBLISHED, Guidance
from qdit_jax.sampling.per_device import (
    BATCH,
    Layout,
    layout_of,
    on_each_device,
    run_per_device,
)
from qdit_jax.sampling.running import known_family, running_params
from qdit_jax.sampling.spare_memory import MOST_BYTES
from qdit_jax.types import Condition, Params

SAME_TIMESTEP = 2.0**-20  # of the greatest: what two ways to compute a timestep differ by
Outputs = dict[str, Float[Array, "T B ..."]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class HoistedDenoiser:
    """A `Denoiser` for a fixed grid of timesteps, the outputs of whose modulation are known.

    Attributes:
        params: in the form in which the network runs.
        known: by path of the layer in `params`: `[T, B, ...]`, or `[T, L, B, ...]` of a run of blocks.
        timesteps: of the grid, `[T]`.
        condition: that the outputs were computed for, as the network is given it.
    """

    params: Params
    known: Mapping[str, Array]
    timesteps: Array
    condition: Condition
    model: nn.Module = dataclasses.field(metadata={"static": True})

    def __call__(
        self, x: Float[Array, "B ..."], timestep: Num[Array, " B"], condition: Condition
    ) -> Array:
        """Returns the network's output; NaN at another timestep or condition than the known ones.

        Raises:
            ValueError: if the condition has other shapes.
        """
        is_known = same_arrays(without_null(condition), self.condition)
        distance = jnp.abs(self.timesteps - timestep[0].astype(self.timesteps.dtype))
        index = jnp.argmin(distance)
        params = self.params
        for path, rows in self.known.items():
            params = with_layer(params, path.split("/"), {KNOWN_OUTPUT: rows[index]})
        output = Denoiser(params, self.model)(x, timestep, condition)
        near = SAME_TIMESTEP * jnp.max(jnp.abs(self.timesteps))
        is_known &= (distance[index] <= near) & jnp.all(timestep == timestep[0])
        return jnp.where(is_known, output, jnp.nan)

    def check_condition(self, condition: Condition) -> None:
        """Raises `ValueError` for conditions unknown to the network, unless they are traced."""
        Denoiser(self.params, self.model).check_condition(condition)

    def null_condition(self, condition: Condition) -> Condition:
        """Returns the null condition, with the same entries."""
        return Denoiser(self.params, self.model).null_condition(condition)


def hoisted(
    model: nn.Module,
    params: Params,
    timesteps: Sequence[float],
    condition: Condition,
    guidance: Guidance | None = PUBLISHED,
    guidance_channels: int | str | None = PUBLISHED,
    *,
    most_bytes: int = MOST_BYTES,
) -> Callable[..., Array]:
    """Returns `denoiser(model, params, guidance)` for these timesteps and conditions only.

    Args:
        params: of the checkpoint, not yet in another form.
        timesteps: `sampler_timesteps(sampler)`, and those at which Heun's rule looks.
        condition: of the batch that will be sampled, in its order.
        guidance, guidance_channels: as in `denoiser`.
        most_bytes: that the known outputs may take.

    Raises:
        ValueError: as `hoisting`, if the outputs take more than `most_bytes`, or there is no condition.
    """
    if (num_samples := num_conditions(condition)) is None:
        raise ValueError("no condition says how many samples there are; use generate(hoist=True).")
    denoiser_of = hoisting(
        model, params, timesteps, guidance, guidance_channels, most_bytes=most_bytes
    )
    return denoiser_of(condition, num_samples)


def hoisting(
    model: nn.Module,
    params: Params,
    timesteps: Sequence[float],
    guidance: Guidance | None = PUBLISHED,
    guidance_channels: int | str | None = PUBLISHED,
    *,
    most_bytes: int = MOST_BYTES,
    shape: Sequence[int] | None = None,
    falls_back: bool = False,
    mesh: Mesh | None = None,
) -> Callable[[Condition, int], Callable[..., Array]]:
    """Returns the function from the conditions of a batch, and its size, to its denoiser, see `hoisted`.

    Parameters take their form for running once, and batches of one size compile once. `shape` is that of a
    sample, by default the network's own. With `falls_back`, a batch whose outputs take more than `most_bytes` gets
    the denoiser that knows none. Over the axis `batch` of `mesh`, on which parameters and conditions are, each device
    computes what its own samples need, at most so many bytes.

    Raises:
        ValueError: if the family has no layers that see the condition only, or bits change over time; of the
            function, if the outputs take more than `most_bytes`, unless it falls back.
    """
    check_hoisting(model, params)
    denoise_fn = denoiser(model, params, guidance, guidance_channels)
    if mesh is not None:
        denoise_fn = on_each_device(denoise_fn, mesh)
    grid = jnp.asarray(timesteps, jnp.float32)
    pattern = family_of(model).part_pattern(family_of(model).rounded_first)
    size = tuple(shape or model.sample_shape())
    parts = 1 if mesh is None else mesh.shape[BATCH]
    with nullcontext() if mesh is None else on_one_device():  # as each of them computes
        running = running_params(model, params)

    @partial(jax.jit, static_argnames=("num_samples", "layout"))
    def compute(*given: Any, num_samples: int, layout: Layout | None) -> tuple[Outputs, Condition]:
        own = partial(known_outputs, pattern=pattern, shape=(num_samples // parts, *size))
        specs = PartitionSpec(None, BATCH), PartitionSpec(BATCH)
        found: tuple[Outputs, Condition] = run_per_device(layout, own, given, specs)
        return found

    def denoiser_of(condition: Condition, num_samples: int) -> Callable[..., Array]:
        given = (denoise_fn, grid, condition)
        layout = None if mesh is None else layout_of(given, mesh)
        settings: Any = {"num_samples": num_samples, "layout": layout}
        abstract, _ = jax.eval_shape(partial(compute, **settings), *given)
        total = sum(leaf.size * leaf.dtype.itemsize for leaf in abstract.values()) // parts
        if total > most_bytes and falls_back:
            found = denoiser(model, running, guidance, guidance_channels)
            return found if mesh is None else on_each_device(found, mesh)
        if total > most_bytes:
            raise ValueError(
                f"the outputs at {len(grid)} timesteps take {total / 1e6:.0f} MB, more than "
                f"most_bytes={most_bytes}; sample fewer at a time, or leave them in the loop."
            )
        outputs, seen = compute(*given, **settings)
        known = in_runs(model, running, outputs)
        if mesh is not None:
            known = {path: split_rows(path, rows, mesh) for path, rows in known.items()}
        inner = HoistedDenoiser(running, known, grid, seen, model)
        if isinstance(denoise_fn, Denoiser):
            return inner
        return dataclasses.replace(denoise_fn, denoise_fn=inner)  # type: ignore[type-var]

    return denoiser_of


def check_hoisting(
    model: nn.Module, params: Params, *, first_frames: object = None, shard_tokens: int = 1
) -> None:
    """Raises `ValueError` for what has no modulation that could be computed before the loop."""
    reason = unhoistable_reason(model, params, first_frames, shard_tokens)
    if reason is not None:
        raise ValueError(reason)


def unhoistable_reason(
    model: nn.Module, params: Params, first_frames: object, shard_tokens: int
) -> str | None:
    """Returns why no modulation could be computed before the loop, one sentence, or None."""
    family = known_family(model)
    if family is None or not family.rounded_first:
        return f"{type(model).__name__} has no layers that see the condition only."
    if OVER_TIME in params or RUNS in params:
        return (
            "bits that change over time, or blocks in runs, cannot be hoisted; give the params of a "
            "checkpoint, with the same bits at all timesteps."
        )
    if first_frames is not None:
        return "first frames have timesteps of their own, which cannot be hoisted."
    if shard_tokens != 1:
        return f"hoisting takes whole samples, and shard_tokens is {shard_tokens}."
    return None


def known_outputs(
    denoise_fn: Callable[..., Array],
    timesteps: Float[Array, " T"],
    condition: Condition,
    *,
    pattern: str,
    shape: tuple[int, ...],
) -> tuple[Outputs, Condition]:
    """Returns the outputs of the layers that a pattern names, at every timestep, by path.

    Beside them, the condition that the network is given: with guidance, null conditions as well. All of a step
    for samples of `shape` is traced; compiled, nothing is left but what these layers need.
    """

    def at(timestep: Float[Array, ""]) -> tuple[dict[str, Array], Condition]:
        found: dict[str, Array] = {}
        given: list[Condition] = []

        def keep(next_fn: Any, args: Any, kwargs: Any, context: Any) -> Any:
            if context.method_name in ("runs_all_experts", "is_watched"):
                return True  # what is seen inside a branch could not leave it
            output = next_fn(*args, **kwargs)
            if context.method_name != "__call__" or context.module.scope is None:
                return output
            path = "/".join(context.module.path)
            if not path:
                given.append(args[2])
            elif isinstance(context.module, Linear) and re.fullmatch(pattern, path):
                if path in found:
                    raise ValueError(f"{path} is called several times, and cannot be hoisted.")
                found[path] = output
            return output

        with nn.intercept_methods(keep):
            denoise_fn(jnp.zeros(shape, jnp.float32), jnp.full(shape[0], timestep), condition)
        return found, given[0]

    return jax.vmap(at, out_axes=(0, None))(timesteps)


def same_arrays(first: Condition, second: Condition) -> Bool[Array, ""]:
    """Returns whether two conditions agree; raises `ValueError` if their shapes do not."""
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (first, second)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the condition has shapes {shapes[0]}; hoisted were {shapes[1]}.")
    equal = jax.tree.map(lambda a, b: jnp.all(a == b), first, second)
    return jnp.all(jnp.asarray(jax.tree.leaves(equal)))


def in_runs(model: nn.Module, params: Params, outputs: Outputs) -> dict[str, Array]:
    """Returns outputs by the path that a layer has in `params`, those of a run of blocks stacked."""
    rest, found = dict(outputs), {}
    for first, tree in params.get(RUNS, {}).items():
        assert isinstance(model, NetworkModule)
        length = jax.tree.leaves(tree)[0].shape[0]
        names = run_members(first, length, model.block_periods())
        for path in [path for path in outputs if path.split("/")[0] == first]:
            layer = path.split("/", 1)[1]
            members = [rest.pop(f"{name}/{layer}") for name in names]
            found[f"{RUNS}/{first}/{layer}"] = jnp.stack(members, axis=1)
    return {**rest, **found}


def split_rows(path: str, rows: Float[Array, "T *lead"], mesh: Mesh) -> Float[Array, "T *lead"]:
    """Returns known outputs with the samples of a batch split over a mesh, see `HoistedDenoiser.known`."""
    before = 2 if path.startswith(f"{RUNS}/") else 1
    return jax.device_put(rows, NamedSharding(mesh, PartitionSpec(*[None] * before, BATCH)))


def with_layer(params: Params, path: Sequence[str], layer: Mapping[str, Any]) -> Params:
    """Returns a tree with what one layer holds replaced."""
    if not path:
        return dict(layer)
    return {**params, path[0]: with_layer(params[path[0]], path[1:], layer)}
