"""Classifier-free guidance (Ho and Salimans, arXiv:2207.12598) as a wrapper of `denoise_fn`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from qdit_jax.diffusion.posterior import DenoiseFn, Latents
from qdit_jax.diffusion.sharded import in_auto_axes
from qdit_jax.types import Condition, Numbers

ScaleFn = Callable[[Array], Array]  # timesteps [B] -> the scale of every sample [B]


def as_pytree(denoise_fn: DenoiseFn) -> DenoiseFn:
    """Returns `denoise_fn` as something that `jax.jit` accepts as an argument.

    A registered pytree is returned as it is: its arrays are arguments.  A plain function becomes
    static, compared by identity, and the arrays it closes over become constants; pass large ones
    with `jax.tree_util.Partial(function, params)` instead.
    """
    leaves = jax.tree.leaves(denoise_fn)
    is_plain = len(leaves) == 1 and leaves[0] is denoise_fn
    return jax.tree_util.Partial(denoise_fn) if is_plain else denoise_fn


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SteppedScale:
    """A scale of guidance that changes at a timestep: `(timestep [B]) -> [B]`.

    Wan 2.2 A14B guides its expert of high noise by 4 and that of low noise by 3:
    `SteppedScale(boundary=875.0, at_or_above=4.0, below=3.0)`. Any function of the timesteps `[B]`,
    in the network's unit, may stand in its place; see `guided`.
    """

    boundary: Any
    at_or_above: Any
    below: Any

    def __call__(self, timestep: Num[Array, " B"]) -> Float[Array, " B"]:
        """Returns every sample's scale."""
        above = jnp.asarray(self.at_or_above, jnp.float32)
        return jnp.where(timestep >= self.boundary, above, self.below)


def of_samples(timestep: Num[Array, "B *moments"]) -> Num[Array, " B"]:
    """Returns a timestep per sample: the greatest of its tokens, where those have their own.

    Tokens of frames that are given and not denoised are at 0.
    """
    return timestep if timestep.ndim == 1 else timestep.reshape(len(timestep), -1).max(axis=1)


def check_condition(denoise_fn: DenoiseFn, condition: Condition) -> None:
    """Calls `denoise_fn.check_condition(condition)`, if there is one; it may raise."""
    check = getattr(denoise_fn, "check_condition", None)
    if check is not None:
        check(condition)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Guided:
    """A guided `denoise_fn`: one model call on a batch of conditional and null samples.

    Its fields are pytrees of any kind: functions, arrays, conditions.
    """

    denoise_fn: Any
    scale: Any
    null: Any
    channels: int | None = dataclasses.field(metadata={"static": True})

    def __call__(
        self, x: Latents, timestep: Num[Array, "B *moments"], condition: Condition
    ) -> Array:
        """Returns the conditional output with its first `channels` channels guided."""
        return in_auto_axes(_guided, x, timestep, condition, self)

    def of_pairs(
        self, x: Latents, timestep: Num[Array, "B *moments"], condition: Condition
    ) -> Array:
        """Returns the same, for arrays whose sharding the compiler chooses."""
        # A sample and its null sample are neighbors: a sharded batch needs no communication.
        output = self.denoise_fn(
            jnp.repeat(x, 2, axis=0),
            jnp.repeat(timestep, 2, axis=0),
            jax.tree.map(_side_by_side, condition, self.null_of(condition)),
        )
        scale = self.scale(of_samples(timestep)) if callable(self.scale) else self.scale
        return _combined(output[0::2], output[1::2], scale, self.channels, x.shape[-1])

    def null_of(self, condition: Condition) -> Condition:
        """Returns the null condition of every sample."""
        if self.null is None:
            return self.denoise_fn.null_condition(condition)
        return jax.tree.map(
            lambda null, given: jnp.broadcast_to(jnp.asarray(null, given.dtype), given.shape),
            self.null,
            jax.tree.map(jnp.asarray, condition),
        )

    def check_condition(self, condition: Condition) -> None:
        """Raises what the guided function raises for unknown conditions."""
        check_condition(self.denoise_fn, condition)


