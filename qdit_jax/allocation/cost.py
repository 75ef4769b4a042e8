"""What a quantized layer costs: bit operations, bytes, time on a kind of hardware, or a rule.

A cost function takes `(layer, spec)` and returns a number; the total is the sum over layers, so
that budgets can be met exactly. A user's own function of this form works too.

Dimensions: T tokens per sample, K input channels, N output channels, b_w and b_a bits,
G segments of K inside which weights and inputs have one scale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from qdit_jax import kernels
from qdit_jax.allocation.extra_work import extra_work
from qdit_jax.allocation.space import SearchLayer, Space
from qdit_jax.quant import effective_group_size, packed_nbytes
from qdit_jax.recipes import LayerSpec
from qdit_jax.types import Numbers

CostFn = Callable[[SearchLayer, LayerSpec], float]

FLOAT32_MAC = 1024  # bit operations: 32 x 32
FLOAT16_MAC = 256
# Clamping at both ends and rounding one value: three float32 operations of 32 bits, and the
# multiplication by the reciprocal scale.
ACT_QUANT_VALUE = 3 * 32 + FLOAT32_MAC
RATE16 = 0.5  # of a matrix unit at 16 bits, 1 at 8
ACT_QUANT_GROUP = 2 * FLOAT32_MAC  # the scale and the zero point of one token's group


def cost_table(space: Space, cost_fn: CostFn) -> list[np.ndarray]:
    """Returns the cost of every choice of every layer, float64 `[choices]` each.

    Raises:
        ValueError: if the function returns something other than a finite number.
    """
    table = []
    for layer in space.layers:
        row = np.array([cost_fn(layer, spec) for spec in layer.choices], np.float64)
        if not np.isfinite(row).all():
            raise ValueError(f"the cost function returned {row.tolist()} for {layer.path}.")
        table.append(row)
    return table


def total_cost(table: list[np.ndarray], assignment: Numbers) -> np.ndarray | np.float64:
    """Returns the cost of assignments `[..., L]`, float64 `[...]`."""
    choices = np.asarray(assignment)
    return sum((row[choices[..., i]] for i, row in enumerate(table)), np.float64(0))


def side_bits(spec: LayerSpec) -> tuple[int, int]:
    """Returns `(b_w, b_a)` as a product multiplies them, 16 for a side that is left as it is.

    Two levels of scales multiply levels of 8 bits, however few bits are stored.
    """
    stored = spec.weight.bits if spec.weight else 16
    return (
        8 if spec.weight and spec.weight.has_levels else stored,
        spec.act.bits if spec.act else 16,
    )


def unit_bits(spec: LayerSpec) -> int:
    """Returns the bits at which a matrix unit multiplies both sides.

    FP8 is multiplied as it is stored by FP8 alone; beside integers, and NF4 always, as 16-bit floats.
    """
    formats = [side.fmt for side in (spec.weight, spec.act) if side is not None]
    floats = [fmt for fmt in formats if fmt is not None and fmt.operand_dtype.itemsize > 1]
    are_float8 = len(floats) == 2 and all(fmt.float8_dtype is not None for fmt in floats)
    return max(side_bits(spec)) if are_float8 or not floats else 16


def segment_lengths(layer: SearchLayer, spec: LayerSpec) -> np.ndarray:
    """Returns the lengths of the pieces of K inside which neither side's scale changes, `[G]`."""
    act_size = 0 if spec.act is None else spec.act.group_size
    weight_size = 0 if spec.weight is None else spec.weight.product_group_size
    return kernels.segments(layer.shape[0], act_size, weight_size).members


def num_segments(layer: SearchLayer, spec: LayerSpec) -> int:
    """Returns G, how many `segment_lengths` there are."""
    return len(segment_lengths(layer, spec))


def num_corrections(spec: LayerSpec) -> int:
    """Returns the multiply-adds that add one segment's sum to the accumulator.

    1 symmetric by symmetric (the scale); 2 with one zero point; 3 with two: with the sums of codes
    known, `s (c - z_x (sum w - G z_w)) - s z_w sum x` has one term per zero point. Levels have none.
    """
    weight, act = spec.weight, spec.act
    has_zero = weight is not None and not weight.symmetric and not weight.has_levels
    return 1 + has_zero + (act is not None and not act.symmetric)


