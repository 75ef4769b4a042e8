"""The release's weight quantizer, code for code."""

import json

import numpy as np
import pytest

from qdit_jax.quant import WeightSpec, dequantize, integer_codes, quantize, ranges


@pytest.fixture(scope="module")
def reference(golden):
    return dict(np.load(golden("weight_quant.npz")))


def parse(case):
    kind, bits, group, *rest = case.split("_")
    return kind == "sym", int(bits[1:]), int(group[1:]), rest


def check(reference, case):
    symmetric, bits, group_size, (method, clip) = parse(case)
    rule = ranges.qdit_release_mse if method == "mse" else ranges.qdit_release(clip=float(clip[1:]))
    q = quantize(reference["W"].T, WeightSpec(bits, group_size, symmetric, range_fn=rule))
    decided = np.ones(q.scale.T.shape, bool)
    if method == "mse":  # where two ratios score the same, either may win
        decided = reference[f"margin__{case}"].reshape(decided.shape) > 1e-6
    codes = np.asarray(integer_codes(q)).T.astype(int) - (2 ** (bits - 1) if symmetric else 0)
    of_decided = np.repeat(decided, group_size or codes.shape[1], axis=1)
    np.testing.assert_array_equal(codes[of_decided], reference[f"code__{case}"][of_decided])
    scale = reference[f"scale__{case}"].reshape(decided.shape)
    np.testing.assert_allclose(np.asarray(q.scale.T)[decided], scale[decided], rtol=1.2e-7)
    if method == "max":
        np.testing.assert_array_equal(q.scale.T, scale)
    if not symmetric:
        zero_point = reference[f"zero__{case}"].reshape(decided.shape)
        np.testing.assert_array_equal(q.zero_point.T, zero_point)


def cases(method, bits):
    return [
        f"{kind}_b{b}_g{group}_{method}_c{clip}"
        for kind in ("sym", "asym")
        for b in bits
        for group in (0, 32, 64, 96, 192, 288)
        for clip in ((1.0, 0.9) if method == "max" else (1.0,))
    ]


FAST = (
    "sym_b4_g0_max_c0.9",
    "sym_b3_g96_max_c1.0",
    "asym_b4_g32_max_c1.0",
    "asym_b8_g288_max_c0.9",
    "asym_b2_g64_max_c1.0",
    "sym_b4_g96_mse_c1.0",
    "asym_b4_g64_mse_c1.0",
)
SLOW = sorted({*cases("max", (2, 3, 4, 6, 8)), *cases("mse", (2, 3, 4, 6, 8))} - set(FAST))


@pytest.mark.parametrize("case", FAST)
def test_codes_scales_and_zero_points_equal_the_release_s(reference, case):
    check(reference, case)


@pytest.mark.slow
def test_every_case_equals_the_release_s(reference):
    assert set(json.loads(str(reference["cases"]))) >= {*FAST, *SLOW}
    for case in SLOW:
        check(reference, case)


def test_channel_groups_equal_the_release_s(reference):
    names = [key.removeprefix("deqcg__") for key in reference if key.startswith("deqcg__")]
    assert len(names) == 4
    for case in names:
        symmetric, bits, group_size, (channels,) = parse(case)
        spec = WeightSpec(
            bits, group_size, symmetric, ranges.qdit_release, channel_group=int(channels[2:])
        )
        q = quantize(reference["W"].T, spec)
        np.testing.assert_array_equal(q.scale.T, reference[f"scalecg__{case}"])
        np.testing.assert_array_equal(dequantize(q).T, reference[f"deqcg__{case}"])
