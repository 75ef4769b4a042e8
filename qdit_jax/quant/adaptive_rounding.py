"""AdaRound (arXiv:2004.10568): learns for every weight whether to round it down or up.

A weight's code is `floor(w / scale) + h(v)` with a learned v and the rectified sigmoid h, which
reaches 0 and 1 exactly. The objective is the layer's output error, which for one linear layer
depends on its inputs through their Hessian only, plus a term that drives every h to 0 or 1.

Dimensions: K input channels, N output channels, G groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Num

from qdit_jax.quant import groups
from qdit_jax.quant.division import quotient
from qdit_jax.quant.finite import check_finite
from qdit_jax.quant.gptq_rounding import damped, nan_unless_finite
from qdit_jax.quant.qtensor import (
    QTensor,
    affine_map,
    check_kernel,
    code_at,
    grid_of,
    with_codes,
)
from qdit_jax.quant.specs import WeightSpec
from qdit_jax.types import Numbers

# The rectified sigmoid's stretch (paper, equation 23).
_LOW, _HIGH = -0.1, 1.1


@dataclasses.dataclass(frozen=True)
class AdaRoundSettings:
    """How long and how hard to learn.

    Attributes:
        num_steps: optimizer steps.
        learning_rate: Adam's at the start; it falls to a tenth along a cosine.
        strength: greatest weight of `polarization`, reached along a linear ramp. From 1/4 on,
            no rounding stays undecided because its own error is least there.
        warmup, cooldown: fractions of the steps before and after that ramp.
    """

    num_steps: int = 500
    learning_rate: float = 2e-2
    strength: float = 0.5
    warmup: float = 0.1
    cooldown: float = 0.1


def rectified_sigmoid(v: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Returns the fraction in [0, 1] by which a code is rounded up."""
    return jnp.clip(jax.nn.sigmoid(v) * (_HIGH - _LOW) + _LOW, 0, 1)


def initial_logits(
    w: Float[Array, "K N"], scale: Float[Array, "K N"], offset: Float[Array, "*#s"]
) -> Float[Array, "K N"]:
    """Returns the v whose `soft_codes` stand for `w` itself, as far as the grid reaches."""
    steps = quotient(w, scale) + (offset - jnp.floor(offset))
    fraction = steps - jnp.floor(steps)
    return jax.scipy.special.logit((fraction - _LOW) / (_HIGH - _LOW))


def soft_codes(
    w: Float[Array, "K N"],
    v: Float[Array, "K N"],
    scale: Float[Array, "*#s"],
    offset: Float[Array, "*#s"],
    bits: int,
) -> Float[Array, "K N"]:
    """Returns codes between those below and above `w`; whole where the sigmoid is 0 or 1.

    `scale` and `offset` (the code of 0.0) broadcast to `w`.
    """
    whole = jnp.floor(offset)  # with two levels of scales, the offset has a fraction
    below = jnp.floor(quotient(w, scale) + (offset - whole))
    return jnp.clip(below + rectified_sigmoid(v) + whole, 0, 2**bits - 1)