def _guided(
    x: Latents,
    timestep: Num[Array, "B *moments"],
    condition: Condition,
    guided_fn: Guided | GuidedDoubled,
) -> Array:
    return guided_fn.of_pairs(x, timestep, condition)


def _side_by_side(condition: Numbers, null: Numbers) -> Array:
    pairs = jnp.stack([jnp.asarray(condition), jnp.asarray(null)], axis=1)
    return pairs.reshape(-1, *pairs.shape[2:])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class GuidedDoubled:
    """The published rule on doubled batches; see `guided_doubled`."""

    denoise_fn: Any
    scale: Any
    channels: int | None = dataclasses.field(metadata={"static": True})

    def __call__(self, x: Latents, timestep: Num[Array, " B"], condition: Condition) -> Array:
        """Returns the output, both halves guided the same way in the first `channels` channels."""
        return in_auto_axes(_guided, x, timestep, condition, self)

    def of_pairs(self, x: Latents, timestep: Num[Array, " B"], condition: Condition) -> Array:
        """Returns the same, for arrays whose sharding the compiler chooses."""
        half = x.shape[0] // 2
        output = self.denoise_fn(jnp.concatenate([x[:half], x[:half]]), timestep, condition)
        cond, null = output[:half], output[half:]
        first = _combined(cond, null, self.scale, self.channels, x.shape[-1])
        num_guided = x.shape[-1] if self.channels is None else self.channels
        second = jnp.concatenate([first[..., :num_guided], null[..., num_guided:]], axis=-1)
        return jnp.concatenate([first, second])

    def check_condition(self, condition: Condition) -> None:
        """Raises what the guided function raises for unknown conditions."""
        check_condition(self.denoise_fn, condition)


def _combined(
    cond: Float[Array, "B *D O"],
    null: Float[Array, "B *D O"],
    scale: Numbers,
    channels: int | None,
    num_channels: int,
) -> Float[Array, "B *D O"]:
    num_guided = num_channels if channels is None else channels
    if num_guided > num_channels:
        raise ValueError(
            f"channels={channels} but the latents have {num_channels}; use at most "
            f"{num_channels}, or None for all."
        )
    eps, null_eps = cond[..., :num_guided], null[..., :num_guided]
    scale = jnp.asarray(scale, eps.dtype)
    if scale.ndim == 1:  # one scale per sample
        scale = scale.reshape(-1, *(1,) * (eps.ndim - 1))
    return jnp.concatenate([null_eps + scale * (eps - null_eps), cond[..., num_guided:]], axis=-1)


def guided(
    denoise_fn: DenoiseFn,
    scale: Numbers | ScaleFn,
    *,
    null: Condition = None,
    channels: int | None = 3,
) -> Guided:
    """Returns `denoise_fn` with guidance: `null + scale (conditional - null)`.

    `channels=3` guides the first three channels as the published DiT does, `None` all channels of
    the latents as diffusers does.  Channels that are not guided, such as the variance's, come from
    the conditional output.  `scale` is a number or one number per sample; it may be traced. A
    function `(timestep [B]) -> [B]`, a pytree such as `SteppedScale`, scales by the timestep.
    The model is called once, on twice the batch: sample i conditional, then sample i null.

    Args:
        null: the null condition, a pytree that broadcasts to the batch's conditions; by default
            `denoise_fn.null_condition(condition)`.
    """
    if channels is not None and channels < 1:
        raise ValueError(f"channels={channels} is not supported; use 1 or more, or None for all.")
    scale = as_pytree(scale) if callable(scale) else scale
    return Guided(as_pytree(denoise_fn), scale, null, channels)


def guided_doubled(
    denoise_fn: DenoiseFn, scale: Numbers, *, channels: int | None = 3
) -> GuidedDoubled:
    """Returns the published `forward_with_cfg`: both halves pass through the sampler.

    The batch is `[x, x]` with conditions `[condition, null]`; the second half's `x` is not read.  Channels
    that are not guided follow each half's own output.  The first half equals `guided`.
    """
    return GuidedDoubled(as_pytree(denoise_fn), scale, channels)
