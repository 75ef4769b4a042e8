"""Specs are hashable settings that survive JSON and refuse what they cannot mean."""

import dataclasses

import numpy as np
import pytest

from qdit_jax.quant import ActSpec, WeightSpec, formats, ranges

SPECS = [
    WeightSpec(),
    WeightSpec(3, 96, True, ranges.mse(20), "float16", 2),
    WeightSpec(range_fn=ranges.qdit_release(clip=0.9)),
    WeightSpec(fmt=formats.nvfp4),
    ActSpec(),
    ActSpec(6, 0, True, ranges.percentile(0.99), "static", True, 0.1701),
    ActSpec(fmt=formats.mxfp8),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_json_gives_back_an_equal_and_equally_hashed_spec(spec):
    again = type(spec).from_json(spec.to_json())
    assert again == spec
    assert hash(again) == hash(spec)


def test_absent_settings_keep_their_defaults():
    assert WeightSpec.from_json({"bits": 6, "range_fn": "absmax"}) == WeightSpec(
        bits=6, range_fn=ranges.absmax
    )


def test_a_format_fixes_bits_symmetry_and_block():
    spec = WeightSpec(fmt=formats.mxfp8)
    assert (spec.bits, spec.symmetric, spec.group_size) == (8, True, 32)
    assert WeightSpec(fmt=formats.nf4, group_size=64).group_size == 64


def test_group_sizes_of_numpy_are_whole_numbers_too():
    assert WeightSpec(group_size=np.int64(64)) == WeightSpec(group_size=64)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightSpec(bits=16), "bits=16 is not supported; use 2 to 8, or 16"),
        (lambda: WeightSpec(bits=True), "bits=True"),
        (lambda: WeightSpec(bits=4.0), "bits=4.0"),
        (lambda: WeightSpec(group_size=-1), "group_size=-1"),
        (lambda: WeightSpec(scale_dtype="int8"), "scale_dtype='int8'"),
        (lambda: WeightSpec(channel_group=0), "channel_group=0"),
        (lambda: WeightSpec(fmt=formats.nf4, channel_group=2), "'nf4' has a scale per channel"),
        (lambda: ActSpec(unsigned=True), "needs symmetric=True"),
        (
            lambda: ActSpec(fmt=formats.mxfp4, mode="static"),
            "'mxfp4' has powers of two as scales",
        ),
        (lambda: ActSpec(fmt=formats.nf4, shift=0.5), "'nf4' is signed and unshifted"),
        (
            lambda: ActSpec(fmt=formats.fp8_e4m3, mode="static", range_fn=ranges.mse()),
            "'mse' measures integer codes, not those of the format 'fp8_e4m3'",
        ),
        (lambda: ActSpec(fmt=formats.lut4), "'lut4' learns a table per kernel"),
        (lambda: ranges.minmax(clip=0.0), "clip=0.0 is not a clip ratio"),
        (lambda: ranges.minmax(ratio=1), "has no setting 'ratio'; it has \\['clip'\\]"),
        (lambda: ranges.percentile(0.2), "p=0.2"),
        (lambda: ranges.mse(num_points=0), "num_points=0"),
        (lambda: ranges.mse(max_shrink=1.0), "max_shrink=1.0"),
        (lambda: ranges.mse(norm=0.0), "norm=0.0"),
        (lambda: ranges.from_json("max"), "unknown range rule 'max'; known rules: absmax"),
        (lambda: formats.by_name("fp3"), "unknown format 'fp3'; known formats: fp4_e2m1"),
        (lambda: WeightSpec.from_json({"bit": 4}), "unknown setting 'bit' of WeightSpec"),
    ],
)
def test_errors_name_the_value_and_what_would_work(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_range_rule_that_is_not_one_is_a_type_error():
    with pytest.raises(TypeError, match="is not a range rule"):
        WeightSpec(range_fn=max)
    with pytest.raises(TypeError, match="is not a range rule"):
        WeightSpec(range_fn=ranges.mse)  # the factory, not a rule


def test_specs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        WeightSpec().bits = 8
