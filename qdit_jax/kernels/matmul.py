"""`quantized_matmul`: `numerics` chooses what is computed, `implementation` by which code."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qdit_jax.kernels.epilogue import ACTIVATIONS, Gated, followed
from qdit_jax.kernels.product import PLATFORMS, Implementation, Numerics, Product, invalid_reason
from qdit_jax.kernels.prologue import Pending, plain
from qdit_jax.kernels.table import IMPLEMENTATIONS
from qdit_jax.quant import ActQuant, ActSpec, QTensor, WeightSpec
from qdit_jax.types import AnyArray


def quantized_matmul(
    x: Float[AnyArray, "*lead K"],
    q: QTensor,
    act: ActQuant | ActSpec | None = None,
    numerics: Numerics | str = "simulated",
    implementation: str | None = None,
    *,
    out_dtype: str | None = None,
    bias: Float[AnyArray, " N"] | None = None,
    activation: str | None = None,
) -> Float[Array, "*lead N"]:
    """Returns `x @ q` `[*lead, N]` in the dtype of `x`, with `x` quantized as `act` says.

    Args:
        x: floating point; any leading axes.
        q: the kernel `[K, N]`.
        act: None leaves `x` as it is; an `ActSpec` quantizes it dynamically; an `ActQuant` may
            carry calibrated scales.
        numerics: what is computed. "simulated" is float arithmetic on the quantized grid, what
            papers measure; "integer" multiplies the stored elements and scales their sums, what
            hardware runs: int8 dots with int32 accumulators for integers, FP4 and mixtures of
            these; dots of bfloat16 with FP8 elements and of float32 with NF4's, which hold them
            exactly, summed in float32. They agree to float rounding, but for FP8 on NVIDIA's Hopper, whose
            kernel has sums of 14 bits inside of 128 channels.
        implementation: the code that computes it, a name in `IMPLEMENTATIONS`; None takes the first
            that fits, for each platform that the program is compiled for.
        out_dtype: of the result, in place of the dtype of `x`. A kernel then writes 16 bits itself.
        bias: added to the result, by a kernel in float32.
        activation: of the result, after the bias: "gelu_tanh" or None.

    Raises:
        ValueError: with the reason that `unsupported_reason` returns, or for an unknown activation.
    """
    (y,) = fused_matmul(
        jnp.asarray(x),
        q,
        act,
        numerics,
        implementation,
        out_dtype=out_dtype,
        bias=bias,
        activation=activation,
    )
    return y


def fused_matmul(
    x: Float[Array, "*lead K"] | Pending,
    q: QTensor,
    act: ActQuant | ActSpec | None = None,
    numerics: Numerics | str = "simulated",
    implementation: str | None = None,
    *,
    out_dtype: str | None = None,
    bias: Float[AnyArray, " N"] | None = None,
    activation: str | None = None,
    gated: Gated | None = None,
    parts: int = 1,
) -> tuple[Float[Array, "*lead M"], ...]:
    """Returns the parts of `quantized_matmul` with what comes before and after it, where a kernel may do it.

    Args:
        x: an array, or a norm and its modulation.
        gated: what the result is added to, times its gate. A kernel that does it does not round the
            result to `out_dtype` before.
        parts: how many arrays the output channels are split among, evenly. A kernel writes them apart,
            so that nothing has to be copied.

    Raises:
        ValueError: as `quantized_matmul`.
    """
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not known; use {', '.join(ACTIVATIONS)}.")
    product = Product(
        x.shape, q, act, numerics, platform=default_platform(), dtype=jnp.dtype(x.dtype).name
    )
    reason = unsupported(product, implementation)
    if reason is not None:
        raise ValueError(reason)
    quantizer = ActQuant(act) if isinstance(act, ActSpec) else act
    bias = None if bias is None else jnp.asarray(bias)
    static = (numerics, implementation, out_dtype or product.dtype, activation)
    if any(entry.run_fused for entry in entries_of(product, implementation)):
        return _fused(x, q, quantizer, bias, gated, *static, parts)
    # Outside of it, where XLA fuses them with their neighbors.
    (y,) = _fused(plain(x), q, quantizer, bias, None, *static, 1)
    return followed(y, gated, parts)


def entries_of(product: Product, implementation: str | None) -> list[Implementation]:
    """Returns who computes a product on any platform: the named one, or the first that fits on each."""
    if implementation is not None:
        return [IMPLEMENTATIONS[implementation]]
    return [
        first_that_fits(dataclasses.replace(product, platform=platform)) for platform in PLATFORMS
    ]


@functools.partial(jax.jit, static_argnums=(5, 6, 7, 8, 9))
def _fused(
    x: Float[Array, "*lead K"] | Pending,
    q: QTensor,
    act: ActQuant | None,
    bias: Float[Array, " N"] | None,
    gated: Gated | None,
    numerics: str,
    implementation: str | None,
    dtype: str,
    activation: str | None,
    parts: int,
) -> tuple[Float[Array, "*lead M"], ...]:
    if math.prod(x.shape) == 0:
        return followed(jnp.zeros((*x.shape[:-1], q.shape[1]), dtype), gated, parts)

    def run(entry: Implementation) -> Callable[..., tuple[Array, ...]]:
        return lambda x, q, act, bias, gated: entry.fused(
            x, q, act, numerics, dtype, bias, activation, gated, parts
        )

    if implementation is not None:
        return run(IMPLEMENTATIONS[implementation])(x, q, act, bias, gated)
    product = Product(x.shape, q, act, numerics, "another", jnp.dtype(x.dtype).name)
    elsewhere = first_that_fits(product)
    chosen = {
        platform: entry
        for platform in PLATFORMS
        if (entry := first_that_fits(dataclasses.replace(product, platform=platform))) != elsewhere
    }
    branches = {platform: run(entry) for platform, entry in chosen.items()}
    found: tuple[Array, ...] = jax.lax.platform_dependent(
        x, q, act, bias, gated, default=run(elsewhere), **branches
    )
    return found


def unsupported_reason(
    x_shape: tuple[int, ...],
    weight: QTensor | WeightSpec,
    act: ActSpec | ActQuant | None = None,
    numerics: str = "simulated",
    implementation: str | None = None,
    *,
    dtype: str,
    platform: str | None = None,
) -> str | None:
    """Returns why the product cannot run this way, one sentence, or None if it can.

    Only shapes and settings are read, so arrays may be abstract or traced. `dtype` is the input's, of a
    layer that of its network. `platform` is one of `PLATFORMS`, by default that of JAX's default backend.
    """
    product = Product(x_shape, weight, act, numerics, checked_platform(platform), dtype)
    return unsupported(product, implementation)


def unsupported(product: Product, implementation: str | None) -> str | None:
    """Returns why `implementation`, or with None every one, cannot compute `product`."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        names = ", ".join(IMPLEMENTATIONS)
        return f"implementation={implementation!r} is not known; use one of {names}."
    reason = invalid_reason(product)
    if reason is not None:
        return reason
    if implementation is not None:
        reason = IMPLEMENTATIONS[implementation].unsupported_reason(product)
        return None if reason is None else f"implementation={implementation!r}: {reason}"
    reasons = [entry.unsupported_reason(product) for entry in IMPLEMENTATIONS.values()]
    return None if None in reasons else " ".join(map(str, reasons))


