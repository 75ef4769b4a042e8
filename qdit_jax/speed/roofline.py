"""The roofline of a step: operations and bytes of its layers and attentions, from shapes alone.

Time on a device is, for each of them, the larger of its operations at full rate and its bytes at full
bandwidth, one after another. Programs are slower; one that fuses more than is counted here could be
faster. Counted are, of a layer: its input and output, one
pass over each for norms, modulation, activation functions and the residual; the weights as they are
stored; codes of the input; the copy in 8 or 16 bits that packed weights become; and a sum in float32 for
every group inside which both operands have one scale. What a kernel keeps inside is not counted, where the
device has one that takes the product; nor is the work of scaling sums there. Of an attention: its operands and output, and the
weights where the device keeps them in memory.

Dimensions: R rows of a layer's input, K input channels, N output channels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from qdit_jax import kernels
from qdit_jax.models import AttentionCall
from qdit_jax.quant import WeightSpec, packed_nbytes
from qdit_jax.recipes import LayerSpec
from qdit_jax.speed.devices import Device

WIDE = 4  # bytes of float32, in which the residual stream and sums are


class Work(NamedTuple):
    """One part of a step.

    Attributes:
        kind: the dtype of the operands of its products, a key of `Device.rates`.
        operations: two per multiply-add.
        moved: bytes read and written.
        live: bytes that it needs at once, beside weights and the residual stream.
    """

    kind: str
    operations: float
    moved: float
    live: float

    def seconds(self, device: Device) -> float:
        """Returns the time at the device's full rates."""
        return max(self.operations / device.rates[self.kind], self.moved / device.bandwidth)


@dataclasses.dataclass(frozen=True)
class Step:
    """What a step consists of, before it is known on which device.

    Attributes:
        shapes: `(K, N)` of every layer, by path.
        rows: R of every layer in one step.
        specs: of the layers that are quantized.
        attentions: its attentions, of one network input.
        inputs: network inputs in one step.
        dtype: of operands that are not quantized.
        implementation: who computes quantized products; None is who would on a device that lacks nothing.
    """

    shapes: Mapping[str, tuple[int, int]]
    rows: Mapping[str, int]
    specs: Mapping[str, LayerSpec]
    attentions: tuple[AttentionCall, ...]
    inputs: int
    dtype: str
    implementation: str | None = None

    def work(self, device: Device) -> Iterable[Work]:
        """Yields the parts of the step on a device."""
        size = WIDE if self.dtype == "float32" else WIDE // 2
        for path, shape in self.shapes.items():
            given = (self.rows[path], shape, self.specs.get(path), self.dtype, size)
            yield layer_work(*given, device.platform, self.implementation)
        for attention in self.attentions:
            yield attention_work(attention, self.inputs, self.dtype, size, device.fuses_attention)

    def seconds(self, device: Device) -> float:
        """Returns the time of the step at a device's full rates."""
        return sum(part.seconds(device) for part in self.work(device))

    def live_bytes(self, device: Device) -> float:
        """Returns what a step needs at once beside its weights: residuals and the largest part."""
        streams = max((math.prod(call.query) for call in self.attentions), default=0)
        return WIDE * self.inputs * streams + max(part.live for part in self.work(device))


def layer_work(
    rows: int,
    shape: tuple[int, int],
    spec: LayerSpec | None,
    dtype: str,
    size: int,
    platform: str,
    implementation: str | None = None,
) -> Work:
    """Returns the work of a linear layer; `size` is the bytes of one value of its input and output."""
    num_channels, width = shape
    operations = 2.0 * rows * num_channels * width
    values = size * rows * (num_channels + width)
    weight = None if spec is None else spec.weight
    act = None if spec is None else spec.act
    row = computed_by(rows, num_channels, spec, dtype, platform)
    if row is not None and implementation is not None:
        row = kernels.IMPLEMENTATIONS[implementation]
    inside = () if row is None else row.inside
    kind = row.kind if row is not None and row.kind is not None else kind_of(spec, dtype)
    count, is_byte = num_sums(num_channels, spec), kind in ("int8", "float8")
    moved, live = 2.0 * values, float(values)
    if weight is None:
        moved += num_channels * width * (size if act is None else WIDE)
    else:
        moved += packed_nbytes(*shape, weight)
        if not ("weights" in inside or (is_byte and is_plain_int8(weight))):
            copy = num_channels * width * (1 if is_byte else size)
            moved += 2 * copy
            live += copy
    if act is not None:
        codes = rows * num_channels * (1 if is_byte else WIDE)
        moved += size * rows * num_channels + (0 if "codes" in inside else 2 * codes)
        live += 0 if "codes" in inside else codes
    if count > 1 and "sums" not in inside:
        moved += 2 * WIDE * rows * width * count
        live += WIDE * rows * width
    return Work(kind, operations, moved, live)


def computed_by(
    rows: int, num_channels: int, spec: LayerSpec | None, dtype: str, platform: str
) -> kernels.Implementation | None:
    """Returns who computes a layer's product, None of one that is not quantized."""
    if spec is None or spec.weight is None:
        return None
    numerics = "simulated" if spec.act is None else "integer"
    product = kernels.Product(
        (rows, num_channels), spec.weight, spec.act, numerics, platform, dtype
    )
    return kernels.expected(product)


def kind_of(spec: LayerSpec | None, dtype: str) -> str:
    """Returns the dtype in which XLA computes a layer's product, in integer numerics.

    A quantized input is multiplied in float32, unless integers multiply it.
    """
    if spec is None or spec.act is None:
        return dtype
    weight, act = spec.weight, spec.act
    if weight is None or act.fmt is not None:
        return "float32"
    return "int8" if weight.fmt is None or weight.has_levels else "float32"


def is_plain_int8(weight: WeightSpec) -> bool:
    """Returns whether a layer's codes are multiplied as they are stored."""
    return weight.bits == 8 and weight.fmt is None and not weight.has_levels


def num_sums(num_channels: int, spec: LayerSpec | None) -> int:
    """Returns how many sums a product is made of, in integer numerics."""
    if spec is None or spec.weight is None or spec.act is None:
        return 1
    return len(
        kernels.segments(num_channels, spec.act.group_size, spec.weight.product_group_size).members
    )


def attention_work(call: AttentionCall, inputs: int, dtype: str, size: int, is_fused: bool) -> Work:
    """Returns the work of an attention `[G, Q, H, D]`, G of them for one network input."""
    lead, queries, heads, channels = call.query
    keys = call.key[1]
    pairs = inputs * lead * heads * queries * keys
    operations = 2.0 * pairs * (channels + call.value[-1])
    output = math.prod(call.query[:-1]) * call.value[-1]
    values = inputs * size * (math.prod(call.query) + math.prod(call.key) + math.prod(call.value))
    both = float(values + inputs * size * output)
    weights = 0.0 if is_fused else float(pairs * (WIDE + size))
    return Work(dtype, operations, both + 2 * weights, both + weights)
