"""Products that kernels of int8 levels take, whatever the machine, and what they all refuse."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qdit_jax.kernels import IMPLEMENTATIONS, Product
from qdit_jax.quant import (
    ActSpec,
    QTensor,
    WeightSpec,
    formats,
    levels,
    num_groups,
    quantize,
    ranges,
)

TOKEN = ActSpec(8, 0, symmetric=True)
LEVELS = {"scale_levels": 2}
W = WeightSpec
# Changes of a product that the kernel takes, and a part of the sentence that refuses it.
REFUSED = [
    ({"numerics": "simulated"}, "integer numerics, not simulated."),
    ({"dtype": "float16"}, "float32 or bfloat16, not in float16."),
    ({"act": None}, "it computes integer numerics"),
    ({"act": ActSpec(8, 0)}, "symmetric signed inputs without a shift."),
    ({"act": dataclasses.replace(TOKEN, unsigned=True)}, "symmetric signed inputs"),
    ({"act": dataclasses.replace(TOKEN, shift=0.17)}, "without a shift"),
    ({"act": ActSpec(8, 128, symmetric=True)}, "the inputs have groups of 128."),
    ({"act": dataclasses.replace(TOKEN, mode="static")}, "calibrated ones."),
    ({"act": dataclasses.replace(TOKEN, range_fn=ranges.mse())}, "minmax for inputs, not mse"),
    ({"act": ActSpec(fmt=formats.fp8_e4m3, group_size=0)}, "integers as inputs, not fp8_e4m3"),
    ({"weight": W(fmt=formats.lut4, group_size=32)}, "a step times a code, which lut4 has not"),
    ({"weight": W(4, 32)}, "two levels of scales, or symmetric weights"),
    ({"weight": W(8, 0)}, "two levels of scales, or symmetric weights"),
    ({"weight": W(4, 48, **LEVELS)}, "groups that are multiples of 32, not of 48"),
    ({"weight": W(4, 32, channel_group=2, **LEVELS)}, "channel_group is 2."),
    ({"x_shape": (8, 131072)}, "an int32 sum holds 131071 products of bytes, and K is 131072."),
]


def reason(*, row, platform, weight=None, act=TOKEN, x_shape=(4096, 1152), **changes):
    """Returns the sentence of a row, which takes the product without changes."""
    weight = weight or W(4, 32, **LEVELS)
    settings = {"numerics": "integer", "platform": platform, "dtype": "bfloat16"} | changes
    return IMPLEMENTATIONS[row].unsupported_reason(Product(x_shape, weight, act, **settings))


def stack_of_kernels():
    """Returns three kernels of a network's blocks in one `QTensor`, without values."""
    make = jax.vmap(lambda w: quantize(w, W(4, 32, **LEVELS)))
    return jax.eval_shape(make, jnp.ones((3, 1152, 8)))


def random_kernel(weight, num_channels, width):
    """Returns a kernel without its codes, and codes: those, steps and offsets that `quantize` may not choose."""
    rng = np.random.default_rng(weight.bits)
    shape, top = (num_channels, width), 2**weight.bits - 1
    codes = rng.integers(0, top + 1, shape).astype(np.uint8)
    q = QTensor(None, None, bits=weight.bits, group_size=weight.group_size, shape=shape)
    scale = rng.uniform(0.5, 2, (1, width)).astype(weight.scale_dtype)
    if not weight.has_levels:
        return dataclasses.replace(q, scale=scale), codes
    rows = (num_groups(num_channels, weight.group_size), width)
    step = rng.integers(1, levels.greatest_step(weight.bits, weight.symmetric) + 1, rows)
    offset = None if weight.symmetric else rng.integers(0, 256 - top * step).astype(np.uint8)
    step = step.astype(np.uint8)
    return dataclasses.replace(q, scale=step, channel_scale=scale[0], offset=offset), codes


def tokens(num_rows, num_channels, seed=0):
    """Returns tokens with outliers, zeros, extremes and halves of steps."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_rows, num_channels))
    x[:, ::17] *= rng.choice([1, 10, 50], (num_rows, 1))
    x[0] = 0
    x[1] *= 1e-20
    x[2] *= 1e25
    x[3] = np.abs(x[3]) + 1
    x[4] = 3
    x[5] = np.round(x[5] * 20) / 2  # ties, with steps of 1
    x[5, 0] = 127
    return x


def compiled(fn):
    """Returns `fn` compiled without LLVM's optimizations, which take most of the time here."""
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})


def relative_errors(found, by_xla, wide, weights):
    """Returns the greatest errors of a kernel against float64, and against XLA, by the sum of magnitudes."""
    found, by_xla, wide, weights = (
        np.asarray(a, np.float64) for a in (found, by_xla, wide, weights)
    )
    unit = np.abs(wide) @ np.abs(weights) + np.finfo(np.float32).tiny
    return np.max(np.abs(found - wide @ weights) / unit), np.max(np.abs(found - by_xla) / unit)
