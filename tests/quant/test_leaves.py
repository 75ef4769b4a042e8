"""The table of leaves: one row makes a new entry of a layer computed, written and read."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from qdit_jax.checkpoint import encode_params
from qdit_jax.checkpoint.codec import decode_params, logical_shapes
from qdit_jax.models import Linear, seen_inputs
from qdit_jax.quant import (
    LEAVES,
    ActQuant,
    ActSpec,
    Leaf,
    QTensor,
    WeightSpec,
    dequantize,
    entry_name,
    fake_quantize,
    quantize_array,
    slots,
    with_leaf,
)


@partial(jax.tree_util.register_dataclass, data_fields=["scale"], meta_fields=["power"])
@dataclasses.dataclass(frozen=True)
class Scaled:
    """An input leaf: the input times a power of `scale`."""

    scale: jax.Array
    power: int

    def __call__(self, x):
        return x * self.scale**self.power


@partial(jax.tree_util.register_dataclass, data_fields=["down", "up"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Thin:
    """An output leaf: a product of rank r."""

    down: jax.Array
    up: jax.Array

    def __call__(self, x):
        return x @ self.down @ self.up

    def rest(self, x):
        return x


@pytest.fixture
def rows(monkeypatch):
    monkeypatch.setitem(LEAVES, "Scaled", Leaf(Scaled, "input", "scaled"))
    monkeypatch.setitem(LEAVES, "Thin", Leaf(Thin, "output", "thin"))


def layer(quantized):
    rng = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    kernel = array(16, 8)
    flat = {"kernel": quantize_array(kernel, WeightSpec(4, 8)) if quantized else kernel, "bias": array(8)}  # fmt: skip
    flat = {f"fc/{name}": leaf for name, leaf in flat.items()}
    flat = with_leaf(flat, "fc", "act_quant", ActQuant(ActSpec(8, 8)))
    flat = with_leaf(flat, "fc", "scaled", Scaled(jnp.linspace(1, 2, 16), 2))
    flat = with_leaf(flat, "fc", "thin", Thin(array(16, 2), array(2, 8)))
    return unflatten_dict(flat, sep="/")["fc"], array(3, 16)


@pytest.mark.parametrize("quantized", [False, True])
def test_linear_applies_every_leaf_in_its_place(rows, quantized):
    params, x = layer(quantized)
    found = Linear(8).apply({"params": params}, x)
    mapped = x * jnp.linspace(1, 2, 16) ** 2
    kernel = params["kernel"]
    kernel = dequantize(kernel) if quantized else kernel
    expected = fake_quantize(mapped, ActSpec(8, 8)) @ kernel + params["bias"]
    expected += mapped @ params["thin"].down @ params["thin"].up
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_rounding_sees_the_mapped_and_quantized_input(rows):
    params, x = layer(True)
    seen = []
    with seen_inputs(lambda path, x: seen.append(x), quantized=True):
        Linear(8).apply({"params": params}, x)
    mapped = x * jnp.linspace(1, 2, 16) ** 2
    np.testing.assert_array_equal(seen[0], fake_quantize(mapped, ActSpec(8, 8)))


def test_a_row_is_written_and_read_and_is_no_parameter_of_the_network(rows):
    params = {"fc": layer(True)[0]}
    arrays, manifest = encode_params(params)
    read = decode_params(arrays, manifest)
    assert jax.tree.structure(read) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, read, params)
    assert logical_shapes(manifest) == {"fc/kernel": (16, 8), "fc/bias": (8,)}


def test_a_type_that_the_table_lacks_is_refused_by_name(rows, monkeypatch):
    arrays, manifest = encode_params({"fc": layer(True)[0]})
    monkeypatch.delitem(LEAVES, "Thin")
    for read in (partial(decode_params, arrays), logical_shapes):
        with pytest.raises(ValueError, match=r"fc/thin is a Thin.* knows QTensor, ActQuant"):
            read(manifest)


def test_slots_have_one_name_each():
    assert slots("quantizer") == ["act_quant"]
    assert slots("input") == ["input_map", "rotation"]
    assert slots("output") == ["low_rank"]
    assert slots("parameter") == []
    assert entry_name("blocks_0/mlp/fc1", "act_quant") == "blocks_0/mlp/fc1/act_quant"
    assert entry_name("blocks_0/attn/q", "act_quant", operand=True) == "blocks_0/attn/q_quant"
    before = {"a": 1}
    assert flatten_dict(with_leaf(before, "fc", "act_quant", 2)) == {
        ("a",): 1,
        ("fc/act_quant",): 2,
    }
    assert before == {"a": 1}
    with pytest.raises(ValueError, match="slot='smooth' of fc is not known; use one of act_quant"):
        with_leaf({}, "fc", "smooth", None)


def test_operands_lack_slots_that_their_row_does_not_name(rows):
    with pytest.raises(ValueError, match="slot='scaled': blocks_0/attn/q is an operand"):
        entry_name("blocks_0/attn/q", "scaled", operand=True)


def test_every_row_is_named_for_its_type():
    assert {name: row.cls.__name__ for name, row in LEAVES.items()} == {n: n for n in LEAVES}
    assert LEAVES["QTensor"].cls is QTensor
