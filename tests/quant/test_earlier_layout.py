"""What the code before K-major storage recorded: its codes, values and products come back."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from qdit_jax.kernels import quantized_matmul
from qdit_jax.quant import ActSpec, WeightSpec, dequantize, integer_codes, packed_nbytes, quantize

GOLDEN = Path(__file__).parent.parent / "goldens/row_major/arrays.npz"
with np.load(GOLDEN) as file:
    RECORDED = dict(file)
CASES = json.loads(str(RECORDED.pop("cases")))
ACTS = {"none": None, "32": ActSpec(8, 32), "0": ActSpec(8, 0, symmetric=True)}


@pytest.fixture(params=CASES, ids=lambda case: case["name"])
def case(request):
    found = request.param
    w = np.random.default_rng(found["seed"]).normal(size=found["shape"]).astype(np.float32)
    return found["name"], quantize(w, WeightSpec.from_json(found["spec"])), found


def test_codes_scales_and_values_are_those_recorded(case):
    name, q, found = case
    np.testing.assert_array_equal(integer_codes(q), RECORDED[f"{name}:whole"])
    np.testing.assert_array_equal(dequantize(q), RECORDED[f"{name}:values"])
    for field in ("scale", "offset", "channel_scale", "tensor_scale", "codebook"):
        wanted, now = RECORDED.get(f"{name}:{field}"), getattr(q, field)
        assert (wanted is None) == (now is None)
        if now is not None:
            bits = np.asarray(now.view(jnp.uint16) if now.dtype == jnp.bfloat16 else now)
            np.testing.assert_array_equal(bits if bits.ndim < 2 else bits.T, wanted)
    held = sum(
        RECORDED[key].nbytes for key in RECORDED if key.startswith(f"{name}:") and is_held(key)
    )
    assert q.nbytes == held == found["nbytes"]
    assert held == packed_nbytes(*found["shape"], WeightSpec.from_json(found["spec"]))


def is_held(key):
    return key.split(":")[1] in QFIELDS


QFIELDS = (
    *("codes", "scale", "packed_zero_point", "tensor_scale"),
    *("channel_scale", "offset", "codebook"),
)


def test_products_are_those_recorded_to_float_rounding(case):
    name, q, found = case
    x = np.random.default_rng(1001 + found["seed"]).normal(size=(3, found["shape"][0]))
    for key in (
        key for key in RECORDED if key.startswith((f"{name}:simulated", f"{name}:integer"))
    ):
        _, numerics, act = key.split(":")
        y = quantized_matmul(x.astype(np.float32), q, ACTS[act], numerics)
        wanted = RECORDED[key]
        np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max() + 1e-30)
