"""Reports name who computes products on the platform and in the dtype that the network runs in."""

import dataclasses

import pytest
from tiny_models import tiny_checkpoint

import qdit_jax as qdit
from qdit_jax.cli import sample
from qdit_jax.evaluation import SampleFile
from qdit_jax.evaluation.layer_facts import layer_facts
from qdit_jax.evaluation.runs import used_by
from qdit_jax.evaluation.trajectories import Protocol
from qdit_jax.speed.contenders import Way, contenders_of, ways_of

# What takes weights alone: in 16 bits a kernel, in 32 XLA.
COMPUTED_BY = [
    ("cuda", "bfloat16", "gpu_weights"),
    ("tpu", "bfloat16", "tpu_weights"),
    ("cuda", "float32", "xla"),
    ("tpu", "float32", "xla"),
    ("cpu", "bfloat16", "xla_cpu"),
]


@pytest.fixture(scope="module")
def full():
    return tiny_checkpoint(hidden_size=128)


@pytest.fixture(params=COMPUTED_BY, ids=lambda row: " ".join(row))
def expected(request, monkeypatch):
    """Returns dtype and implementation, as if this machine were a platform that lacks nothing."""
    platform, dtype, name = request.param
    monkeypatch.setattr("qdit_jax.kernels.matmul.default_platform", lambda: platform)
    monkeypatch.setattr("qdit_jax.kernels.gpu_reasons.machine_reason", lambda check: None)
    monkeypatch.setattr("qdit_jax.kernels.tpu_reasons.machine_reason", lambda: None)
    return dtype, name


@pytest.fixture
def small(full, expected):
    recipe = qdit.Recipe.preset("w4a16", full, group_size=32)
    params = qdit.quantize_params(full.params, recipe=recipe)
    return qdit.with_dtype(dataclasses.replace(full, params=params, recipe=recipe), expected[0])


def test_evaluations_count_it(small, expected):
    protocol = Protocol(qdit.ddim(steps=2), {}, 2)
    assert used_by(small, protocol, batch_size=2) == {expected[1]: 4}


def test_samples_say_it(small, expected):
    job = SampleFile(small, qdit.ddim(steps=2), None, num_samples=2)
    assert sample.precision(job) == f"quantized, simulated numerics by {expected[1]} (4 layers)"


def test_verifying_says_it_of_every_layer(small, full, expected):
    rows = layer_facts(small, full, numerics="simulated", batch_size=2)
    assert {row.implementation for row in rows if row.kind == "linear"} == {expected[1]}


def test_a_bench_times_it_and_xla_beside_it(full, expected):
    dtype, name = expected
    recipe = qdit.Recipe.preset("w4a16", full, group_size=32)
    *_, rounded = contenders_of(full, [recipe], dtype=dtype)
    ways = ways_of(rounded, ["simulated"], (), batch=2)
    assert [rounded.implementations(way, 2) for way in ways] == [
        {one: 4} for one in dict.fromkeys((name, "xla"))
    ]
    assert ways_of(rounded, ["simulated"], [name], batch=2) == [Way("simulated")]
