"""The scripts that build the test bed and say whether it is hard enough."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import qdit_jax as qdit
from qdit_jax.testing import realistic_dit

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments" / "testbeds"


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


def test_every_span_gets_outliers_and_heavy_weights(script):
    injector = script("inject_outliers")
    variation = np.random.default_rng(1).uniform(size=256)
    settings = injector.Injection(spans=2, outliers=3, heavy=1)
    factor = injector.channel_factors(np.random.default_rng(0), variation, settings)
    for part in np.split(factor, 2):
        grown, shrunk = part > 2, part < 0.5
        assert grown.sum() == 3
        assert shrunk.sum() >= 30
        assert len(set(np.flatnonzero(grown) // 32) | set(np.flatnonzero(shrunk) // 32)) == 2
    assert factor[:128].tolist() != factor[128:].tolist()


def test_injection_needs_room_for_two_neighborhoods_in_every_span(script):
    injector = script("inject_outliers")
    for width, spans in ((48, 1), (128, 4), (144, 2)):
        with pytest.raises(ValueError, match=f"width {width} in {spans} spans holds no two whole"):
            injector.channel_factors(
                np.random.default_rng(0), np.ones(width), injector.Injection(spans=spans)
            )


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


def test_the_stages_of_a_build_are_run_once_in_order(script, tmp_path, monkeypatch):
    builder = script("build_testbed")
    called = []

    def stub(name, *files):
        def main(argv):
            called.append(name)
            made = Path(argv[argv.index("--out") + 1]) if "--out" in argv else None
            for file in files:
                path = made / file if made else Path(argv[1]).with_suffix(file)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps({"gate": [], "properties": [], "decibels": {}}))

        monkeypatch.setattr(getattr(builder, name), "main", main)

    stub("train_digits", "tiny_dit.safetensors", "samples.png")
    stub("inject_outliers", ".safetensors")
    stub("finetune_digits", ".safetensors", ".png")
    stub("check_testbed", "testbed.json", "testbed.png")
    for _ in range(2):
        assert "| as_trained | injected | finetuned |" in builder.build(
            "tiny", None, tmp_path, None
        )
    order = ["train_digits", "inject_outliers", "finetune_digits", *3 * ["check_testbed"]]
    assert called == order
    samples = ("as_trained_samples.png", "finetuned_samples.png")
    assert all((tmp_path / name).exists() for name in (*samples, "finetuned.png"))
    (tmp_path / "injected.json").unlink()
    builder.build("tiny", None, tmp_path, None)
    assert called == [*order, "check_testbed"]


@pytest.mark.slow
def test_one_command_builds_three_states_and_an_easy_model_fails(script, tmp_path):
    rng = np.random.default_rng(0)
    data = tmp_path / "digits.npz"
    images = rng.integers(0, 256, (1024, 28, 28), dtype=np.uint8)
    np.savez(data, images=images, labels=rng.integers(0, 10, 1024))
    builder = script("build_testbed")
    summary = builder.build("tiny", str(data), tmp_path / "out", None)
    report = json.loads((tmp_path / "out" / "as_trained.json").read_text())
    failed = {line["name"] for line in report["gate"] if not line["passes"]}
    assert {"W4A8 static collapses: dB below 10", "W4A8 static below groups: dB"} <= failed
    failed = {line["name"] for line in report["properties"] if not line["passes"]}
    assert "qkv: top channel / median channel" in failed
    assert "| the gate | | **fails** |" in summary

    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.safetensors")}
    assert len(made) == 3
    assert builder.build("tiny", str(data), tmp_path / "out", None) == summary
    assert {path: path.stat().st_mtime_ns for path in made} == made