def first_that_fits(product: Product) -> Implementation:
    """Returns the first row of the table that computes `product`."""
    return next(
        entry for entry in IMPLEMENTATIONS.values() if entry.unsupported_reason(product) is None
    )


def expected(product: Product) -> Implementation:
    """Returns the row that computes a product on a machine of its platform that has all the row needs."""
    return next(entry for entry in IMPLEMENTATIONS.values() if entry.fits(product))


def implementation_of(
    x_shape: tuple[int, ...],
    weight: QTensor | WeightSpec,
    act: ActSpec | ActQuant | None = None,
    numerics: str = "simulated",
    platform: str | None = None,
    *,
    dtype: str,
) -> str:
    """Returns the name of the implementation that `quantized_matmul` takes; for reports.

    `dtype` and `platform` are as in `unsupported_reason`.

    Raises:
        ValueError: with the reason that `unsupported_reason` returns.
    """
    product = Product(x_shape, weight, act, numerics, checked_platform(platform), dtype)
    reason = unsupported(product, None)
    if reason is not None:
        raise ValueError(reason)
    return first_that_fits(product).name


def passed_over(
    x_shape: tuple[int, ...],
    weight: QTensor | WeightSpec,
    act: ActSpec | ActQuant | None = None,
    numerics: str = "simulated",
    platform: str | None = None,
    *,
    dtype: str,
) -> str | None:
    """Returns why XLA computes a product and not the kernel that the platform has for its kind.

    That is `NAME: sentence`; None where a kernel computes it, or none is for this kind and platform.
    """
    product = Product(x_shape, weight, act, numerics, checked_platform(platform), dtype)
    if unsupported(product, None) is not None or first_that_fits(product).meant_for is not None:
        return None
    for row in IMPLEMENTATIONS.values():
        if row.meant_for is not None and row.meant_for(product):
            return f"{row.name}: {row.unsupported_reason(product)}"
    return None


def checked_platform(platform: str | None) -> str:
    """Returns `platform`, by default JAX's; raises `ValueError` for an unknown one."""
    if platform is not None and platform not in PLATFORMS:
        raise ValueError(f"platform={platform!r} is not known; use one of {', '.join(PLATFORMS)}.")
    return platform or default_platform()


def default_platform() -> str:
    """Returns the name in `PLATFORMS` of JAX's default backend."""
    backend = jax.default_backend()
    if backend != "gpu":
        return backend
    return "rocm" if "rocm" in jax.devices()[0].client.platform_version.lower() else "cuda"
