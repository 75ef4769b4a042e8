"""The one sampling loop: a `lax.scan` over a sampler's rows, compiled once per length and shape.

Dimension letters: S = number of steps, B = batch, channels last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qdit_jax.diffusion.guidance import as_pytree, check_condition
from qdit_jax.diffusion.posterior import DenoiseFn
from qdit_jax.diffusion.samplers import Sampler, Step, initial_state, take_step
from qdit_jax.diffusion.sharded import where_alone
from qdit_jax.types import AnyArray, Condition, Key, Numbers, Tree


def sample(
    denoise_fn: DenoiseFn,
    sampler: Sampler,
    noise: Numbers,
    condition: Condition,
    key: Key | None = None,
    *,
    step_noise: Numbers | None = None,
) -> Float[Array, "B ..."]:
    """Returns the latents after sampling from `noise [B, H, W, C]`.

    `denoise_fn(x [B,H,W,C], timestep [B], condition)` returns the model's output; a registered
    pytree's arrays are arguments of the compiled loop (see `as_pytree`).  `condition` is any pytree
    of arrays with the batch first, or None.  It, the noise, the key and
    the sampler's coefficients are data: only shapes and the number of steps are static.

    A stochastic sampler draws its noise from `key`, one key for the batch or one per sample
    (then a sample's noise does not depend on the others), or reads `step_noise [S, B, ...]`.

    Raises:
        ValueError: if a stochastic sampler is given neither, shapes do not fit, or a condition is
            unknown to `denoise_fn.check_condition`, if there is one.
    """
    final, _ = sample_trajectory(
        denoise_fn, sampler, noise, condition, key, step_noise=step_noise, collect_fn=nothing
    )
    return final


def nothing(step: Step) -> None:
    """Returns nothing to collect."""


def whole_step(step: Step) -> Step:
    """Returns everything that a step knows."""
    return step


def sample_trajectory(
    denoise_fn: DenoiseFn,
    sampler: Sampler,
    noise: Numbers,
    condition: Condition,
    key: Key | None = None,
    *,
    step_noise: Numbers | None = None,
    collect_fn: Callable[[Step], Tree] = whole_step,  # type: ignore[assignment]
) -> tuple[Float[Array, "B ..."], Tree]:
    """Returns the final latents, and `collect_fn` of every step stacked along a first axis.

    By default that is a `Step` with `x` (what the model was given), `output`, `x0` and `x_next` as
    `[S, B, ...]` and `timestep` as `[S]`.  `collect_fn` is static: a new function, such as a lambda
    in a loop, compiles anew.

    Raises:
        ValueError: as `sample`.
    """
    noise = jnp.asarray(noise)
    condition = jax.tree.map(jnp.asarray, condition)
    if not jnp.issubdtype(noise.dtype, jnp.floating):
        raise TypeError(f"noise has dtype {noise.dtype}; give floating-point latents.")
    check_condition(denoise_fn, condition)
    num_steps = jax.tree.leaves(sampler.table)[0].shape[0]
    check_batch(condition, noise)
    if not sampler.stochastic:
        key = step_noise = None
    elif step_noise is not None:
        step_noise = jnp.asarray(step_noise)
        if step_noise.shape != (num_steps, *noise.shape):
            raise ValueError(
                f"step_noise has shape {step_noise.shape}; give {(num_steps, *noise.shape)}."
            )
        key = None
    elif key is None:
        raise ValueError("this sampler draws noise at every step; give key, or step_noise.")
    else:
        key = _typed(key, noise.shape[0])
    given = as_pytree(denoise_fn), sampler, noise, condition, key, step_noise
    with where_alone(given):
        return _sample_loop(*given, collect_fn)


def check_batch(condition: Condition, noise: AnyArray) -> None:
    """Raises `ValueError` unless every array of `condition` has one entry per sample."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(condition):
        if leaf.shape[:1] != noise.shape[:1]:
            raise ValueError(
                f"condition{jax.tree_util.keystr(path)} has shape {leaf.shape} for noise "
                f"{noise.shape}; give one entry per sample."
            )


def _typed(key: Key, num_samples: int) -> Key:
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.shape not in ((), (num_samples,)):
        raise ValueError(
            f"key has shape {key.shape}; give one key, or {num_samples}: one per sample."
        )
    return key


@jax.jit(static_argnames=("collect_fn",))
def _sample_loop(
    denoise_fn: DenoiseFn,
    sampler: Sampler,
    noise: Float[Array, "B ..."],
    condition: Condition,
    key: Key | None,
    step_noise: Float[Array, "S B ..."] | None,
    collect_fn: Callable[[Step], Tree],
) -> tuple[Float[Array, "B ..."], Tree]:
    num_steps = jax.tree.leaves(sampler.table)[0].shape[0]

    def body(
        carry: tuple[Array, Any], scanned: tuple[Any, Array, Array | None]
    ) -> tuple[tuple[Array, Any], Tree]:
        (x, state), (row, index, recorded) = carry, scanned
        drawn = recorded if key is None else _drawn(key, index, x)
        step = take_step(sampler, denoise_fn, x, state, condition, row, drawn)
        after = step.x_next.astype(x.dtype), step.state
        return after, collect_fn(step._replace(state=None))

    start = noise, initial_state(sampler, noise)
    rows = sampler.table, jnp.arange(num_steps, dtype=jnp.int32), step_noise
    (final, _), collected = jax.lax.scan(body, start, rows)
    return final, collected


def _drawn(key: Key, index: Int[Array, ""], x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    if key.ndim == 0:
        return jax.random.normal(jax.random.fold_in(key, index), x.shape, x.dtype)
    keys = jax.vmap(jax.random.fold_in, (0, None))(key, index)
    return jax.vmap(lambda one: jax.random.normal(one, x.shape[1:], x.dtype))(keys)
