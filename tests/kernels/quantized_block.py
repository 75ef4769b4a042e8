"""A transformer block that an interpreted kernel computes, beside the same by XLA."""

from __future__ import annotations

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import qdit_jax as qdit
from qdit_jax.kernels import IMPLEMENTATIONS, matmul
from qdit_jax.models.dit import Block
from qdit_jax.models.linear import Layers
from qdit_jax.quant import InputMap
from qdit_jax.speed import recipe_named


def block_facts(kernel, dtype, tokens):
    """Returns the error of a block in `w4a8-fast` whose products a kernel computes, and its calls.

    An error counts in units of what the block adds. A call is [type of the input, whether its result is added to
    something, parts]; equal ones count once.

    Args:
        kernel: as a row of the table has it for `run_fused`.
        tokens: of each of two samples.
    """
    block = Block(2, 2.0, 1e-6, Layers("integer", dtype=dtype))
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(2, tokens, 128)), jnp.float32)
    c = jnp.asarray(rng.normal(size=(2, 128)), jnp.float32)
    params = block.init(jax.random.key(0), x, c)["params"]
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) / 12, a.dtype), params)
    recipe = recipe_named("w4a8-fast")
    params = qdit.quantize_params({"blocks_0": params}, recipe=recipe)["blocks_0"]
    inverse_scale = jnp.asarray(np.exp(rng.normal(size=256)), jnp.float32)
    params["mlp"]["fc2"]["input_map"] = InputMap(inverse_scale)
    by_xla, calls = block.apply({"params": params}, x, c), set()

    def run_fused(*args):
        calls.add((type(args[0]).__name__, args[6] is not None, args[7]))
        return kernel(*args)

    row = dataclasses.replace(
        IMPLEMENTATIONS["xla_cpu"],
        run_fused=run_fused,
        unsupported_reason=lambda product: None if product.numerics == "integer" else "no integers",
    )
    with mock.patch.object(matmul, "IMPLEMENTATIONS", {"interpreted": row, **IMPLEMENTATIONS}):
        jax.clear_caches()
        found = block.apply({"params": params}, x, c)
    jax.clear_caches()
    return {
        "error": float(jnp.max(jnp.abs(found - by_xla)) / jnp.max(jnp.abs(by_xla - x))),
        "calls": sorted(map(list, calls)),
    }
