"""The axes of a Flax layer's kernel that are inputs and outputs, and its product as matrices.

Dimensions: K input channels, N output channels, B products at once (batch axes of the kernel),
T rows of one product.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from qdit_jax.quant import QTensor
from qdit_jax.types import AnyArray


@dataclasses.dataclass(frozen=True)
class KernelLayout:
    """The axes of a kernel of shape `shape`: batch, inputs, outputs; stacked axes come before."""

    shape: tuple[int, ...]
    batch: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of shape `shape` is a kernel with these axes, or a stack of such."""
        first = len(shape) - len(self.shape)
        return first >= 0 and tuple(shape[first:]) == tuple(self.shape)

    def matrices(self, kernel: AnyArray) -> Array:
        """Returns `kernel` `[*stack, *shape]` as `[*stack, (B,) K, N]`; B only with batch axes.

        Raises:
            ValueError: if its last axes are not `shape`.
        """
        if not self.fits(kernel.shape):
            raise ValueError(
                f"a kernel of shape {kernel.shape} is used as {self.shape}; only stacks along "
                "leading axes (nn.scan with variable_axes={'params': 0}) can be quantized."
            )
        stacked = kernel.ndim - len(self.shape)
        order = [axis + stacked for axis in (*self.batch, *self.inputs, *self.outputs)]
        parts = [self.batch] if self.batch else []
        sizes = [self.size(axes) for axes in (*parts, self.inputs, self.outputs)]
        turned = jnp.transpose(kernel, [*range(stacked), *order])
        return turned.reshape(*kernel.shape[:stacked], *sizes)

    def size(self, axes: tuple[int, ...]) -> int:
        return math.prod(self.shape[axis] for axis in axes)


@dataclasses.dataclass(frozen=True)
class Contraction:
    """A layer's product: how the axes of its input and of its kernel correspond.

    Attributes:
        x_batch, x_rows, x_in: axes of the input: batch axes that the kernel has too, rows, and the
            axes that are summed.
        k_batch, k_in, k_out: axes of the kernel: batch axes, summed axes, features.
        features: sizes of the features.
        order: the result's axes among `[*x_batch, *x_rows, *features]`.
    """

    x_batch: tuple[int, ...]
    x_rows: tuple[int, ...]
    x_in: tuple[int, ...]
    k_batch: tuple[int, ...]
    k_in: tuple[int, ...]
    k_out: tuple[int, ...]
    features: tuple[int, ...]
    order: tuple[int, ...]

    def rows(self, x: Array) -> Shaped[Array, "B T K"]:
        """Returns the input as `[B, T, K]`."""
        turned = jnp.transpose(x, (*self.x_batch, *self.x_rows, *self.x_in))
        sizes = (
            math.prod(x.shape[axis] for axis in axes)
            for axes in (self.x_batch, self.x_rows, self.x_in)
        )
        return turned.reshape(*sizes)

    def result(self, y: Shaped[Array, "B T N"], x_shape: tuple[int, ...]) -> Array:
        """Returns the product `[B, T, N]` in the layer's own axes."""
        kept = (x_shape[axis] for axis in (*self.x_batch, *self.x_rows))
        return jnp.transpose(y.reshape(*kept, *self.features), self.order)

    def bias_shape(self, y_shape: tuple[int, ...]) -> list[int]:
        """Returns the shape in which a bias, which has no rows' axes, broadcasts to the result."""
        first = len(self.x_batch)
        rows = range(first, first + len(self.x_rows))
        return [1 if axis in rows else size for axis, size in zip(self.order, y_shape, strict=True)]

    def check_kernel(self, kernel: QTensor, num_inputs: int, layout: KernelLayout) -> None:
        """Raises `ValueError` unless `kernel` is whole, and was quantized with these axes as inputs."""
        expected = num_inputs, math.prod(self.features)
        ways = (self.k_batch, self.k_in, self.k_out)
        batch_axes = kernel.codes.ndim - 2
        if (
            tuple(kernel.shape) != expected
            or batch_axes != bool(self.k_batch)
            or ways != (layout.batch, layout.inputs, layout.outputs)
        ):
            raise ValueError(
                f"its kernel {layout.shape} was quantized as a matrix {tuple(kernel.shape)} with "
                f"input axes {layout.inputs}, but the layer multiplies by {expected} with input "
                f"axes {self.k_in}; pass example_args=(x, ...) to quantize_linen."
            )
        if kernel.codes.dtype != jnp.uint8 or kernel.scale.shape[-2] != kernel.num_groups:
            raise ValueError(
                "its quantized kernel was changed on the way to it (cast, normalized, transposed); "
                "leave the layer out with a recipe's rule that has no spec."
            )


def as_tuple(value: int | Iterable[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def of_axes(
    ndim: int, axis: tuple[int, ...], batch: tuple[int, ...], features: tuple[int, ...]
) -> Contraction:
    """Returns the product of `nn.DenseGeneral`, whose kernel is `[*batch, *axis, *features]`."""
    summed = tuple(sorted(a % ndim for a in axis))  # as flax orders them in the kernel
    batch = tuple(range(len(batch)))
    rows = tuple(a for a in range(ndim) if a not in summed and a not in batch)
    kernel = tuple(range(len(batch) + len(summed) + len(features)))
    first = len(batch) + len(summed)
    order = tuple(range(len(batch) + len(rows) + len(features)))
    parts = kernel[: len(batch)], kernel[len(batch) : first], kernel[first:]
    return Contraction(batch, rows, summed, *parts, features, order)


def of_einsum(equation: str | None, ndim: int, kernel_shape: tuple[int, ...]) -> Contraction:
    """Returns the product of `nn.Einsum`, an equation `input,kernel->output`.

    Raises:
        ValueError: if an axis repeats, or is summed in one operand only.
    """
    operands, _, out = (equation or "").replace(" ", "").partition("->")
    x, _, kernel = operands.partition(",")
    if "..." in kernel:
        raise ValueError(f"the equation {equation!r} has an ellipsis in the kernel.")
    num_rest = ndim - len(x.replace("...", ""))
    rest = "".join(chr(0x3B1 + i) for i in range(num_rest))  # letters that no equation has
    x, out = x.replace("...", rest), out.replace("...", rest)
    if any(len(set(axes)) != len(axes) for axes in (x, kernel, out)):
        raise ValueError(f"the equation {equation!r} repeats an axis.")
    batch = [c for c in kernel if c in x and c in out]
    summed = [c for c in kernel if c in x and c not in out]
    features = [c for c in kernel if c not in x and c in out]
    rows = [c for c in x if c not in kernel and c in out]
    if len(batch + summed + features) != len(kernel) or len(batch + summed + rows) != len(x):
        raise ValueError(f"the equation {equation!r} sums over an axis of one operand alone.")
    if not summed or not features:
        raise ValueError(f"the equation {equation!r} is not a product of matrices.")
    result = batch + rows + features
    k_out = positions(features, kernel)
    return Contraction(
        x_batch=positions(batch, x),
        x_rows=positions(rows, x),
        x_in=positions(summed, x),
        k_batch=positions(batch, kernel),
        k_in=positions(summed, kernel),
        k_out=k_out,
        features=tuple(kernel_shape[axis] for axis in k_out),
        order=positions(out, result),
    )


def positions(axes: Sequence[str], operand: Sequence[str]) -> tuple[int, ...]:
    """Returns where the letters `axes` stand in an operand."""
    return tuple(operand.index(axis) for axis in axes)
