"""Costs count the segments that the integer product has."""

import jax
import numpy as np

from qdit_jax.allocation import SearchLayer, named_costs
from qdit_jax.allocation.assigned import chosen, kernel_branch
from qdit_jax.allocation.cost import num_corrections, num_segments, segment_lengths
from qdit_jax.quant import ActSpec, WeightSpec, dequantize, formats, packed_nbytes, quantize
from qdit_jax.recipes import LayerSpec


def lengths(num_channels, weight, act):
    spec = LayerSpec(
        None if weight is None else WeightSpec(4, weight), None if act is None else ActSpec(8, act)
    )
    layer = SearchLayer("a", (num_channels, 8), (spec,))
    assert num_segments(layer, spec) == len(segment_lengths(layer, spec))
    return segment_lengths(layer, spec)


def test_segments_refine_both_groupings():
    np.testing.assert_array_equal(lengths(100, 48, 32), [32, 16, 16, 32, 4])
    np.testing.assert_array_equal(lengths(100, 32, None), [32, 32, 32, 4])
    np.testing.assert_array_equal(lengths(100, None, 0), [100])
    np.testing.assert_array_equal(lengths(100, None, None), [100])


def test_a_sum_longer_than_an_accumulator_holds_is_cut():
    np.testing.assert_array_equal(lengths(20000, 0, 0), [8192, 8192, 3616])


def test_levels_are_one_segment_of_8_bits_without_a_zero_point():
    levels = WeightSpec(4, 32, scale_levels=2)
    codebook = WeightSpec(fmt=formats.lut4, group_size=16)
    token, per_channel = ActSpec(8, 0, symmetric=True), WeightSpec(8, 0, symmetric=True)
    costs = named_costs()
    for weight in (levels, codebook):
        spec = LayerSpec(weight, token)
        layer = SearchLayer("a", (96, 8), (spec,), rows=5)
        np.testing.assert_array_equal(segment_lengths(layer, spec), [96])
        assert num_corrections(spec) == 1
        assert num_corrections(LayerSpec(weight, ActSpec(8, 0))) == 2
        grouped = segment_lengths(layer, LayerSpec(weight, ActSpec(8, 48)))
        np.testing.assert_array_equal(grouped, [48, 48])
        for name in ("bitops", "gpu", "tpu", "cpu"):
            assert costs[name](layer, spec) == costs[name](layer, LayerSpec(per_channel, token))
        assert costs["bytes"](layer, spec) == packed_nbytes(96, 8, weight)
    assert packed_nbytes(96, 8, levels) == 48 * 8 + 2 * 3 * 8 + 4 * 8
    assert packed_nbytes(96, 8, codebook) == 48 * 8 + 6 * 8 + 4 * 8 + 4 * 16


def test_an_assignment_of_levels_is_what_quantizing_gives():
    w = np.random.default_rng(0).normal(size=(96, 8)).astype(np.float32)
    plain, levels = WeightSpec(4, 32), WeightSpec(4, 32, scale_levels=2)
    specs = (plain, levels, WeightSpec(4, 48, scale_levels=2), WeightSpec(4, 48), None)
    found = jax.jit(lambda choice: chosen(kernel_branch, specs, choice, w))
    for choice, spec in enumerate(specs):
        wanted = w if spec is None else dequantize(quantize(w, spec))
        np.testing.assert_allclose(found(choice), wanted, rtol=1e-5)