@dataclasses.dataclass(frozen=True)
class BitOps:
    """Bit operations per sample, including the overhead of groups:

    `T K N b_w b_a + T N G accumulator k + T K q_v + T ceil(K / g_a) q_g + T extra`

    with G segments of `k` corrections (`num_corrections`) in the accumulator's arithmetic, and
    q_v and q_g to quantize a value and a group of the input. Without the second term the budget
    would not depend on the group size. A side left as it is counts 16 bits and no overhead. `extra`
    is what a transform and a branch do (`extra_work`): a float32 multiply-add per channel that no
    fold takes, and the 16-bit ones of a rotation and of a branch.

    T is the rows of the layer's input per sample and step; a layer of one of several experts counts the
    share of the steps in which it runs (`SearchLayer.mean_rows`).

    Attributes:
        accumulator: bit operations of one multiply-add: 1024 in float32, 256 in float16.
    """

    accumulator: int = FLOAT32_MAC

    def __call__(self, layer: SearchLayer, spec: LayerSpec) -> float:
        num_channels, width = layer.shape
        tokens = layer.mean_rows
        b_w, b_a = side_bits(spec)
        total = tokens * num_channels * width * b_w * b_a
        if spec.weight is not None and spec.act is not None:
            per_output = num_segments(layer, spec) * num_corrections(spec)
            total += tokens * width * per_output * self.accumulator
        if spec.act is not None:
            size = effective_group_size(num_channels, spec.act.group_size)
            groups = -(-num_channels // size)
            total += tokens * (num_channels * ACT_QUANT_VALUE + groups * ACT_QUANT_GROUP)
        extra = extra_work(layer, spec)
        total += tokens * (extra.mapped * FLOAT32_MAC + (extra.turned + extra.branch) * FLOAT16_MAC)
        return float(total)


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Bytes of the packed kernel: codes, scales and zero points as `QTensor` holds them; and of what
    stands beside it, a map, a dense rotation or a branch."""

    def __call__(self, layer: SearchLayer, spec: LayerSpec) -> float:
        num_channels, width = layer.shape
        beside = extra_work(layer, spec).num_bytes
        if spec.weight is None:
            return float(2 * num_channels * width + beside)
        return float(packed_nbytes(num_channels, width, spec.weight) + beside)


@dataclasses.dataclass(frozen=True)
class MeanGroup:
    """The release's rule: the mean of the group sizes must reach a given minimum.

    The cost is minus a layer's group size (of the weights where they are quantized), so that a
    budget of `-L * 128` means a mean of 128 or more. A whole channel counts its K.
    """

    def __call__(self, layer: SearchLayer, spec: LayerSpec) -> float:
        side = spec.weight or spec.act
        return -float(layer.shape[0] if side is None else side.group_size or layer.shape[0])


@dataclasses.dataclass(frozen=True)
class HardwareCost:
    """Time of a layer in 8-bit multiply-adds of the machine's matrix unit:

    `T N sum_segments(roundup(length, depth)) / rate + T N G k rescale + T K quantize + T extra`

    A segment shorter than the unit's depth fills it with zeros; bits are `unit_bits`. `rate` is how much faster than
    8 bits the unit works at this width; `rescale` and `quantize` are float32 multiply-adds of the
    vector unit, in 8-bit multiply-adds of the matrix unit. `extra` is what a transform and a branch
    do: the vector unit scales channels, the matrix unit multiplies by a branch in 16 bits, and a
    rotation is left to the one that is faster.

    Attributes:
        depth8, depth4: contraction depth of one step at 8 and at 4 bits.
        rate4: speed at 4 bits on both sides against 8.
        rescale: price of one float32 multiply-add.
    """

    depth8: int
    depth4: int
    rate4: float
    rescale: float

    def __call__(self, layer: SearchLayer, spec: LayerSpec) -> float:
        num_channels, width = layer.shape
        tokens = layer.mean_rows
        bits = unit_bits(spec)
        depth = self.depth4 if bits <= 4 else self.depth8
        rate = {4: self.rate4, 8: 1.0, 16: RATE16}[next(b for b in (4, 8, 16) if bits <= b)]
        padded = sum(-(-length // depth) * depth for length in segment_lengths(layer, spec))
        total = tokens * width * padded / rate
        if spec.weight is not None and spec.act is not None:
            segments = num_segments(layer, spec) * num_corrections(spec)
            total += tokens * width * segments * self.rescale
        if spec.act is not None:
            total += tokens * num_channels * self.rescale
        return float(total + tokens * self.extra(layer, spec))

    def extra(self, layer: SearchLayer, spec: LayerSpec) -> float:
        """Returns the time of a transform and a branch per row of the input."""
        work = extra_work(layer, spec)
        padded = layer.shape[0] * -(-work.block // self.depth8) * self.depth8
        turned = min(padded / RATE16, work.turned * self.rescale) if work.block > 1 else 0.0
        return work.mapped * self.rescale + turned + work.branch / RATE16


@dataclasses.dataclass(frozen=True)
class CpuCost:
    """Time of a layer on a CPU, in float32 multiply-adds: `T K N (0.95 + 25 / length)`.

    Fitted to measured times of the scan over groups of int8 dots (AVX2, 512x1152x4608): 1.74, 1.20
    and 1.04 of a float32 product at group sizes 32, 128 and 288. `length` is K / G. The
    multiply-adds of a transform and of a branch are added (`extra_work`).
    """

    def __call__(self, layer: SearchLayer, spec: LayerSpec) -> float:
        num_channels, width = layer.shape
        macs = layer.mean_rows * num_channels * width
        work = extra_work(layer, spec)
        extra = layer.mean_rows * (work.mapped + work.turned + work.branch)
        if spec.weight is None or spec.act is None:
            return float(macs + extra)
        return macs * (0.95 + 25.0 * num_segments(layer, spec) / num_channels) + extra


def gpu_cost() -> HardwareCost:
    """Returns the profile of a tensor-core GPU.

    Depth 32 at 8 bits and 64 at 4; a float32 multiply-add outside the tensor cores takes the time
    of about 30 8-bit ones inside (H100 data sheet: 1979 TOPS against 67 TFLOPS).
    """
    return HardwareCost(depth8=32, depth4=64, rate4=2.0, rescale=30.0)


def tpu_cost() -> HardwareCost:
    """Returns the profile of a TPU: a contraction 128 deep, so a group g < 128 costs 128 / g.

    A float32 multiply-add of the vector unit is taken to cost 60 8-bit ones of the matrix unit.
    """
    return HardwareCost(depth8=128, depth4=128, rate4=1.0, rescale=60.0)


def named_costs() -> Mapping[str, CostFn]:
    """Returns the cost functions that a budget can name."""
    return {
        "bitops": BitOps(),
        "bitops16": BitOps(accumulator=256),
        "bytes": Bytes(),
        "gpu": gpu_cost(),
        "tpu": tpu_cost(),
        "cpu": CpuCost(),
        "mean-group": MeanGroup(),
    }
