"""What comes before and after a product, by the kernel for GPUs, interpreted on CPU. As a script, JSON."""

from __future__ import annotations

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from epilogues import ON_GPUS
from quantized_block import block_facts

from qdit_jax.kernels import (
    Gated,
    fused_matmul,
    gpu_check,
    gpu_fp8,
    gpu_groups,
    gpu_levels,
    gpu_weights,
)
from qdit_jax.kernels.gpu_tiles import Tiles
from qdit_jax.quant import ActQuant, quantize

# The kernel, rows of the tokens, channels, parts, the dtype of what the result is added to.
CASES = {
    "whole": ("levels", (2, 64), 128, 1, "float32"),
    "several blocks": ("levels", (1, 192), 256, 1, "float32"),
    "frames": ("levels", (2, 2, 32), 128, 1, "float32"),
    "across samples": ("levels", (4, 32), 128, 1, "float32"),
    "ragged channels": ("levels", (1, 64), 130, 1, "float32"),
    "16 bits": ("levels", (2, 64), 128, 1, "bfloat16"),
    "parts": ("levels", (2, 35), 384, 3, None),
    "parts of no whole blocks": ("levels", (2, 35), 192, 3, None),
    "parts of a sum": ("levels", (1, 64), 256, 2, "float32"),
    "groups": ("groups", (2, 64), 128, 1, "float32"),
    "parts in groups": ("groups", (2, 35), 256, 2, None),
    "weights alone": ("weights", (2, 64), 128, 1, "float32"),
    "parts of weights alone": ("weights", (2, 35), 256, 2, None),
    "fp8": ("fp8", (2, 64), 128, 1, "float32"),
    "parts of fp8": ("fp8", (2, 35), 256, 2, None),
}
FUSED = {
    "levels": gpu_levels.levels_fused,
    "groups": gpu_groups.groups_fused,
    "weights": gpu_weights.weights_fused,
    "fp8": gpu_fp8.fp8_fused,
}


def interpreted(kind="levels"):
    """Returns a kernel with its neighbors, interpreted."""
    from jax.experimental.pallas import mosaic_gpu

    settings = {"tiles": Tiles(64, 64, 2), "interpret": mosaic_gpu.InterpretGPUParams()}
    return functools.partial(FUSED[kind], **settings)


def facts(kind, rows, width, parts, gated_dtype):
    """Returns errors in units of the greatest value, dtypes, shapes, and whether slopes are those of XLA."""
    rng, kernel = np.random.default_rng(0), interpreted(kind)
    weight, spec = ON_GPUS[kind]
    act, numerics = (None, "simulated") if spec is None else (ActQuant(spec), "integer")
    q = quantize(jnp.asarray(rng.normal(size=(128, width)) / 16, jnp.float32), weight)
    bias = jnp.asarray(rng.normal(size=width), jnp.float32)
    x_dtype = "bfloat16" if spec is None else "float32"
    x = jnp.asarray(rng.normal(size=(*rows, 128)), x_dtype)
    gated, gate, before = None, 1.0, 0.0
    if gated_dtype is not None:
        before = jnp.asarray(rng.normal(size=(*rows, width)) * 10, gated_dtype)
        modulation = jnp.asarray(rng.normal(size=(rows[0], 3 * width)) * 3, jnp.float32)
        gated = Gated(before, modulation, 1)
        gate = modulation[:, width : 2 * width].reshape(rows[0], *(1,) * (len(rows) - 1), width)

    @jax.jit
    def product(x, gated):
        return kernel(x, q, act, "float32", bias, None, gated, parts)

    def by_xla(x, gated):
        settings = {"bias": bias, "gated": gated, "parts": parts, "out_dtype": "float32"}
        return fused_matmul(x, q, act, numerics, "xla", **settings)

    found = product(x, gated)
    (alone,) = kernel(x, q, act, "float32", bias)
    expected = np.asarray(before, np.float32) + np.asarray(gate) * np.asarray(alone)
    joined = np.concatenate(found, axis=-1)

    def slopes(fn):
        total = lambda *given: sum(part.sum() for part in fn(*given))  # noqa: E731
        return jax.tree.leaves(jax.grad(total, (0, 1), allow_int=True)(x, gated))

    pairs = zip(slopes(product), slopes(by_xla), strict=True)
    return {
        "dtype": found[0].dtype.name,
        "shapes": [list(part.shape) for part in found],
        "error": float(np.max(np.abs(joined - expected)) / np.max(np.abs(expected))),
        "slopes": all(np.array_equal(a, b) for a, b in pairs),
    }


def main():
    found = {name: facts(*case) for name, case in CASES.items()}
    found |= {
        f"block in {dtype}": block_facts(interpreted(), dtype, 64)
        for dtype in ("float32", "bfloat16")
    }
    checks = {kind: getattr(gpu_check, kind.upper()) for kind in FUSED}
    found["wrong"] = [gpu_check.wrong_neighbors(interpreted(k), checks[k]) for k in checks]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
