"""Every implementation that a device has, against float64: products that must be right before they are fast."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qdit_jax as qdit
from qdit_jax.kernels import IMPLEMENTATIONS, NUMERICS, quantized_matmul, unsupported_reason
from qdit_jax.speed import recipe_named

RECIPES = ("w8a8-fast", "w4a8-fast", "w4a8-g0", "w4a8-g128", "w4a16-g128", "fp8_e4m3")
SHAPES = ((33, 256, 130), (512, 1152, 1152))  # M, K, N: one that is no whole number of blocks
TOLERANCE = {"float32": 2e-6, "bfloat16": 2.0**-8}  # of the sum of magnitudes
# Hopper's sums of FP8 have 14 bits inside a run; 3e-4 where that is emulated.
COARSE = {"gpu_fp8": 2.0**-10}


def checks(shapes: tuple[tuple[int, int, int], ...] = SHAPES) -> Iterator[dict[str, Any]]:
    """Yields, for each product and implementation, its greatest error, or why it does not compute it.

    Inputs are elements that reach both ends of their grid, so that quantizing them changes nothing and the
    reference is a product in float64.
    """
    for rows, channels, width in shapes:
        for recipe in RECIPES:
            spec = recipe_named(recipe).rules[0].spec
            x, w = operands(rows, channels, width, spec.act)
            q = qdit.quantize(jnp.asarray(w), spec.weight)
            weights = np.asarray(qdit.dequantize(q), np.float64)
            reference, unit = x @ weights, np.abs(x) @ np.abs(weights)
            for dtype in TOLERANCE:
                for numerics in NUMERICS if spec.act else NUMERICS[:1]:
                    for name in IMPLEMENTATIONS:
                        row = {
                            "implementation": name,
                            "recipe": recipe,
                            "numerics": numerics,
                            "shape": [rows, channels, width],
                            "dtype": dtype,
                        }
                        values = jnp.asarray(x, dtype)
                        reason = unsupported_reason(
                            x.shape, q, spec.act, numerics, name, dtype=dtype
                        )
                        if reason is not None:
                            yield {**row, "refused": reason}
                            continue
                        found = quantized_matmul(values, q, spec.act, numerics, name)
                        error = np.abs(np.asarray(found, np.float64) - reference)
                        worst = float(np.max(error / np.maximum(unit, 1e-30)))
                        most = max(TOLERANCE[dtype], COARSE.get(name, 0.0))
                        yield {**row, "error": worst, "passed": worst <= most}


def operands(rows: int, channels: int, width: int, act: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns inputs `[M, K]` in float64, whole numbers or FP8, and normal weights `[K, N]` with outliers."""
    rng = np.random.default_rng(rows)
    is_symmetric = act is None or act.symmetric
    values = np.arange(-127 if is_symmetric else -128, 128)
    if act is not None and act.fmt is not None:
        values = act.fmt.values()
        values = values[np.isfinite(values)]
    low, high = values.min(), values.max()
    x = rng.choice(values, (rows, channels)).astype(np.float64)
    x[:, ::32], x[:, 1::32] = low, high  # in every group
    w = rng.normal(size=(channels, width)).astype(np.float32)
    w[::13] *= 10
    return x, w


def device_name() -> str:
    """Returns what JAX runs on, in words."""
    device = jax.devices()[0]
    return f"{device.device_kind} ({jax.default_backend()})"
