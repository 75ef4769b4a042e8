"""`Linear`, the only place where a kernel leaf, array or `QTensor`, is consumed.

Dimensions: K input channels, N output channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from qdit_jax.kernels import (
    Gated,
    Mapped,
    Pending,
    activated,
    followed,
    fused_matmul,
    layer_numerics,
    plain,
)
from qdit_jax.quant import InputMap, QTensor, Role, slots
from qdit_jax.types import AnyArray

DTYPES = ("float32", "bfloat16")
KNOWN_OUTPUT = "known_output"  # the entry of a layer whose output was computed before

Initializer = Callable[..., Any]
xavier: Initializer = nn.initializers.xavier_uniform()


@dataclasses.dataclass(frozen=True)
class Layers:
    """What a network builds its layers with: how they compute is said here and nowhere else.

    A network passes it on to its parts, which say `layers.linear(width, name="fc1")`.

    Attributes:
        numerics, implementation: of quantized products, see `kernels.quantized_matmul`.
        dtype: of products of full-precision operands, one of `DTYPES`.
    """

    numerics: str = "simulated"
    implementation: str | None = None
    dtype: str = "float32"

    def linear(
        self,
        features: int,
        kernel_init: Initializer = xavier,
        kernel_shape: tuple[int, ...] | None = None,
        *,
        wide_output: bool = False,
        name: str | None,
    ) -> Linear:
        """Returns a `Linear` that computes this way; the arguments are its fields.

        In a module's `setup` the name is None: the attribute names the layer.
        """
        return Linear(
            features,
            kernel_init,
            kernel_shape,
            self.numerics,
            self.implementation,
            self.dtype,
            wide_output,
            name=name,
        )


class Linear(nn.Module):
    """Returns `x @ kernel + bias` over the last axis, full precision or quantized.

    Params: `kernel` (array `[..., N]` whose leading axes flatten to K, or a `QTensor`), `bias [N]`,
    and the slots of `quant.LEAVES` that are present: `act_quant` (an `ActQuant`) quantizes the input.
    In their place, `known_output` is returned as it is.
    `numerics` is `"simulated"` (float arithmetic on the quantized grid) or `"integer"`, and
    `implementation` who computes it; see `kernels.quantized_matmul`. A layer whose input is not
    quantized is a float product in both.

    With `dtype="bfloat16"`, the operands of a product of which neither is a quantized input are
    bfloat16 (sums are float32), and so is the output, unless `wide_output` asks for float32. A
    quantized input is multiplied as ever: its grid has no place in 16 bits. With `"float32"` the
    output has the dtype that `x` has.
    """

    features: int
    kernel_init: Initializer = xavier
    kernel_shape: tuple[int, ...] | None = None
    numerics: str = "simulated"
    implementation: str | None = None
    dtype: str = "float32"
    wide_output: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*batch K"]) -> Float[Array, "*batch N"]:
        if (known := optional(self, KNOWN_OUTPUT)) is not None:
            return known
        shape = self.kernel_shape or (x.shape[-1], self.features)
        kernel = stored(self, "kernel", self.kernel_init, shape)
        bias = stored(self, "bias", nn.initializers.zeros_init(), (self.features,))
        x = mapped_input(self, x)
        if isinstance(kernel, QTensor):
            (y,) = self.quantized_product(x, kernel, bias)
        else:
            y = self.product(quantized_input(self, x), kernel)
            y = y + bias.astype(y.dtype)
        y = with_outputs(self, x, y)
        return y if self.dtype == "float32" else y.astype(self.output_dtype)

    def fused(
        self,
        x: Float[Array, "*batch K"] | Pending,
        activation: str | None = None,
        gated: Gated | None = None,
    ) -> Float[Array, "*batch N"]:
        """Returns `activation(self(x))`, where a kernel may compute what comes before and after its product.

        `x` may be a norm and its modulation, `activation` is a name of `kernels.epilogue`, and `gated` what the
        result is added to. A layer that is not quantized, that adds more to its product, or whose own input or
        output is seen or changed by who intercepts `is_watched`, is called as ever.
        """
        return self.with_neighbors(x, activation, gated, 1)[0]

    def fused_parts(
        self, x: Float[Array, "*batch K"] | Pending, parts: int
    ) -> tuple[Float[Array, "*batch M"], ...]:
        """Returns `fused(x)`, its channels in several arrays."""
        return self.with_neighbors(x, None, None, parts)

    def with_neighbors(
        self,
        x: Float[Array, "*batch K"] | Pending,
        activation: str | None,
        gated: Gated | None,
        parts: int,
    ) -> tuple[Float[Array, "*batch M"], ...]:
        """Returns what `fused` and `fused_parts` do."""
        kernel = optional(self, "kernel")
        fuses = isinstance(kernel, QTensor) and not leaves_of(self, "output")
        if not fuses or self.is_watched():
            return followed(activated(self(plain(x)), activation), gated, parts)
        x = pending_input(self, x)
        settings = {"activation": activation, "gated": gated, "parts": parts}
        return self.quantized_product(x, kernel, optional(self, "bias"), **settings)

    def is_watched(self) -> bool:
        """Returns whether someone has to see the layer's own output; who intercepts says yes."""
        return False

    def quantized_product(
        self,
        x: Float[Array, "*batch K"] | Pending,
        kernel: QTensor,
        bias: Float[AnyArray, " N"],
        **neighbors: Any,
    ) -> tuple[Float[Array, "*batch M"], ...]:
        """Returns the product of a mapped input with the bias, as wide as the output; see `fused_matmul`."""
        act_quant, left = optional(self, "act_quant"), x
        if not isinstance(x, Pending):
            left = self.left_operand(x) if act_quant is None else input_left(self, x)
        return fused_matmul(
            left,
            kernel,
            act_quant,
            layer_numerics(act_quant, self.numerics),
            self.implementation,
            out_dtype=left.dtype.name if self.dtype == "float32" else self.output_dtype,
            bias=bias,
            **neighbors,
        )

    def left_operand(self, x: Float[Array, "*batch K"]) -> Float[Array, "*batch K"]:
        """Returns what output leaves leave of a mapped input, before the quantizer if any."""
        x = input_left(self, x)
        if self.dtype == "float32":
            return x
        return x.astype(jnp.float32 if leaves_of(self, "quantizer") else self.dtype)

    def product(
        self, x: Float[AnyArray, "*batch K"], kernel: Float[AnyArray, "*axes N"]
    ) -> Float[Array, "*batch N"]:
        """Returns `x @ kernel` in the dtype of `x`, or as wide as the output."""
        sums = None
        if self.dtype != "float32":
            sums = jnp.promote_types(x.dtype, self.output_dtype)
        # Two axes: on CPU the gradient of a product over [B, T, K] is twice as slow.
        rows = jnp.matmul(
            x.reshape(-1, x.shape[-1]),
            kernel.reshape(-1, self.features).astype(x.dtype),
            preferred_element_type=sums,
        )
        return rows.reshape(*x.shape[:-1], self.features)

    @property
    def output_dtype(self) -> str:
        """The dtype of the output, where products are in 16 bits."""
        return "float32" if self.wide_output else self.dtype


