"""Costs count the segments that the integer product has."""

import numpy as np

from qdit_jax.allocation import SearchLayer
from qdit_jax.allocation.cost import num_segments, segment_lengths
from qdit_jax.quant import ActSpec, WeightSpec
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
