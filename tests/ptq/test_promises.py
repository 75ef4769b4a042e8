"""Layers that have lost themselves are named."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from qdit_jax.ptq import precision_of, precision_warning
from qdit_jax.quant import WeightSpec, dequantize, formats, quantize, ranges

K, N = 128, 8
W = np.random.default_rng(0).normal(size=(K, N)).astype(np.float32)
SPECS = [
    WeightSpec(8, 32),
    WeightSpec(4, 32, True),
    WeightSpec(2, 0),
    WeightSpec(4, 32, channel_group=2),
    WeightSpec(3, 32, range_fn=ranges.mse(10)),
    WeightSpec(4, 32, scale_levels=2),
    WeightSpec(6, 0, scale_levels=2),
    WeightSpec(3, 32, True, scale_levels=2, channel_group=2),
    *[WeightSpec(fmt=fmt, group_size=32) for fmt in formats.FORMATS.values()],
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("kind", ["normal", "outliers", "heavy", "tiny"])
def test_a_sound_layer_has_no_warning(spec, kind):
    w = {
        "normal": W,
        "outliers": np.where(np.arange(K)[:, None] % 37 == 0, 50 * W, W),
        "heavy": np.sign(W) * np.abs(W) ** 3,
        "tiny": W * np.float32(1e-20),
    }[kind].astype(np.float32)
    q = quantize(w, spec)
    found = precision_of(w, q)
    assert precision_warning(found, q) is None
    error = np.asarray(dequantize(q), np.float64) - w
    wanted = 10 * np.log10(np.square(w, dtype=np.float64).sum() / np.square(error).sum())
    assert found.measured == pytest.approx(wanted, abs=1e-4)


def test_integers_promise_the_noise_of_uniform_rounding():
    for bits, group_size in ((8, 32), (6, 0), (4, 64)):
        q = quantize(W, WeightSpec(bits, group_size))
        found = precision_of(W, q)
        assert found.measured == pytest.approx(found.promised, abs=0.5)
    groups = W.reshape(4, 32, N)
    span = np.maximum(groups.max(1), 0) - np.minimum(groups.min(1), 0)
    noise = (32 * np.square(span / 255) / 12).sum()
    wanted = 10 * np.log10(np.square(W).sum() / noise)
    assert precision_of(W, quantize(W, WeightSpec(8, 32))).promised == pytest.approx(
        wanted, abs=1e-4
    )


def test_a_layer_that_lost_itself_is_described():
    w = W * np.float32(1e-8)
    q = quantize(
        w, WeightSpec(8, 32, range_fn=ranges.qdit_release)
    )  # whose range has a floor of 1e-5
    warning = precision_warning(precision_of(w, q), q)
    assert "dB where 8 bits promise 4" in warning
    w = W * np.float32(1e-37)  # whose steps float32 does not hold
    q = quantize(w, WeightSpec(8, 32))
    assert "dB where 8 bits promise" in precision_warning(precision_of(w, q), q)
    coarse = dataclasses.replace(quantize(W, WeightSpec(8, 32)), scale=jnp.full((4, N), 0.3))
    assert "where 8 bits promise" in precision_warning(precision_of(W, coarse), coarse)
    nan = dataclasses.replace(coarse, scale=jnp.full((4, N), jnp.nan))
    assert "-inf dB where 8 bits" in precision_warning(precision_of(W, nan), nan)


def test_a_lost_channel_among_others_is_counted():
    w = W.copy()
    w[:, 5] *= 1e-9
    q = quantize(w, WeightSpec(fmt=formats.nvfp4))  # whose blocks share a factor
    assert precision_warning(precision_of(w, q), q) == "1 of 8 output channels are lost in nvfp4"
    assert precision_warning(precision_of(w, quantize(w, WeightSpec(4, 32))), q) is None


def measured(w):
    return precision_of(w, quantize(w, WeightSpec(8, 32))).measured


def test_ratios_do_not_overflow_or_vanish():
    wanted = measured(W)
    for std in (1e-30, 1e-16, 1e30):
        w = (W * std).astype(np.float32)
        assert measured(w) == pytest.approx(wanted, abs=0.1)
    zeros = np.zeros((K, N), np.float32)
    assert measured(zeros) == 0
