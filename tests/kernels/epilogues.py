"""What kernels do as they write, interpreted on CPU: bias and GELU. As a script those for GPUs, as JSON."""

from __future__ import annotations

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from level_products import LEVELS, TOKEN, W, tokens

from qdit_jax.kernels import GELU, IMPLEMENTATIONS, quantized_matmul
from qdit_jax.kernels.epilogue import finished
from qdit_jax.quant import ActQuant, ActSpec, formats, quantize

KINDS = {
    "levels": (W(4, 32, **LEVELS), TOKEN),
    "groups": (W(4, 128), ActSpec(8, 128)),
    "weights": (W(4, 64), None),
}
# Those of NVIDIA's Hopper.
ON_GPUS = {
    **KINDS,
    "fp8": (
        W(fmt=formats.fp8_e4m3, group_size=0),
        ActSpec(fmt=formats.fp8_e4m3, group_size=0),
    ),
}


def kernel_named(platform, kind):
    """Returns a kernel that is interpreted, `(x, q, act, numerics, dtype, bias, activation) -> y`."""
    settings = {"interpret": True}
    if platform == "gpu":
        from jax.experimental.pallas import mosaic_gpu

        from qdit_jax.kernels.gpu_tiles import Tiles

        settings = {
            "interpret": mosaic_gpu.InterpretGPUParams(),
            "tiles": Tiles(rows=64, columns=64, steps=2),
        }
    return functools.partial(IMPLEMENTATIONS[f"{platform}_{kind}"].run, **settings)


def facts(platform, kind):
    """Returns what the epilogue of a kernel does: errors in units of the greatest value, and dtypes."""
    matmul = kernel_named(platform, kind)
    weight, spec = ON_GPUS[kind]
    rng = np.random.default_rng(0)
    q = quantize(jnp.asarray(rng.normal(size=(128, 20)) / 16, jnp.float32), weight)
    bias = jnp.asarray(rng.normal(size=20) * rng.choice([1, 10], 20), jnp.bfloat16)
    x = jnp.asarray(tokens(9, 128)[3:], jnp.bfloat16 if spec is None else jnp.float32)
    act, numerics = (None, "simulated") if spec is None else (ActQuant(spec), "integer")

    @functools.partial(jax.jit, static_argnums=(2, 3))
    def product(x, bias, dtype, activation):
        return matmul(x, q, act, numerics, dtype, bias, activation)

    def error(found, expected):
        assert found.dtype == expected.dtype
        return float(jnp.max(jnp.abs(found - expected)) / jnp.max(jnp.abs(expected)))

    sums = product(x, None, "float32", None)
    wide = bias.astype(jnp.float32)
    alone, both = product(x, bias, "float32", None), product(x, bias, "float32", GELU)
    narrow = product(x, bias, "bfloat16", GELU)

    def slopes(fn):
        return jax.grad(lambda x, bias: fn(x, bias).astype(jnp.float32).sum(), (0, 1))(x, bias)

    ours = slopes(lambda x, bias: product(x, bias, x.dtype.name, GELU))
    by_xla = slopes(
        lambda x, bias: quantized_matmul(x, q, act, numerics, "xla", bias=bias, activation=GELU)
    )
    return {
        "bias": error(alone, sums + wide),
        "activated": error(both, finished(sums, wide, GELU)),
        "16 bits": bool(np.array_equal(narrow, both.astype(jnp.bfloat16))),
        "slopes": all(np.array_equal(a, b) for a, b in zip(ours, by_xla, strict=True)),
    }


def main():
    json.dump({kind: facts("gpu", kind) for kind in ON_GPUS}, sys.stdout)


if __name__ == "__main__":
    main()
