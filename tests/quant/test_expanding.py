"""Weights with a byte per code: the same weights and products as packed, to the bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qdit_jax as qdit
from qdit_jax import quant
from qdit_jax.kernels import quantized_matmul
from qdit_jax.quant import ActSpec, WeightSpec, expanded, formats, quantize

K, N = 72, 12
SPECS = {
    **{f"w{bits} groups": WeightSpec(bits, 24) for bits in (2, 3, 4, 5, 6)},
    "w4 symmetric": WeightSpec(4, 32, symmetric=True),
    "w3 per channel": WeightSpec(3, 0, symmetric=True),
    "w4 shared scales": WeightSpec(4, 16, channel_group=4, scale_dtype="float16"),
    **{f"w{bits} levels": WeightSpec(bits, 24, scale_levels=2) for bits in (2, 3, 4, 5, 6)},
    "w4 levels, symmetric": WeightSpec(4, 24, symmetric=True, scale_levels=2),
    "w4 levels, shared": WeightSpec(4, 32, channel_group=3, scale_levels=2),
    "lut4": WeightSpec(fmt=formats.lut4_e4m3),
}


def kernel(seed):
    """Returns `[K, N]` with outlier channels, an all-zero and a one-sided group."""
    w = np.random.default_rng(seed).normal(size=(K, N)).astype(np.float32)
    w[::9] *= 30
    w[:24, 0] = 0
    w[:24, 1] = np.abs(w[:24, 1]) + 5
    return w


@pytest.mark.parametrize("name", SPECS)
def test_weights_and_products_are_the_same_to_the_bit(name):
    q = quantize(kernel(0), SPECS[name])
    wide = expanded(q)
    assert wide.bits == 8
    assert wide.codes.shape == (N, K)
    assert wide.group_size == (0 if q.has_levels else q.group_size)
    np.testing.assert_array_equal(quant.dequantize(wide), quant.dequantize(q))
    x = np.random.default_rng(1).normal(size=(5, K)).astype(np.float32)
    for act in (ActSpec(8, 0, symmetric=True), ActSpec(8, q.product_group_size)):
        for numerics in ("simulated", "integer"):
            packed, unpacked = (
                quantized_matmul(x, one, act, numerics=numerics) for one in (q, wide)
            )
            np.testing.assert_array_equal(unpacked, packed)


def test_stacked_kernels_and_what_has_nothing_to_unpack():
    w = np.stack([kernel(2), kernel(3)])
    stacked = jax.vmap(lambda one: quantize(one, SPECS["w4 levels"]))(jnp.asarray(w))
    np.testing.assert_array_equal(quant.dequantize(expanded(stacked)), quant.dequantize(stacked))
    for spec in (WeightSpec(8, 24), WeightSpec(fmt=formats.nvfp4)):
        q = quantize(kernel(4), spec)
        assert expanded(q) is q


def checkpoint_of(recipe):
    from tiny_models import tiny_checkpoint

    whole = tiny_checkpoint()
    return whole, qdit.quantize(
        whole, method="rtn", recipe=qdit.Recipe.preset(recipe, group_size=32)
    )


@pytest.mark.parametrize("numerics", ["simulated", "integer"])
def test_a_checkpoint_gives_the_same_samples(numerics):
    _, small = checkpoint_of("w4a8-fast")
    wide = qdit.with_expanded_weights(small)
    options = {"seed": 3, "numerics": numerics, "batch_size": 2}
    first, second = (qdit.generate(one, qdit.ddim(2), [1, 2], **options) for one in (small, wide))
    np.testing.assert_array_equal(first, second)
    held = [sum(leaf.nbytes for leaf in jax.tree.leaves(one.params)) for one in (small, wide)]
    assert held[0] < held[1]


def test_weights_are_unpacked_where_that_takes_no_more_bytes():
    whole, _ = checkpoint_of("w8a8")
    spec = WeightSpec(6, 8, scale_levels=2)  # 6 bits and two bytes a group of 8: as many as 8 bits
    rule = qdit.Rule("blocks_0/mlp/fc1", qdit.LayerSpec(spec))
    small = qdit.quantize(whole, method="rtn", recipe=qdit.Recipe((rule,), "mine"))
    kernels = [
        one.params["blocks_0"]["mlp"]["fc1"]["kernel"]
        for one in (small, qdit.with_expanded_weights(small))
    ]
    assert [kernel.bits for kernel in kernels] == [6, 8]
    assert kernels[0].nbytes == kernels[1].nbytes


def test_what_has_nothing_to_unpack_is_refused():
    whole, eight = checkpoint_of("w8a8")
    with pytest.raises(ValueError, match="the checkpoint is in full precision"):
        qdit.with_expanded_weights(whole)
    with pytest.raises(ValueError, match="has no effect on w8a8"):
        qdit.with_expanded_weights(eight)
