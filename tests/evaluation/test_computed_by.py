"""Reports name who computes products on the platform and in the dtype that the network runs in."""

import dataclasses
from importlib import import_module

import pytest
from tiny_models import CONFIG, tiny_checkpoint

import qdit_jax as qdit
from qdit_jax.cli import main, sample
from qdit_jax.evaluation import SampleFile
from qdit_jax.evaluation.layer_facts import layer_facts
from qdit_jax.evaluation.runs import used_by
from qdit_jax.evaluation.trajectories import Protocol
from qdit_jax.models import DiT, build_model, family_named
from qdit_jax.sampling import sample_attention
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


def test_a_bench_times_it_and_xla_beside_a_kernel(full, expected):
    dtype, name = expected
    recipe = qdit.Recipe.preset("w4a16", full, group_size=32)
    *_, rounded = contenders_of(full, [recipe], dtype=dtype)
    ways = ways_of(rounded, ["simulated"], (), batch=2)
    assert [rounded.implementations(way, 2) for way in ways] == [
        {one: 4} for one in dict.fromkeys((name, name if name == "xla_cpu" else "xla"))
    ]
    both = ways_of(rounded, ["simulated"], [name, "xla"], batch=2)
    assert [*rounded.implementations(both[-1], 2)] == ["xla"]
    assert ways_of(rounded, ["simulated"], [name], batch=2) == [Way("simulated")]


ATTENTION = import_module("qdit_jax.kernels.attention")  # the room has its function by that name
# Heads of 64 channels and whole blocks of positions, which every kernel of attention takes.
HEADS = {"hidden_size": 128, "input_size": 32}
ATTENDED_BY = [
    ("cuda", "bfloat16", {}, "cudnn"),
    ("tpu", "bfloat16", {}, "splash"),
    ("cuda", "float32", {}, "xla"),
    ("cpu", "bfloat16", {}, "xla"),
    ("cuda", "bfloat16", {"k_quant": None}, "xla"),  # rounded in float32
    ("cuda", "bfloat16", {"softmax_quant": None}, "xla"),
]


@pytest.mark.parametrize(("platform", "dtype", "beside", "name"), ATTENDED_BY)
def test_who_computes_attention_is_counted(platform, dtype, beside, name, monkeypatch):
    monkeypatch.setattr(ATTENTION, "default_platform", lambda: platform)
    monkeypatch.setattr("qdit_jax.kernels.cudnn_attention.missing_library", lambda: None)
    monkeypatch.setattr("qdit_jax.kernels.splash_attention.find_spec", lambda name: object())
    model = DiT(**CONFIG | HEADS | {"depth": 2, "dtype": dtype})
    params = {f"blocks_{i}": {"attn": beside} for i in range(2)}
    assert sample_attention(model, params) == {name: 2}


def test_masks_and_sizes_count(monkeypatch):
    """Splash takes neither a mask nor a few positions: of PixArt the text's attentions have one."""
    monkeypatch.setattr(ATTENTION, "default_platform", lambda: "tpu")
    monkeypatch.setattr("qdit_jax.kernels.splash_attention.find_spec", lambda name: object())
    model = build_model("pixart", family_named("pixart").examples[0]).clone(dtype="bfloat16")
    assert set(sample_attention(model, {}, (32, 32, 4))) == {"splash", "xla"}
    assert set(sample_attention(model, {}, (8, 8, 4))) == {"xla"}


def test_reports_say_who_computes_attention(tmp_path, full, capsys):
    recipe = qdit.Recipe.preset("w8a8", full, group_size=32)
    small = dataclasses.replace(
        full, params=qdit.quantize_params(full.params, recipe=recipe), recipe=recipe
    )
    qdit.save(tmp_path / "small", small)
    out = str(tmp_path / "out.npz")
    options = ["--steps", "2", "--num-samples", "1", "--out", out]
    assert main(["sample", str(tmp_path / "small"), *options]) == 0
    assert "simulated numerics by xla_cpu (4 layers) in float32, attention by xla, " in (
        capsys.readouterr().out
    )
    found = qdit.verify(small, against=full, num_samples=2, steps=2, timing=False)
    assert found.to_json()["attention"] == {"xla": 1}
