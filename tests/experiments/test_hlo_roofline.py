"""The least time of a compiled program, counted from its text."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """HloModule a_step

%fused_dot (p0.1: bf16[4096,1152], p1.1: bf16[1152,4608]) -> bf16[4096,4608] {
  %p0.1 = bf16[4096,1152]{1,0} parameter(0)
  %p1.1 = bf16[1152,4608]{1,0} parameter(1)
  ROOT %dot.1 = bf16[4096,4608]{1,0} dot(%p0.1, %p1.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%fused_slice (p0.2: f32[16,6912]) -> f32[16,1152] {
  %p0.2 = f32[16,6912]{1,0} parameter(0)
  ROOT %slice.1 = f32[16,1152]{1,0} slice(%p0.2), slice={[0:16], [0:1152]}
}

ENTRY %main (x.1: f32[4096,1152], w.1: bf16[1152,4608], m.1: f32[16,6912]) -> bf16[4096,4608] {
  %x.1 = f32[4096,1152]{1,0} parameter(0)
  %w.1 = bf16[1152,4608]{1,0} parameter(1)
  %m.1 = f32[16,6912]{1,0} parameter(2)
  %rows = (s8[4096,1152]{1,0}, f32[4096]{0}) custom-call(%x.1, %m.1), custom_call_target="mosaic_gpu_v2", backend_config={cost_estimate_json = "{\\22flops\\22: 94371840}"}
  %codes = s8[4096,1152]{1,0} get-tuple-element(%rows), index=0
  %product = bf16[4096,1152]{1,0} custom-call(%codes, %w.1), custom_call_target="mosaic_gpu_v2", backend_config={cost_estimate_json = "{\\22flops\\22: 197900000000}"}
  %part = f32[16,1152]{1,0} fusion(%m.1), kind=kLoop, calls=%fused_slice
  ROOT %out = bf16[4096,4608]{1,0} fusion(%product, %w.1), kind=kCustom, calls=%fused_dot
}
"""


@pytest.fixture
def hlo_roofline(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "experiments/accelerators"), *sys.path])
    return importlib.import_module("hlo_roofline")


def test_every_operation_takes_the_longer_of_its_products_and_its_bytes(hlo_roofline):
    found = hlo_roofline.step_roofline(PROGRAM)
    rows = (4096 * 1152 * (4 + 1) + 16 * 6912 * 4 + 4096 * 4) / 3350e9
    part = 2 * 16 * 1152 * 4 / 3350e9  # of a slice, the slice
    products = 197.9e9 / 1979e12 + 2 * 4096 * 1152 * 4608 / 989e12
    assert found["operations"] == 4
    assert found["others_us"] == pytest.approx(1e6 * (rows + part), abs=0.1)
    assert found["products_us"] == pytest.approx(1e6 * products, abs=0.1)
    assert found["us"] == pytest.approx(1e6 * (rows + part + products), abs=0.1)


def test_fp8_is_counted_as_int8_is(hlo_roofline):
    text = PROGRAM.replace("s8[", "f8e4m3fn[")
    assert hlo_roofline.step_roofline(text) == hlo_roofline.step_roofline(PROGRAM)


def test_a_loop_is_refused(hlo_roofline):
    text = PROGRAM.replace("fusion(%m.1), kind=kLoop", "while(%m.1), kind=kLoop")
    with pytest.raises(AssertionError, match="a loop"):
        hlo_roofline.step_roofline(text)


def test_the_workspace_of_cublas_is_not_written(hlo_roofline):
    text = """HloModule a_product

ENTRY %main (x.1: bf16[16,1152], w.1: bf16[1152,6912]) -> bf16[16,6912] {
  %x.1 = bf16[16,1152]{1,0} parameter(0)
  %w.1 = bf16[1152,6912]{1,0} parameter(1)
  %both = (bf16[16,6912]{1,0}, s8[4194304]{0}) custom-call(%x.1, %w.1), custom_call_target="__cublas$lt$matmul", backend_config={"lhs_contracting_dimensions":["1"]}
  ROOT %out = bf16[16,6912]{1,0} get-tuple-element(%both), index=0
}
"""
    moved = 2 * (16 * 1152 + 1152 * 6912 + 16 * 6912)
    assert hlo_roofline.step_roofline(text)["us"] == pytest.approx(1e6 * moved / 3350e9, abs=0.1)
