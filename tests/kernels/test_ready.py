"""Kernels with what a loop would compute in each step: the same products, to the bit."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreted_gpu import needs_interpreter, printed

import qdit_jax as qdit
from qdit_jax.checkpoint.codec import split_fields
from qdit_jax.kernels import IMPLEMENTATIONS, quantized_matmul, ready
from qdit_jax.models import DiT
from qdit_jax.quant import (
    ActQuant,
    ActSpec,
    QTensor,
    WeightSpec,
    formats,
    integer_codes,
    quantize,
    readied,
    select_columns,
    with_codes,
)
from qdit_jax.sampling import with_ready_kernels

ZERO_POINTS, TOKEN = ActSpec(8, 128), ActSpec(8, 0, symmetric=True)
SPECS = {
    "4 bits": WeightSpec(4, 128),
    "symmetric": WeightSpec(4, 128, symmetric=True),
    "8 bits": WeightSpec(8, 128),
    "groups of 32": WeightSpec(4, 32),
    "per channel": WeightSpec(8, 0, symmetric=True),
    "a shorter last group": WeightSpec(3, 160),
}


def kernel(name, channels=256, width=24):
    rng = np.random.default_rng(0)
    w = rng.normal(size=(channels, width))
    w[3] *= 50
    w[128:, 5] = np.abs(w[128:, 5])
    return quantize(jnp.asarray(w, jnp.float32), SPECS[name])


def inputs(channels=256):
    return jnp.asarray(np.random.default_rng(1).normal(size=(6, channels)) + 0.5, jnp.float32)


@pytest.mark.parametrize("name", SPECS)
def test_sums_are_those_of_the_codes_less_their_zero_points(name):
    q = kernel(name)
    codes, size = np.asarray(integer_codes(q), int), q.group_size or q.shape[0]
    zero = np.full(q.scale.shape, 2 ** (q.bits - 1)) if q.symmetric else np.asarray(q.zero_point)
    moved = codes - np.repeat(zero.astype(int), size, axis=0)[: len(codes)]
    expected = [moved[first : first + size].sum(0) for first in range(0, len(codes), size)]
    found = readied(q, with_sums=True)
    np.testing.assert_array_equal(found.ready.sums, expected)
    assert found.scale.dtype == jnp.float32
    assert (found.zero_point is None) == q.symmetric


@pytest.mark.parametrize("numerics", ["simulated", "integer"])
@pytest.mark.parametrize("name", SPECS)
def test_xla_multiplies_it_to_the_same_bits(name, numerics):
    q, x = kernel(name), inputs()
    found = readied(q, with_sums=True)
    for act in (ZERO_POINTS, TOKEN):
        one, two = (quantized_matmul(x, w, act, numerics, "xla") for w in (q, found))
        np.testing.assert_array_equal(one, two)


@needs_interpreter
def test_the_kernel_in_groups_multiplies_it_to_the_same_bits():
    found = printed("ready_products.py")
    assert len(found) == 8
    assert all(found.values()), found


def test_who_computes_a_product_says_what_it_needs():
    q, grouped = kernel("per channel"), kernel("4 bits")
    act = ActQuant(TOKEN)
    assert ready(q, act, "integer", platform="cpu", dtype="float32") is q
    by_levels = IMPLEMENTATIONS["gpu_levels"].ready_fn(q, TOKEN)
    assert by_levels.scale.dtype == jnp.float32
    assert by_levels.ready.sums is None
    assert IMPLEMENTATIONS["gpu_groups"].ready_fn(grouped, ZERO_POINTS).ready.sums is not None
    by_tpu = IMPLEMENTATIONS["tpu_groups"].ready_fn(grouped, ZERO_POINTS)
    assert (by_tpu.scale.dtype, by_tpu.ready.sums) == (jnp.float32, None)
    levels = quantize(jnp.ones((64, 8)), WeightSpec(4, 32, scale_levels=2))
    assert IMPLEMENTATIONS["tpu_levels"].ready_fn(levels, TOKEN) is levels
    symmetric = ActSpec(8, 128, symmetric=True)
    assert IMPLEMENTATIONS["gpu_groups"].ready_fn(grouped, symmetric).ready.sums is None
    with pytest.raises(ValueError, match="'fast' is not known"):
        ready(q, act, "integer", "fast", dtype="float32")


def test_fp8_has_its_scales_in_float32():
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(256, 24)), jnp.float32)
    q = quantize(w, WeightSpec(fmt=formats.fp8_e4m3, group_size=0, scale_dtype="float16"))
    act = ActQuant(ActSpec(fmt=formats.fp8_e4m3, group_size=0))
    found = IMPLEMENTATIONS["gpu_fp8"].ready_fn(q, act.spec)
    assert (q.scale.dtype, found.scale.dtype) == (jnp.float16, jnp.float32)
    one, two = (quantized_matmul(inputs(), kernel, act, "integer", "xla") for kernel in (q, found))
    np.testing.assert_array_equal(one, two)


def test_what_is_made_of_a_ready_kernel_is_not_ready():
    q = readied(kernel("4 bits"), with_sums=True)
    assert select_columns(q, slice(0, 3)).ready is None
    assert with_codes(q, integer_codes(q)).ready is None
    held, static = split_fields(q)
    assert "ready" not in {**held, **static}


def test_a_network_computes_the_same_with_them(monkeypatch):
    model = DiT(input_size=8, hidden_size=128, num_heads=2, depth=1, numerics="integer")
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs())["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: 0.2 * rng.normal(size=a.shape).astype("f"), shapes)
    params = qdit.quantize_params(params, recipe=qdit.Recipe.preset("w4a8", params, group_size=128))
    assert all(leaf.ready is None for leaf in kernels_of(with_ready_kernels(model, params)))
    row = dataclasses.replace(
        IMPLEMENTATIONS["xla_cpu"], ready_fn=IMPLEMENTATIONS["gpu_groups"].ready_fn
    )
    monkeypatch.setitem(IMPLEMENTATIONS, "xla_cpu", row)
    prepared = with_ready_kernels(model, params)
    assert all(leaf.ready.sums is not None for leaf in kernels_of(prepared))
    x = jax.random.normal(jax.random.key(1), (1, 8, 8, 4))
    timestep, labels = jnp.ones(1), jnp.zeros(1, int)
    one, two = (model.apply({"params": tree}, x, timestep, labels) for tree in (params, prepared))
    np.testing.assert_array_equal(one, two)


def kernels_of(params):
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, QTensor))
    return [leaf for leaf in leaves if isinstance(leaf, QTensor)]


ON_MESHES = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from qdit_jax.kernels import IMPLEMENTATIONS, running
from qdit_jax.quant import ActQuant, ActSpec, WeightSpec, quantize, readied

import dataclasses
row = dataclasses.replace(IMPLEMENTATIONS["xla_cpu"], ready_fn=IMPLEMENTATIONS["gpu_groups"].ready_fn)
IMPLEMENTATIONS["xla_cpu"] = row
w = jnp.asarray(np.random.default_rng(0).normal(size=(256, 64)), jnp.float32)
q = quantize(w, WeightSpec(4, 128))
expected = readied(q, with_sums=True)
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((4,), ("model",), axis_types=(kind,))
    spec = lambda a: PartitionSpec("model", None) if a is q.codes else PartitionSpec(None, "model")
    split = jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, spec(a))), q)
    found = running.ready(split, ActQuant(ActSpec(8, 128)), "integer", dtype="float32")
    assert found.codes.sharding == split.codes.sharding, found.codes.sharding
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, two)
        assert one.sharding.mesh == mesh
"""


def test_shards_stay_where_they_are_on_any_mesh():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", ON_MESHES],
        env={**os.environ, **flags},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