def mapped_input(module: nn.Module, x: Array) -> Array:
    """Returns a layer's input after its input leaves, if it has any."""
    for leaf in leaves_of(module, "input"):
        x = leaf(x)
    return x


def pending_input(module: nn.Module, x: Array | Pending) -> Array | Pending:
    """Returns what `mapped_input` does, not computed yet where a quantizer may do it."""
    leaves = leaves_of(module, "input")
    if not leaves_of(module, "quantizer") or any(not isinstance(leaf, InputMap) for leaf in leaves):
        return mapped_input(module, plain(x))
    return Mapped(x, leaves[0]) if leaves else x


def input_left(module: nn.Module, x: Array) -> Array:
    """Returns what the layer's output leaves leave of a mapped input to the kernel's product."""
    for leaf in leaves_of(module, "output"):
        x = leaf.rest(x)
    return x


def quantized_input(module: Linear, x: Array) -> Array:
    """Returns what the kernel is multiplied with: of a mapped input, after the quantizer if any."""
    x = module.left_operand(x)
    for leaf in leaves_of(module, "quantizer"):
        x = leaf(x)
    return x


def with_outputs(module: nn.Module, x: Array, y: Array) -> Array:
    """Returns a layer's output `y` with what its output leaves make of the mapped input added."""
    for leaf in leaves_of(module, "output"):
        y = y + leaf(x).astype(y.dtype)
    return y


def leaves_of(module: nn.Module, role: Role) -> list[Any]:
    """Returns the leaves of that role that stand beside a layer's kernel, in the table's order."""
    found = (optional(module, slot) for slot in slots(role))
    return [leaf for leaf in found if leaf is not None]


def stored(module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...]) -> Any:
    """Returns the param `name` as it is stored, whatever its type; creates it during `init`.

    Differs from `module.param` in that a quantized leaf's shape is not compared with `shape`.
    """
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init, shape)


def optional(module: nn.Module, name: str) -> Any:
    """Returns the entry `name` beside a layer's params, or None when it is absent."""
    return module.get_variable("params", name) if module.has_variable("params", name) else None


def check_dtype(dtype: object) -> None:
    """Raises `ValueError` unless `dtype` is one that networks compute in."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not supported; use one of {', '.join(DTYPES)}.")