def decided(v: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Returns the v whose sigmoid is exactly 0 or 1, whichever is nearer to that of `v`."""
    return jnp.where(rectified_sigmoid(v) >= 0.5, jnp.inf, -jnp.inf)


def wide_grid(grid: QTensor) -> tuple[Float[Array, "K N"], Float[Array, "K N"]]:
    """Returns a kernel's scale and its code of 0.0 for every weight, float32."""
    scale, zero = (groups.expand_groups(a, grid.shape, grid.group_size) for a in affine_map(grid))
    return scale, zero


def ramp(progress: Float[Array, ""], warmup: float, cooldown: float) -> Float[Array, ""]:
    """Returns 0 during the warm-up, 1 during the cool-down, and the linear way between them."""
    return jnp.clip((progress - warmup) / (1 - warmup - cooldown), 0, 1)


def polarization(
    v: Float[Array, "K N"], cost: Float[Array, "K N"], power: Float[Array, ""] | float | int = 2
) -> Float[Array, ""]:
    """Returns `sum cost * (1 - |2h - 1|**power)`, 0 when every rounding is decided.

    Differs from AdaRound, which weighs all roundings alike: `cost` is a rounding's own squared
    output error, `diag(H) * scale**2`. With outlier channels a constant weight leaves exactly
    those roundings undecided that matter most.
    """
    return jnp.sum(cost * (1 - jnp.abs(2 * rectified_sigmoid(v) - 1) ** power))


def adaround(
    w: Numbers,
    hessian: Numbers,
    spec: WeightSpec,
    *,
    settings: AdaRoundSettings | None = None,
) -> QTensor:
    """Returns `w` on the grid that `spec` gives it, with learned rounding.

    `hessian` is `sum x xᵀ` over the layer's inputs, in any scale. Deterministic. An output
    channel whose error did not fall keeps its round-to-nearest codes. Works under vmap.

    Raises:
        TypeError, ValueError: as `quantize`; also if `hessian` is not `[K, K]` or not finite
            (traced, the result is NaN), or `spec` has a number format.
    """
    w, hessian = check_kernel(w, spec), jnp.asarray(hessian)
    if spec.fmt is not None:
        raise ValueError(f"AdaRound learns integer codes, not the format {spec.fmt.name!r}.")
    if hessian.shape != (w.shape[0], w.shape[0]):
        expected = (w.shape[0], w.shape[0])
        raise ValueError(f"hessian has shape {hessian.shape}; w {w.shape} needs {expected}.")
    check_finite("hessian", hessian)
    return _adaround(w, hessian, spec=spec, settings=settings or AdaRoundSettings())


@partial(jax.jit, static_argnames=("spec", "settings"))
def _adaround(
    w: Float[Array, "K N"], hessian: Num[Array, "K K"], spec: WeightSpec, settings: AdaRoundSettings
) -> QTensor:
    w, hessian = w.astype(jnp.float32), hessian.astype(jnp.float32)
    grid = nan_unless_finite(grid_of(w, spec), hessian)
    positive, _, tries = damped(hessian, 0.01)
    # With an indefinite Hessian the error could be negative, and learning would seek just that.
    hessian = jnp.where(tries > 0, positive, hessian)
    scale, offset = wide_grid(grid)

    def channel_error(codes: Float[Array, "K N"]) -> Float[Array, " N"]:
        difference = (codes - offset) * scale - w  # [K, N]
        product = jnp.matmul(hessian, difference, precision=jax.lax.Precision.HIGHEST)
        return jnp.sum(difference * product, axis=0)

    nearest = code_at(quotient(w, scale), offset, spec.bits)
    base = channel_error(nearest)  # [N]
    # The error of rounding to nearest; `tiny` avoids a division by 0.
    unit = jnp.maximum(jnp.sum(base), jnp.finfo(jnp.float32).tiny)
    cost = jnp.diagonal(hessian)[:, None] * jnp.square(scale)  # [K, N], see `polarization`

    def objective(v: Float[Array, "K N"], progress: Float[Array, ""]) -> Float[Array, ""]:
        error = jnp.sum(channel_error(soft_codes(w, v, scale, offset, spec.bits)))
        pull = settings.strength * ramp(progress, settings.warmup, settings.cooldown)
        return (error + pull * polarization(v, cost)) / unit

    v = _minimize(objective, initial_logits(w, scale, offset), settings)
    learned = soft_codes(w, decided(v), scale, offset, spec.bits)
    codes = jnp.where(channel_error(learned) <= base, learned, nearest)
    return with_codes(grid, codes.astype(jnp.uint8))


def _minimize(
    objective: Callable[[Array, Array], Array], v: Float[Array, "K N"], settings: AdaRoundSettings
) -> Float[Array, "K N"]:
    optimizer = optax.adam(
        optax.cosine_decay_schedule(settings.learning_rate, settings.num_steps, alpha=0.1)
    )

    def step(
        state: tuple[Array, optax.OptState], i: Int[Array, ""]
    ) -> tuple[tuple[Array, optax.OptState], None]:
        v, opt_state = state
        gradient = jax.grad(objective)(v, i / settings.num_steps)
        with jax.numpy_dtype_promotion("standard"):  # optax counts steps in int32
            updates, opt_state = optimizer.update(gradient, opt_state)
        return (optax.apply_updates(v, updates), opt_state), None

    (v, _), _ = jax.lax.scan(
        step, (v, optimizer.init(v)), jnp.arange(settings.num_steps, dtype=jnp.int32)
    )
    return v
