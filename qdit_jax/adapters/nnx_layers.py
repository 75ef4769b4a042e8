"""NNX layers whose kernel or input is quantized, in place of those of `flax.nnx`.

Every array of a packed kernel is an `nnx.Param` of its own, so that `nnx.split`, `nnx.jit`, `nnx.scan`,
filters on `nnx.Param` and checkpoints see arrays as ever.
"""

from __future__ import annotations

from typing import Any, ClassVar, Generic, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from qdit_jax.adapters.layout import Contraction, KernelLayout, as_tuple, of_axes, of_einsum
from qdit_jax.adapters.product import KernelOrigin, multiplier
from qdit_jax.quant import ActQuant, QTensor
from qdit_jax.types import Tree

# What can be quantized; a subclass that computes otherwise cannot.
Layer: TypeAlias = nnx.Linear | nnx.LinearGeneral | nnx.Einsum


class PackedParam(nnx.Param):
    """One array of a quantized kernel or of its input's quantizer; not to be trained."""


class Packed(nnx.Module, Generic[Tree]):
    """A pytree whose arrays are Params: a `QTensor`, or an `ActQuant`."""

    def __init__(self, tree: Tree) -> None:
        leaves, self.structure = jax.tree_util.tree_flatten_with_path(tree)
        self.names = tuple(jax.tree_util.keystr(path, simple=True) for path, _ in leaves)
        for name, (_, leaf) in zip(self.names, leaves, strict=True):
            setattr(self, name, PackedParam(leaf))

    def tree(self) -> Tree:
        """Returns the pytree of the arrays as they are now."""
        return jax.tree.unflatten(self.structure, [getattr(self, name)[...] for name in self.names])


class QuantizedLayer(nnx.Module):
    """A layer that multiplies by a quantized kernel, by a quantized input, or both.

    It has the attributes of the layer that it stands for, but for the kernel where that is quantized.
    """

    STANDS_FOR: ClassVar[type[nnx.Module]] = nnx.Linear

    def __init__(
        self,
        layer: Layer,
        weight: QTensor | None,
        act: ActQuant | None,
        origin: KernelOrigin,
        numerics: str,
    ) -> None:
        for name, value in vars(layer).items():
            if not name.startswith("_") and (name != "kernel" or weight is None):
                setattr(self, name, value)
        self.weight = nnx.data(None if weight is None else Packed(weight))
        self.act_quant = nnx.data(None if act is None else Packed(act))
        self.origin = origin
        self.numerics = numerics

    def ways(self, ndim: int) -> Contraction:
        """Returns how the axes of an input of `ndim` axes and of the kernel correspond."""
        return of_axes(ndim, (-1,), (), (self.out_features,))

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """Returns the layer's output.

        Raises:
            ValueError: if `out_sharding` is given, which a quantized product does not take.
        """
        check_out_sharding(out_sharding)
        return self.product(inputs, self.ways(jnp.ndim(inputs)))

    def product(self, inputs: Array, ways: Contraction) -> Array:
        """Returns the output of a product whose axes correspond as `ways` says."""
        kernel = self.kernel[...] if self.weight is None else self.weight.tree()
        act = None if self.act_quant is None else self.act_quant.tree()
        bias = None if self.bias is None else self.bias[...]
        x, _, bias = self.promote_dtype(
            (inputs, jnp.zeros((), self.origin.dtype), bias), dtype=self.dtype
        )
        result = self.preferred_element_type or x.dtype
        rows = ways.rows(x.astype(jnp.promote_types(x.dtype, result)))
        multiply = multiplier(kernel, act, self.numerics, self.precision, self.origin.layout)
        y = ways.result(multiply(rows, ways), x.shape).astype(result)
        return y if bias is None else y + jnp.reshape(bias, ways.bias_shape(y.shape))

    def __getattr__(self, name: str) -> Any:  # of the layer that it stands for
        if name == "kernel":
            raise AttributeError(
                "this layer's kernel is quantized; other code that reads it needs full precision: "
                "leave the layer out with a recipe's rule that has no spec."
            )
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}.")


