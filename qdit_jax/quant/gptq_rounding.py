"""GPTQ (arXiv:2210.17323): rounding in which later channels compensate the errors of earlier ones.

For inputs x with Hessian `H = sum x xᵀ`, channels are rounded one after another; each one's
error is spread over the channels not yet rounded, along the rows of the upper Cholesky factor U
of `H⁻¹ = Uᵀ U`.

Dimensions: K input channels, N output channels, G groups, B scales per row; P is K padded to whole
blocks of `BLOCK` channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num, UInt8

from qdit_jax.quant import groups
from qdit_jax.quant.division import quotient
from qdit_jax.quant.finite import check_finite
from qdit_jax.quant.qtensor import (
    QTensor,
    affine_map,
    check_kernel,
    code_at,
    from_codes,
    grid_of,
    nearest_codes,
    with_codes,
)
from qdit_jax.quant.rows import dequantize
from qdit_jax.quant.specs import WeightSpec
from qdit_jax.quant.stored_scales import stored_scale
from qdit_jax.types import AnyArray, Numbers

BLOCK = 128
_DAMPING_TRIES = 8
# Scale and code of 0.0 of each group and output channel.
Grid = tuple[Float[Array, "G N"], Float[Array, "G N"]]
# How often the damping was raised, the damping, and the factor it gives.
Attempt = tuple[Int[Array, ""], Float[Array, ""], Float[Array, "K K"]]


@jax.jit
def accumulate_hessian(
    hessian: Float[Array, "K K"],
    x: Float[Array, "*lead K"],
    weight: Float[AnyArray, ""] | float | int = 1.0,
) -> Float[Array, "K K"]:
    """Returns `hessian + weight * sum x xᵀ` in float32; start from zeros, keep no activations."""
    tokens = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    precision = jax.lax.Precision.HIGHEST
    return hessian + weight * jnp.matmul(tokens.T, tokens, precision=precision)


def gptq(
    w: Numbers,
    hessian: Numbers,
    spec: WeightSpec,
    *,
    damping: float = 0.01,
    holdout: Numbers | None = None,
) -> QTensor:
    """Returns `w` on the grid that `spec` gives it, rounded in the robust form of GPTQ.

    Groups are static (the grid comes from `w` before any compensation), channels are visited by
    falling diag(H), a channel without input is set to 0, and the damping (a fraction of the mean
    diagonal) is raised tenfold until the factorization succeeds; if it was, an output channel keeps its
    round-to-nearest codes where GPTQ does not lower the error. Any scale of `hessian` will do.
    Works under jit and vmap; the memory is that of a few `[K, N]` and `[K, K]` float32 arrays.

    Args:
        holdout: the Hessian `[K, K]` of other inputs. If given, an output channel keeps its
            round-to-nearest codes where GPTQ does not lower the error on those.

    Raises:
        TypeError, ValueError: as `quantize`; also if `hessian` is not `[K, K]` or not finite
            (traced, the result is NaN), or `spec` has a number format.
    """
    w, hessian = _check(w, hessian, spec)
    if holdout is not None:
        _, holdout = _check(w, holdout, spec, "holdout")
    return _gptq(w, hessian, damping, holdout, spec=spec)


@partial(jax.jit, static_argnames="spec")
def _gptq(
    w: Float[Array, "K N"],
    hessian: Num[Array, "K K"],
    damping: Float[Array, ""] | float,
    holdout: Num[Array, "K K"] | None,
    spec: WeightSpec,
) -> QTensor:
    w, hessian = w.astype(jnp.float32), hessian.astype(jnp.float32)
    num_channels = w.shape[0]
    alive = jnp.any(hessian != 0, axis=1)  # [K]
    order = jnp.argsort(-jnp.diagonal(hessian))  # [K], position -> channel
    stored = nan_unless_finite(grid_of(w, spec), hessian)
    grid = _wide_grid(stored)
    live = jnp.where(alive[:, None], w, 0)
    positive, factor, tries = damped(hessian[order][:, order], damping)
    size = groups.effective_group_size(num_channels, spec.group_size)
    # A channel keeps the group of its own index, wherever it is visited.
    codes, _ = _round_channels(live[order], factor, grid, (order // size), spec, None)
    codes = jnp.zeros_like(codes).at[order].set(codes)  # back in the order of the channels
    nearest = nearest_codes(live, stored)

    def better_on(inputs: Num[Array, "K K"]) -> UInt8[Array, "K N"]:
        errors = [
            channel_errors(w, with_codes(stored, chosen), inputs) for chosen in (codes, nearest)
        ]
        return jnp.where(errors[0] <= errors[1], codes, nearest)

    if holdout is not None:
        codes = better_on(holdout)
    else:
        # A sum of x xᵀ has no negative eigenvalues, and the first damping suffices. Where it did not,
        # GPTQ's codes have to prove better than the nearest ones.
        where = jnp.argsort(order)  # channel -> position
        codes = jax.lax.cond(tries > 0, lambda: better_on(positive[where][:, where]), lambda: codes)
    return with_codes(stored, codes)


def nan_unless_finite(grid: QTensor, hessian: Num[Array, "K K"]) -> QTensor:
    """Returns `grid`, with NaN scales if `hessian`, traced and so not refused, is not finite."""
    sound = jnp.all(jnp.isfinite(hessian))
    if grid.has_levels:
        return dataclasses.replace(
            grid, channel_scale=jnp.where(sound, grid.channel_scale, jnp.nan)
        )
    return dataclasses.replace(grid, scale=jnp.where(sound, grid.scale, jnp.nan))


def qdit_release_gptq(
    w: Numbers, hessian: Numbers, spec: WeightSpec, *, damping: float = 0.01
) -> QTensor:
    """Returns `w` rounded as the Q-DiT release's GPTQ does; pass `range_fn=ranges.qdit_release_gptq`.

    Channels are visited in order. A group's grid is taken from the running weights when its
    first channel is reached, but those are refreshed every 128 channels only, so a group that
    starts inside a block is measured without the errors of that block. The grid of a whole
    channel (group size 0) is taken before channels without input are set to 0.

    Differs from the release where a clip ratio would move a zero point beyond the last code: it
    is clamped, because packed zero points have as many bits as the codes.

    Raises:
        TypeError, ValueError: as `gptq`; also if `spec` has two levels of scales.
    """
    w, hessian = _check(w, hessian, spec)
    if spec.has_levels:
        raise ValueError(
            "scale_levels=2 is not in the release, whose GPTQ this is; use gptq, or scale_levels=1."
        )
    return _qdit_release_gptq(w, hessian, damping, spec=spec)


@partial(jax.jit, static_argnames="spec")
def _qdit_release_gptq(
    w: Float[Array, "K N"],
    hessian: Num[Array, "K K"],
    damping: Float[Array, ""] | float,
    spec: WeightSpec,
) -> QTensor:
    w, hessian = w.astype(jnp.float32), hessian.astype(jnp.float32)
    num_channels = w.shape[0]
    size = groups.effective_group_size(num_channels, spec.group_size)
    dead = jnp.diagonal(hessian) == 0
    grid = _wide_grid(grid_of(w, spec))
    live = jnp.where(dead[:, None], 0, w)
    factor = inverse_factor(hessian, damping)
    starts = jnp.arange(0, num_channels, size, dtype=jnp.int32)  # [G], first channel of each group

    def refresh(running: Float[Array, "P N"], grid: Grid, first: Int[Array, ""]) -> Grid:
        now = _wide_grid(grid_of(running[:num_channels], spec))
        inside = ((starts >= first) & (starts < first + BLOCK))[:, None]  # [G, 1]
        return jax.tree.map(lambda new, old: jnp.where(inside, new, old), now, grid)

    group_of = jnp.arange(num_channels, dtype=jnp.int32) // size
    keep = spec.group_size == 0
    codes, (scale, offset) = _round_channels(
        live, factor, grid, group_of, spec, None if keep else refresh
    )
    # Output channels of a channel group have one scale: keep one of each.
    width = scale.shape[-1] // spec.channel_group
    scale = scale.reshape(-1, width, spec.channel_group)[..., 0]  # [G, B]
    offset = offset.reshape(-1, width, spec.channel_group)[..., 0]
    scale = stored_scale(scale, spec.scale_dtype)
    q = from_codes(codes, scale, None if spec.symmetric else offset, spec)
    return nan_unless_finite(q, hessian)


def _wide_grid(grid: QTensor) -> Grid:
    """Returns scale and code of 0.0, both float32 `[G, N]`; symmetric: the middle code."""
    scale, zero = (jnp.repeat(a, grid.channel_group, axis=-1) for a in affine_map(grid))
    return scale, zero


def inverse_factor(hessian: Float[Array, "K K"], damping: Numbers) -> Float[Array, "K K"]:
    """Returns upper triangular U with `(H + damping * mean(diag H) * I)⁻¹ = Uᵀ U`.

    Channels without input get a 1 on the diagonal first. If the factorization fails, the damping
    is raised tenfold, up to eight times; see `damped`.
    """
    return damped(hessian, damping)[1]


def damped(
    hessian: Float[Array, "K K"], damping: Numbers
) -> tuple[Float[Array, "K K"], Float[Array, "K K"], Int[Array, ""]]:
    """Returns (positive definite H, its `inverse_factor`, how often the damping was raised).

    `H = R Rᵀ` with R upper triangular comes from the Cholesky factor of H read backwards, and
    `U = R⁻¹`: one factorization instead of two, and H is never inverted. Where no damping helps,
    both are the identity, with which GPTQ rounds to nearest.
    """
    hessian = hessian.astype(jnp.float32)
    diagonal = jnp.diagonal(hessian)
    hessian = hessian + jnp.diag((diagonal == 0).astype(jnp.float32))  # channels without input
    mean = jnp.mean(jnp.abs(jnp.diagonal(hessian)))
    eye = jnp.eye(hessian.shape[0], dtype=jnp.float32)

    def attempt(amount: Float[Array, ""]) -> Float[Array, "K K"]:
        # Both axes reversed turn a lower triangular factor into an upper one, and back.
        lower = jnp.linalg.cholesky((hessian + amount * mean * eye)[::-1, ::-1])
        inverse = jax.scipy.linalg.solve_triangular(lower, eye, lower=True)
        return inverse[::-1, ::-1]

    def failed(state: Attempt) -> Bool[Array, ""]:
        tries, _, factor = state
        # A factorization that fails gives NaN.
        return (tries < _DAMPING_TRIES) & ~jnp.all(jnp.isfinite(factor))

    def retry(state: Attempt) -> Attempt:
        tries, amount, _ = state
        return tries + 1, amount * 10, attempt(amount * 10)

    # Above 0, so that raising it tenfold changes it.
    amount = jnp.maximum(jnp.float32(damping), jnp.float32(1e-8))
    state = (jnp.int32(0), amount, attempt(amount))
    tries, amount, factor = jax.lax.while_loop(failed, retry, state)
    succeeded = jnp.all(jnp.isfinite(factor))
    whole = jnp.where(succeeded, hessian + amount * mean * eye, eye)
    return whole, jnp.where(succeeded, factor, eye), tries


def _round_channels(
    w: Float[Array, "K N"],
    factor: Float[Array, "K K"],
    grid: Grid,
    group_of: Int[Array, "K"],
    spec: WeightSpec,
    refresh: Callable[[Array, Grid, Array], Grid] | None,
) -> tuple[UInt8[Array, "K N"], Grid]:
    """Returns the codes `[K, N]` of channels rounded in the order given, and the grid at the end.

    A block of 128 channels is finished before its errors reach all later channels, in one product.
    `refresh`, if given, returns the grid anew at the start of each block.
    """
    num_channels, width = w.shape
    # `refresh` counts in blocks of `BLOCK` channels, even where there are fewer.
    block = min(BLOCK, num_channels) if refresh is None else BLOCK
    pad = -num_channels % block
    w = jnp.pad(w, ((0, pad), (0, 0)))  # [P, N]
    factor = jnp.pad(factor, ((0, pad), (0, pad)))  # [P, P]
    added = jnp.arange(num_channels + pad, dtype=jnp.int32) >= num_channels
    factor = factor + jnp.diag(added.astype(jnp.float32))  # no division by 0 in padded channels
    group_of = jnp.pad(group_of, (0, pad), mode="edge")
    columns = jnp.arange(num_channels + pad, dtype=jnp.int32)

    def round_block(
        i: Int[Array, ""] | int, state: tuple[Array, Array, Grid]
    ) -> tuple[Array, Array, Grid]:
        w, codes, grid = state
        first = i * block
        if refresh is not None:
            grid = refresh(w, grid, jnp.asarray(first))
        rows = jax.lax.dynamic_slice_in_dim(w, first, block)  # [block, N]
        upper = jax.lax.dynamic_slice_in_dim(factor, first, block)  # [block, P]
        inside = jax.lax.dynamic_slice_in_dim(upper, first, block, axis=1)  # [block, block]
        members = jax.lax.dynamic_slice_in_dim(group_of, first, block)  # [block]
        scale, offset = grid[0][members], grid[1][members]  # [block, N]

        def round_one(
            j: Int[Array, ""] | int, inner: tuple[Array, Array, Array]
        ) -> tuple[Array, Array, Array]:
            rows, codes, errors = inner
            code = code_at(quotient(rows[j], scale[j]), offset[j], spec.bits)
            error = (rows[j] - (code - offset[j]) * scale[j]) / inside[j, j]
            # 0 in earlier channels: row j of an upper triangular factor starts at j.
            rows = rows - inside[j][:, None] * error
            return rows, codes.at[j].set(code.astype(jnp.uint8)), errors.at[j].set(error)

        empty = (rows, jnp.zeros((block, width), jnp.uint8), jnp.zeros((block, width), jnp.float32))
        _, new_codes, errors = jax.lax.fori_loop(0, block, round_one, empty)
        # Errors inside the block have been compensated by `round_one`.
        later = jnp.where(columns >= first + block, upper, 0)  # [block, P]
        w = w - jnp.matmul(later.T, errors, precision=jax.lax.Precision.HIGHEST)
        return w, jax.lax.dynamic_update_slice_in_dim(codes, new_codes, first, 0), grid

    state = (w, jnp.zeros(w.shape, jnp.uint8), grid)
    _, codes, grid = jax.lax.fori_loop(0, w.shape[0] // block, round_block, state)
    return codes[:num_channels], grid


def channel_errors(
    w: Float[AnyArray, "K N"], q: QTensor, hessian: Float[AnyArray, "K K"]
) -> Float[Array, "N"]:
    """Returns every output channel's squared error over the inputs that `hessian` sums up."""
    difference = w.astype(jnp.float32) - dequantize(q)
    product = jnp.matmul(hessian, difference, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(difference * product, axis=0)


@jax.jit
def output_error(
    w: Float[AnyArray, "K N"], q: QTensor, hessian: Float[AnyArray, "K K"]
) -> Float[Array, ""]:
    """Returns ‖x(w − w')‖² / ‖x w‖² over the inputs x that `hessian` sums up."""
    w = w.astype(jnp.float32)
    signal = jnp.sum(w * jnp.matmul(hessian, w, precision=jax.lax.Precision.HIGHEST))
    return jnp.sum(channel_errors(w, q, hessian)) / signal


def _check(
    w: Numbers, hessian: Numbers, spec: WeightSpec, name: str = "hessian"
) -> tuple[Float[Array, "K N"], Num[Array, "K K"]]:
    w, hessian = check_kernel(w, spec), jnp.asarray(hessian)
    if spec.fmt is not None:
        raise ValueError(f"GPTQ rounds to integer codes, not to the format {spec.fmt.name!r}.")
    if hessian.shape != (w.shape[0], w.shape[0]):
        expected = (w.shape[0], w.shape[0])
        raise ValueError(f"{name} has shape {hessian.shape}; w {w.shape} needs {expected}.")
    check_finite(name, hessian)
    return w, hessian
