"""Very many tokens are multiplied block by block, to the same numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdit_jax.kernels import quantized_matmul, token_blocks
from qdit_jax.quant import ActQuant, ActSpec, WeightSpec, quantize

TOKENS, CHANNELS, WIDTH = 30, 64, 24


def operands(dtype=jnp.bfloat16):
    x = jax.random.normal(jax.random.key(0), (2, TOKENS // 2, CHANNELS), jnp.float32)
    w = jax.random.normal(jax.random.key(1), (CHANNELS, WIDTH), jnp.float32)
    return x.astype(dtype), quantize(w, WeightSpec(bits=4, group_size=16))


def static(samples):
    """Returns scales of every channel group, or each sample's own."""
    shape = (samples, 1, 4) if samples else (4,)
    spec = ActSpec(bits=8, group_size=16, mode="static", symmetric=True)
    return ActQuant(spec, jnp.full(shape, 0.03))


ACTS = {
    "token x group": ActQuant(ActSpec(bits=8, group_size=16)),
    "token": ActQuant(ActSpec(bits=8, group_size=0)),
    "static": static(0),
    "of each sample": static(2),
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("numerics", ["simulated", "integer"])
@pytest.mark.parametrize("block", [8, 11])
def test_blocks_give_the_same_products(monkeypatch, act, numerics, block):
    x, q = operands()
    quantizer = ACTS[act]

    def product(x):
        return quantized_matmul(x, q, quantizer, numerics, "xla")

    whole = jax.jit(product)(x)
    monkeypatch.setattr(token_blocks, "MOST_VALUES", 1)
    monkeypatch.setattr(token_blocks, "BLOCK_VALUES", block * CHANNELS)
    jax.clear_caches()
    lowered = str(jax.make_jaxpr(product)(x))
    count = -(-TOKENS // block)
    is_cut = f"bf16[{count}," in lowered
    assert is_cut == (act != "of each sample")  # which blocks of all samples' tokens cannot have
    np.testing.assert_allclose(
        np.asarray(jax.jit(product)(x), np.float32), np.asarray(whole, np.float32), rtol=0.01
    )


def test_few_tokens_and_32_bits_are_left_whole(monkeypatch):
    x, q = operands()
    quantizer = ACTS["token"]
    few = str(jax.make_jaxpr(lambda x: quantized_matmul(x, q, quantizer, "simulated", "xla"))(x))
    assert few.count("scan") == 0
    monkeypatch.setattr(token_blocks, "MOST_VALUES", 1)
    wide = x.astype(jnp.float32)
    text = str(
        jax.make_jaxpr(lambda x: quantized_matmul(x, q, quantizer, "simulated", "xla"))(wide)
    )
    assert text.count("scan") == 0
