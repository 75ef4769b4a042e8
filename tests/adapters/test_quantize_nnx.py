"""NNX networks that this library did not build, quantized in place of their layers."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx
from nnx_networks import Block, D, Odd, WanLike, Zoo

import qdit_jax as qdit
from qdit_jax.adapters.nnx import check_arguments
from qdit_jax.quant import ActQuant, dequantize, quantize

W4 = qdit.WeightSpec(bits=4, group_size=8)
BLOCKS = r"blocks/(attn\d/[a-z_]+|ffn/layers/\d)"
A8 = qdit.ActSpec(bits=8, group_size=8)


def recipe_of(layers: str = ".*", weight=W4, act=None) -> qdit.Recipe:
    return qdit.Recipe((qdit.Rule(layers, qdit.LayerSpec(weight, act)),), "test")


def inputs(seed: int = 0, width: int = D):
    return jax.random.normal(jax.random.key(seed), (2, 5, width)) * jnp.where(
        jnp.arange(width) == 3, 20, 1
    )


def by_hand(kernel, num_in: int, lead: int = 0):
    """Returns a kernel rounded to 4 bits: its axes as matrices, each quantized and read back."""
    array = np.asarray(kernel)
    stacks = array.reshape(-1, *array.shape[lead:])
    rounded = [
        dequantize(quantize(jnp.asarray(one.reshape(np.prod(one.shape[:num_in]), -1)), W4))
        for one in stacks
    ]
    return jnp.asarray(np.stack(rounded).reshape(array.shape))


def with_rounded_kernels(model):
    """Returns a copy in which every kernel holds the values that four bits leave of it."""
    copy = nnx.clone(model)
    for _, module in nnx.iter_graph(copy):
        if isinstance(module, nnx.LinearGeneral):
            module.kernel[...] = by_hand(
                module.kernel[...], len(module.in_features), len(module.batch_axis)
            )
        elif isinstance(module, nnx.Linear | nnx.Einsum):
            module.kernel[...] = by_hand(module.kernel[...], 1, module.kernel.ndim - 2)
    return copy


@pytest.fixture(scope="module")
def zoo():
    return Zoo(nnx.Rngs(0))


@pytest.fixture(scope="module")
def quantized(zoo):
    return qdit.quantize_nnx(zoo, recipe_of())


def test_every_kind_of_layer_multiplies_by_its_rounded_kernel(zoo, quantized):
    x = inputs()
    expected = with_rounded_kernels(zoo)(x)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(quantized, x), expected, atol=2e-5)
    assert np.abs(np.asarray(expected - zoo(x))).max() > 1e-2  # rounding shows


def test_the_network_given_stays_as_it_is(zoo, quantized):
    assert type(zoo.head.layers[0]) is nnx.Linear
    assert quantized.named.first is quantized.named.again


def test_what_is_not_quantized_is_not_copied():
    block = Block(rngs=nnx.Rngs(0))
    small = qdit.quantize_nnx(block, recipe_of("up"))
    assert small.down.kernel is not block.down.kernel
    assert small.down.kernel.get_raw_value() is block.down.kernel.get_raw_value()


def test_arrays_are_packed(quantized):
    kernel = quantized.blocks[0].up.weight.tree()
    assert isinstance(kernel, qdit.QTensor)
    assert kernel.codes.size == D * 2 * D // 2
    with pytest.raises(AttributeError, match="kernel is quantized"):
        _ = quantized.blocks[0].up.kernel


@pytest.mark.parametrize("numerics", ["simulated", "integer"])
def test_inputs_are_quantized(numerics):
    layer = nnx.Linear(D, 8, rngs=nnx.Rngs(1))
    small = qdit.quantize_nnx(layer, recipe_of(act=A8), numerics=numerics)
    x = inputs()
    q = quantize(layer.kernel[...], W4)
    expected = qdit.quantized_matmul(x, q, ActQuant(A8), numerics=numerics) + layer.bias[...]
    np.testing.assert_allclose(small(x), expected, atol=1e-5)
    only_input = qdit.quantize_nnx(layer, recipe_of(weight=None, act=A8))
    np.testing.assert_allclose(only_input(x), layer(ActQuant(A8)(x)), atol=1e-5)


def test_results_have_the_dtype_that_they_had():
    layer = nnx.Linear(D, 8, dtype=jnp.bfloat16, rngs=nnx.Rngs(1))
    assert qdit.quantize_nnx(layer, recipe_of())(inputs()).dtype == jnp.bfloat16
    wide = nnx.Linear(D, 8, param_dtype=jnp.float32, rngs=nnx.Rngs(1))
    small = qdit.quantize_nnx(wide, recipe_of())
    assert small(inputs().astype(jnp.bfloat16)).dtype == jnp.float32


@pytest.fixture(scope="module")
def wan():
    return WanLike(nnx.Rngs(2))


@pytest.fixture(scope="module")
def small_wan(wan):
    return qdit.quantize_nnx(wan, recipe_of(BLOCKS, act=A8))


def call_of_wan(model):
    time = 0.1 * jax.random.normal(jax.random.key(3), (2, 6, D))
    return nnx.jit(lambda m, *args: m(*args))(model, inputs(1), time, inputs(2))


def test_scanned_and_rematerialized_blocks(wan, small_wan):
    only_weights = qdit.quantize_nnx(wan, recipe_of(BLOCKS))
    expected = with_rounded_kernels(wan)
    expected.proj_out = wan.proj_out
    np.testing.assert_allclose(call_of_wan(only_weights), call_of_wan(expected), atol=3e-4)
    kernel = small_wan.blocks.attn1.query.weight.tree()
    assert kernel.codes.shape[0] == 3
    assert kernel.shape == (D, D)
    assert np.isfinite(np.asarray(call_of_wan(small_wan))).all()


def test_split_merge_and_filters(small_wan):
    graph, params, rest = nnx.split(small_wan, nnx.Param, ...)
    assert not jax.tree.leaves(rest)
    merged = nnx.merge(graph, params, rest)
    np.testing.assert_array_equal(call_of_wan(merged), call_of_wan(small_wan))


def test_a_checkpoint_comes_back(small_wan, tmp_path):
    recipe = recipe_of(BLOCKS, act=A8)
    _, state = nnx.split(small_wan)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "saved", nnx.to_pure_dict(state))
    empty = nnx.eval_shape(lambda: qdit.quantize_nnx(WanLike(nnx.Rngs(0)), recipe))
    graph, abstract = nnx.split(empty)
    with ocp.StandardCheckpointer() as saver:
        found = saver.restore(tmp_path / "saved", nnx.to_pure_dict(abstract))
    nnx.replace_by_pure_dict(abstract, found)
    back = nnx.merge(graph, abstract)
    np.testing.assert_array_equal(call_of_wan(back), call_of_wan(small_wan))


def test_what_is_left_is_named():
    model, reports = Odd(nnx.Rngs(0)), []
    with pytest.warns(UserWarning, match="1 of the 9 layers"):
        small = qdit.quantize_nnx(model, recipe_of(), report_fn=reports.append)
    assert reports[0].quantized == ("good",)
    assert {name: why.split(";")[0] for name, why in reports[0].left.items()} == {
        "twice": "it is a Twice",
        "conv": "it is a Conv",
        "own": "it has a dot_general of its own",
        "normed/layer_instance": "its kernel is normalized when it is used",
        "one": "its kernel is another module's too",
        "tied": "its kernel is another module's too",
        "table": "a table of embeddings is looked up, not multiplied by",
        "free": "a parameter 'free' of class Odd is not the kernel of a linear layer",
    }
    np.testing.assert_array_equal(small.twice(inputs()), model.twice(inputs()))
    with pytest.raises(ValueError, match=r"strict=True, but 1 of the 9 layers"):
        qdit.quantize_nnx(model, recipe_of(), strict=True)


def test_nothing_is_said_of_a_whole_network(zoo):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qdit.quantize_nnx(zoo, recipe_of(), strict=True)


def test_arguments_are_refused_by_sentence(zoo, quantized):
    with pytest.raises(TypeError, match="quantize_linen"):
        check_arguments(linen.Dense(3), recipe_of(), "simulated")
    with pytest.raises(TypeError, match=r"model is Block, not an nnx\.Module"):
        check_arguments(Block, recipe_of(), "simulated")
    with pytest.raises(TypeError, match="model is State"):
        check_arguments(nnx.state(zoo), recipe_of(), "simulated")
    with pytest.raises(ValueError, match="numerics='exact'"):
        qdit.quantize_nnx(zoo, recipe_of(), numerics="exact")
    with pytest.raises(ValueError, match="'nothing' matches no layer; the layers are"):
        qdit.quantize_nnx(zoo, recipe_of("nothing"))
    with pytest.raises(ValueError, match="quantized already"):
        qdit.quantize_nnx(quantized, recipe_of())
    with pytest.raises(ValueError, match="out_sharding"):
        quantized.lora(inputs(), out_sharding=jax.P())
    static = qdit.ActSpec(bits=8, mode="static")
    with pytest.raises(ValueError, match=r"blocks/attn1/[a-z_]+ is a stack of layers"):
        qdit.quantize_nnx(WanLike(nnx.Rngs(0)), recipe_of(BLOCKS, act=static))


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
import qdit_jax as qdit

mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
layer = nnx.Linear(32, 64, rngs=nnx.Rngs(0))
spec = qdit.LayerSpec(qdit.WeightSpec(bits=4, group_size=16), qdit.ActSpec(bits=8, group_size=16))
recipe = qdit.Recipe((qdit.Rule(".*", spec),), "test")
x = jax.random.normal(jax.random.key(0), (3, 32))
expected = nnx.jit(lambda m, x: m(x))(qdit.quantize_nnx(layer, recipe), x)
columns = jax.NamedSharding(mesh, jax.P(None, "model"))
layer.kernel[...] = jax.device_put(layer.kernel[...], columns)
small = qdit.quantize_nnx(layer, recipe)
codes = small.weight.tree().codes
assert len(codes.sharding.device_set) == 4, codes.sharding
assert not codes.sharding.is_fully_replicated, codes.sharding
np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(small, x), expected, atol=1e-5)
"""


def test_sharded_kernels_stay_sharded():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        env=os.environ | flags,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
