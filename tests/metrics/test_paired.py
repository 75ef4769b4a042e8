"""Paired measures and their intervals: oracles, laws, coverage, size of the test."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qdit_jax.metrics import (
    bootstrap_band,
    bootstrap_interval,
    cosine,
    paired_test,
    psnr,
    signal_to_noise_db,
    ssim,
)


def pair(shape=(5, 16, 16, 3), noise=0.1):
    rng = np.random.default_rng(sum(shape))
    x = np.clip(rng.normal(size=shape), -1, 1)
    return x, x + noise * rng.normal(size=shape)


def test_decibels_equal_their_definitions():
    x, y = pair()
    for i in range(5):
        error = y[i] - x[i]
        snr = 10 * np.log10((x[i] ** 2).sum() / (error**2).sum())
        assert signal_to_noise_db(x, y)[i] == pytest.approx(snr)
        assert psnr(x, y)[i] == pytest.approx(10 * np.log10(4 / (error**2).mean()))
        flat = x[i].ravel(), y[i].ravel()
        expected = flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])
        assert cosine(x, y)[i] == pytest.approx(expected)


def test_ten_times_less_error_is_twenty_decibels_more():
    x, y = pair()
    closer = x + 0.1 * (y - x)
    np.testing.assert_allclose(signal_to_noise_db(x, closer) - signal_to_noise_db(x, y), 20)
    np.testing.assert_allclose(psnr(x, closer) - psnr(x, y), 20)


def test_equal_arrays_reach_the_cap_and_not_infinity():
    x, _ = pair()
    assert (signal_to_noise_db(x, x) == 200).all()
    assert (psnr(x, x) == 200).all()
    assert (signal_to_noise_db(0 * x, 0 * x) == 200).all()
    assert (signal_to_noise_db(0 * x, x) == -200).all()
    np.testing.assert_allclose(cosine(x, x), 1)
    np.testing.assert_allclose(ssim(x, x), 1)
    assert (cosine(0 * x, x) == 0).all()


def slow_ssim(x, y, peak=2.0):
    offsets = np.arange(11) - 5
    g = np.exp(-(offsets**2) / (2 * 1.5**2))
    weights = np.outer(g, g) / g.sum() ** 2
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    values = []
    for i, j, c in itertools.product(
        range(x.shape[0] - 10), range(x.shape[1] - 10), range(x.shape[2])
    ):
        a, b = x[i : i + 11, j : j + 11, c], y[i : i + 11, j : j + 11, c]
        ma, mb = (weights * a).sum(), (weights * b).sum()
        va, vb = (weights * (a - ma) ** 2).sum(), (weights * (b - mb) ** 2).sum()
        cov = (weights * (a - ma) * (b - mb)).sum()
        values.append((2 * ma * mb + c1) * (2 * cov + c2) / (ma**2 + mb**2 + c1) / (va + vb + c2))
    return np.mean(values)


@pytest.mark.parametrize("shape", [(2, 16, 16, 1), (2, 13, 18, 3), (2, 11, 11, 1)])
def test_ssim_equals_its_definition(shape):
    x, y = pair(shape, 0.3)
    expected = [slow_ssim(a, b) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(ssim(x, y), expected, rtol=1e-9)


def test_interval_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        interval = bootstrap_interval(rng.normal(3, 1, 60), seed=trial, num_resamples=300)
        assert interval.low <= interval.estimate <= interval.high
        hits += interval.low <= 3 <= interval.high
    assert 0.87 <= hits / 200 <= 0.99


def test_p_values_are_uniform_without_a_difference_and_small_with_one():
    rng = np.random.default_rng(1)
    shared = rng.normal(20, 5, (150, 40))  # what a sample's difficulty adds to both recipes
    noise = rng.normal(size=(2, 150, 40))
    null = [
        paired_test(s + a, s + b, num_permutations=400).p_value
        for s, a, b in zip(shared, *noise, strict=True)
    ]
    assert 0.005 <= np.mean(np.array(null) < 0.05) <= 0.11
    result = paired_test(shared[0] + noise[0, 0] + 1, shared[0] + noise[1, 0])
    assert result.p_value < 0.01
    assert result.difference.low > 0
    assert result.num_samples == 40


def test_a_band_is_the_interval_of_every_quantity():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(60, 3)) * [1, 2, 5] + [0, 10, -3]
    mean, low, high = bootstrap_band(values, num_resamples=4000)
    for i in range(3):
        interval = bootstrap_interval(values[:, i])
        assert mean[i] == pytest.approx(interval.estimate)
        width = interval.high - interval.low
        np.testing.assert_allclose(
            [low[i], high[i]], [interval.low, interval.high], atol=0.06 * width
        )


def test_few_samples_are_enumerated():
    assert paired_test(np.array([1.0, 2, 3]), np.zeros(3)).p_value == pytest.approx(2 / 8)
    assert paired_test(np.array([1.0, 1, 1, 1]), np.ones(4)).p_value == 1
    swapped = paired_test(np.zeros(3), np.array([1.0, 2, 3]))
    assert swapped.p_value == pytest.approx(2 / 8)
    assert swapped.difference.estimate == -2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: psnr(x, x[:3]), "cannot be paired"),
        (lambda x: ssim(x[:, :8], x[:, :8]), "smaller than window=11"),
        (lambda x: bootstrap_interval(np.ones(1)), "too few"),
        (lambda x: bootstrap_interval(np.array([1.0, np.inf])), "1 of 2 values are NaN"),
        (lambda x: bootstrap_band(np.full((3, 2), np.nan)), "6 of 6 values are NaN"),
        (lambda x: paired_test(np.ones(3), np.ones(4)), "same noise and labels"),
    ],
)
def test_bad_input_gets_a_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call(pair()[0])
