"""The scripts that build the test bed and say whether it is hard enough."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import qdit_jax as qdit
from qdit_jax.testing import realistic_dit

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"


@pytest.fixture
def script(monkeypatch):
    """Returns a function from the name of a script to its module."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(EXPERIMENTS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_injection_keeps_the_function_and_makes_outliers(script):
    injector = script("inject_outliers")
    model, params = realistic_dit(depth=1)
    checkpoint = qdit.Checkpoint(model, params)
    injected = injector.inject(checkpoint, injector.Injection(neighborhood=32))
    assert injector.largest_change(checkpoint, injected) < 1e-5
    kernels = (p["blocks_0"]["mlp"]["fc1"]["kernel"] for p in (params, injected))
    before, after = (np.sort(np.abs(kernel).max(1)) for kernel in kernels)
    assert after[-1] > 2 * before[-1]
    assert after[0] < before[0] / 2


def test_injection_needs_room_for_two_neighborhoods(script):
    injector = script("inject_outliers")
    with pytest.raises(ValueError, match="width 48 holds no two neighborhoods of 32"):
        injector.channel_factors(np.random.default_rng(0), np.ones(48), injector.Injection())


@pytest.mark.slow
def test_measures_find_what_the_random_bed_was_built_with(script):
    measures = script("testbed_measures")
    checkpoint = qdit.Checkpoint(*realistic_dit(depth=1))
    sampler = qdit.ddim(steps=3)
    seen = measures.collect(checkpoint, sampler, jax.random.key(0), 4, 1.5)
    assert seen["blocks_0/mlp/fc1"]["channel_max"].shape == (2, 3, 128)
    found = {line.name: line for line in measures.measure(checkpoint, seen)}
    assert found["qkv: top channel / median channel"].passes
    assert found["fc1: weights, input spread / output spread"].value > 3
    assert found["fc2: skewness after GELU"].passes
    assert found["proj: top channel / median channel"].least is None


def test_the_gate_tells_a_hard_bed_from_an_easy_one(script):
    check = script("check_testbed")
    names = [check.W8A8, check.STATIC, check.GROUPS, check.DYNAMIC, check.A4_TOKEN, check.A4_GROUPS]
    noise = np.linspace(-1, 1, 20)

    def verdicts(*decibels):
        lines = check.gate({n: d + noise for n, d in zip(names, decibels, strict=True)})
        return [line.passes for line in lines]

    assert all(verdicts(41, 6, 22, 23, 5, 17))
    assert not any(verdicts(24, 24, 24.1, 24, 23.5, 24)[i] for i in (0, 1, 2, 4, 5, 6))
