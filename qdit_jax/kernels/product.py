"""A product before it runs, and the implementations that compute one: the parts of the table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array

from qdit_jax.kernels.epilogue import Gated, finished, followed
from qdit_jax.kernels.prologue import Pending, plain
from qdit_jax.quant import ActQuant, ActSpec, QTensor, WeightSpec, readied

Numerics = Literal["simulated", "integer"]
NUMERICS = ("simulated", "integer")
# The platforms that programs are compiled for, in JAX's words for `lowering_platforms`.
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


@dataclasses.dataclass(frozen=True)
class Product:
    """A product before it runs: shapes and static settings, no values.

    Attributes:
        x_shape: of the input, `[..., K]`.
        weight: the kernel, of which only static fields and shapes are read, or its spec.
        act: what quantizes the input, or None.
        numerics: what is computed, one of `NUMERICS`.
        platform: what the program is compiled for, one of `PLATFORMS`.
        dtype: name of the input's dtype.
    """

    x_shape: tuple[int, ...]
    weight: QTensor | WeightSpec
    act: ActSpec | ActQuant | None
    numerics: str
    platform: str
    dtype: str

    @property
    def act_spec(self) -> ActSpec | None:
        """The static settings of `act`."""
        return self.act.spec if isinstance(self.act, ActQuant) else self.act


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One row of the table: code that computes a product.

    Attributes:
        name: its name in reports and in the argument `implementation`.
        run: `(x, q, act, numerics) -> [*lead, N]` in the dtype of `x`; traced, `act` an `ActQuant`
            or None.
        unsupported_reason: `product -> ` why this cannot compute it, one sentence, or None.
        run_to: `(x, q, act, numerics, dtype, bias, activation) -> [*lead, N]` in any dtype, of code that
            writes its sums in 16 bits at once, with the bias added, or None, and activated, see `epilogue`;
            None where XLA does all that with the result of `run`.
        run_fused: `(x, q, act, dtype, bias, activation, gated, parts) -> ` parts of the result, of code that
            computes what `fused_matmul` takes beside; None where XLA does.
        misfit_reason: `product -> ` the same as `unsupported_reason` of a machine of the product's platform
            that has all it needs; None where it does not ask for more.
        inside: what it keeps out of memory, for counting: "weights" unpacked, "sums" of groups, "codes" of
            the input.
        ready_fn: `(q, spec of the input) -> ` the same kernel with what each product would compute of it, for a
            loop; None where there is nothing.
        kind: the dtype of the operands of its products, for counting; None where XLA multiplies the same.
        meant_for: `product -> ` whether products of this kind and platform are what it is written for, also
            where it refuses this one; None where it is written for no kind.
    """

    name: str
    run: Callable[[Array, QTensor, ActQuant | None, str], Array]
    unsupported_reason: Callable[[Product], str | None]
    run_to: Callable[..., Array] | None = None
    run_fused: Callable[..., tuple[Array, ...]] | None = None
    misfit_reason: Callable[[Product], str | None] | None = None
    inside: tuple[str, ...] = ()
    ready_fn: Callable[[QTensor, ActSpec | None], QTensor] | None = None
    kind: str | None = None
    meant_for: Callable[[Product], bool] | None = None

    def fits(self, product: Product) -> bool:
        """Returns whether it computes a product on a machine that has all it needs."""
        return (self.misfit_reason or self.unsupported_reason)(product) is None

    def fused(
        self,
        x: Array | Pending,
        q: QTensor,
        act: ActQuant | None,
        numerics: str,
        dtype: str,
        bias: Array | None = None,
        activation: str | None = None,
        gated: Gated | None = None,
        parts: int = 1,
    ) -> tuple[Array, ...]:
        """Returns the parts of what `matmul.fused_matmul` computes."""
        if self.run_fused is not None:
            return self.run_fused(x, q, act, dtype, bias, activation, gated, parts)
        y = self.product(plain(x), q, act, numerics, dtype, bias, activation)
        return followed(y, gated, parts)

    def product(
        self,
        x: Array,
        q: QTensor,
        act: ActQuant | None,
        numerics: str,
        dtype: str,
        bias: Array | None = None,
        activation: str | None = None,
    ) -> Array:
        """Returns the product in a dtype, with the bias added and activated."""
        if self.run_to is None:
            if act is not None:  # a wide result of narrow inputs
                x = x.astype(jnp.promote_types(x.dtype, dtype))
            return finished(self.run(x, q, act, numerics).astype(dtype), bias, activation)
        return self.run_to(x, q, act, numerics, dtype, bias, activation)


def ready_alone(q: QTensor, spec: ActSpec | None) -> QTensor:
    """Returns a kernel with scales and zero points as they are read; two levels of scales are so as they are."""
    return q if q.has_levels else readied(q, with_sums=False)


def layer_numerics(
    act: ActSpec | ActQuant | None,
    numerics: str,
    acts: Iterable[ActSpec | ActQuant | None] | None = None,
) -> str:
    """Returns the numerics of one layer of a network: integers need an input that is quantized.

    Where it is not (W4A16), a layer is a float product in both numerics, as one of full precision is.

    Args:
        acts: of all layers of the network: where none is quantized, the layer has the numerics that are
            asked for, which integers then refuse.
    """
    is_alone = acts is not None and all(one is None for one in acts)
    return "simulated" if act is None and numerics in NUMERICS and not is_alone else numerics


def invalid_reason(product: Product) -> str | None:
    """Returns why nothing can compute `product`, one sentence, or None if something may."""
    weight, act = product.weight, product.act
    if product.numerics not in NUMERICS:
        return f"numerics={product.numerics!r} is not known; use one of {', '.join(NUMERICS)}."
    if isinstance(weight, QTensor) and product.x_shape[-1] != weight.shape[0]:
        return f"x has {product.x_shape[-1]} channels, but the kernel has {weight.shape[0]}."
    if isinstance(act, ActSpec) and act.mode == "static":
        return "a static ActSpec needs calibrated scales; pass an ActQuant that has them."
    if isinstance(act, ActQuant) and act.is_table:
        return (
            "the static scales are a table with a row per timestep; pick one with "
            "`select_timestep(params, timestep)`, as the sampler's denoiser does, or `at(index)`."
        )
    if product.numerics == "integer" and act is None:
        return "integer numerics need quantized activations; pass act, or use numerics='simulated'."
    return None