class QuantizedLinear(QuantizedLayer):
    """Stands for `nnx.Linear`."""


class QuantizedLinearGeneral(QuantizedLayer):
    """Stands for `nnx.LinearGeneral`."""

    STANDS_FOR = nnx.LinearGeneral

    def ways(self, ndim: int) -> Contraction:
        """Returns how the axes of an input of `ndim` axes and of the kernel correspond."""
        batch = tuple(sorted(axis % ndim for axis in self.batch_axis))
        return of_axes(ndim, as_tuple(self.axis), batch, as_tuple(self.out_features))


class QuantizedEinsum(QuantizedLayer):
    """Stands for `nnx.Einsum`."""

    STANDS_FOR = nnx.Einsum

    def ways(self, ndim: int, einsum_str: str | None = None) -> Contraction:
        """Returns how the axes of the operands correspond in an equation, by default the layer's.

        Raises:
            ValueError: if the equation is no product of matrices.
        """
        return of_einsum(einsum_str or self.einsum_str, ndim, tuple(self.kernel_shape))

    def __call__(  # type: ignore[override]  # as nnx.Einsum's
        self, inputs: Array, einsum_str: str | None = None, out_sharding: Any = None
    ) -> Array:
        """Returns the output of the layer's equation, or of the one that is given."""
        check_out_sharding(out_sharding)
        return self.product(inputs, self.ways(jnp.ndim(inputs), einsum_str))


class QuantizedLoRALinear(QuantizedLayer):
    """Stands for `nnx.LoRALinear`; the two small matrices stay in full precision."""

    STANDS_FOR = nnx.LoRALinear

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """Returns the quantized layer's output plus that of the low-rank matrices."""
        return super().__call__(inputs, out_sharding) + self.lora(inputs)


KINDS: tuple[type[QuantizedLayer], ...] = (
    *(QuantizedLinear, QuantizedLinearGeneral),
    *(QuantizedEinsum, QuantizedLoRALinear),
)


def check_out_sharding(out_sharding: Any) -> None:
    """Raises `ValueError` for an output sharding, which quantized products do not take."""
    if out_sharding is not None:
        raise ValueError(
            f"out_sharding={out_sharding} is not supported by a quantized layer; constrain its "
            "output with jax.lax.with_sharding_constraint, or leave the layer out."
        )


def kind_of(layer: nnx.Module) -> type[QuantizedLayer] | None:
    """Returns the class that stands for a layer's; None if there is none.

    A subclass whose `__call__` is its own is not what it derives from.
    """
    for kind in KINDS:
        if isinstance(layer, kind.STANDS_FOR) and type(layer).__call__ is kind.STANDS_FOR.__call__:
            return kind
    return None


def layout_of(layer: Layer) -> KernelLayout:
    """Returns the axes of a layer's kernel; a stack's own come before them.

    Raises:
        ValueError: if the layer computes no product of matrices, or has a product of its own.
    """
    if getattr(layer, "dot_general_cls", None) is not None or (
        getattr(layer, "dot_general", None) not in (None, jax.lax.dot_general)
    ):
        raise ValueError("it has a dot_general of its own.")
    if isinstance(layer, nnx.Einsum):
        if layer.einsum_op is not jnp.einsum:
            raise ValueError("it has an einsum_op of its own.")
        operands = layer.einsum_str.partition("->")[0]
        shape: tuple[int, ...] = tuple(layer.kernel_shape)
        ndim = len(operands.partition(",")[0].replace(".", ""))
        ways = of_einsum(layer.einsum_str, ndim, shape)
    elif isinstance(layer, nnx.LinearGeneral):
        batch, inputs = tuple(layer.batch_axis.values()), as_tuple(layer.in_features)
        shape = (*batch, *inputs, *as_tuple(layer.out_features))
        first = len(batch) + len(inputs)
        axes = tuple(range(len(shape)))
        return KernelLayout(shape, axes[: len(batch)], axes[len(batch) : first], axes[first:])
    else:
        return KernelLayout((layer.in_features, layer.out_features), (), (0,), (1,))
    return KernelLayout(shape, ways.k_batch, ways.k_in, ways.k_out)
