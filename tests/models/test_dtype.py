"""Products in bfloat16: which they are, what stays in float32, and that the verbs say so."""

import collections
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_models import output, random_params, tiny_checkpoint

import qdit_jax as qdit
from qdit_jax.calibration import collect_items
from qdit_jax.checkpoint import digest, with_dtype
from qdit_jax.checkpoint.fingerprint import feed
from qdit_jax.models import FAMILIES, NetworkModule, build_model, config_of
from qdit_jax.models.linear import Layers
from qdit_jax.models.sana import LinearAttention
from qdit_jax.quant import ActQuant, QTensor
from qdit_jax.sampling import running_params

DENOISERS = [
    pytest.param(row, config, id=f"{row.name}-{i}", marks=[pytest.mark.slow] * (i > 0))
    for row in FAMILIES.values()
    for i, config in enumerate(row.examples)
    if row.is_diffusion
]


# Families with products of their own that stay wide: the sums of a linear attention, as published.
SOME_WIDE = ("sana",)


class NoFields(NetworkModule):
    """A network without fields of its own."""


def dots(jaxpr, found=None):
    """Returns how often each pair of operand dtypes is multiplied, inner programs included."""
    found = collections.Counter() if found is None else found
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found[tuple(v.aval.dtype.name for v in equation.invars)] += 1
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                dots(inner, found)
    return found


def inputs(model, batch=2):
    x = jax.random.normal(jax.random.key(1), (batch, *model.sample_shape()))
    condition = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), model.example_condition(batch))
    time = jnp.full((batch,), 0.4) if model.prediction == "velocity" else jnp.array([700.0, 20.0])
    return x, time, condition


def program(model, params):
    """Returns the jaxpr of a call."""
    given = inputs(model)
    return jax.make_jaxpr(lambda p: model.apply({"params": p}, *given))(params).jaxpr


@pytest.mark.parametrize(("row", "config"), DENOISERS)
def test_every_product_of_full_precision_is_bfloat16_and_the_rest_is_not(row, config):
    model = build_model(row.name, config)
    params = random_params(model)
    narrow = model.clone(dtype="bfloat16")
    assert config_of(narrow) == config_of(model)
    given = inputs(model)
    traced = [output.trace(m, params, *given) for m in (model, narrow)]
    plain, found = (dots(one.jaxpr.jaxpr) for one in traced)
    assert set(plain) == {("float32", "float32")}
    wide = {("float32", "float32")} if row.name in SOME_WIDE else set()
    assert set(found) == {("bfloat16", "bfloat16")} | wide
    assert sum(found.values()) == sum(plain.values())
    exact, rounded = (one.lower().compile()(params, *given) for one in traced)
    assert rounded.dtype == jnp.float32
    error = np.abs(rounded - exact).max() / np.abs(exact).max()
    assert 1e-6 < error < 0.05


def test_linear_attention_jumps_where_no_channel_of_a_query_is_positive():
    layer = LinearAttention(1, False, Layers())
    eye = np.eye(2, dtype=np.float32)
    params = {"qkv": {"kernel": np.hstack([eye] * 3), "bias": np.zeros(6, np.float32)}}
    params["proj"] = {"kernel": eye, "bias": np.zeros(2, np.float32)}
    for least, expected in ((1e-6, [1.0, 2.0]), (0.0, [0.0, 0.0]), (-1e-6, [0.0, 0.0])):
        x = jnp.asarray([[[1.0, 2.0], [least, -1.0]]])
        found = layer.apply({"params": params}, x)
        np.testing.assert_allclose(found[0, 1], expected, atol=1e-5)


def test_a_sana_with_heads_as_wide_as_published_is_close_in_bfloat16():
    config = {**FAMILIES["sana"].examples[0], "hidden_size": 64, "num_heads": 2, "depth": 1}
    model = build_model("sana", config)
    x, time, condition = inputs(model)
    text = jax.random.normal(jax.random.key(2), condition["text"].shape)
    for seed in range(5):
        params = random_params(model, seed)
        exact, rounded = (
            output(m, params, x, time, {**condition, "text": text})
            for m in (model, model.clone(dtype="bfloat16"))
        )
        assert np.abs(rounded - exact).max() < 0.03 * np.abs(exact).max()


def test_quantized_inputs_are_multiplied_as_ever():
    full = tiny_checkpoint()
    small = qdit.quantize(full, "rtn", qdit.Recipe.preset("w4a8", full, group_size=16))
    narrow = full.model.clone(dtype="bfloat16")
    found = dots(program(narrow, small.params))
    blocks = 4 * full.model.depth  # qkv, proj, fc1 and fc2
    assert found["float32", "float32"]
    assert found["float32", "float32"] % blocks == 0  # one for each platform's implementation
    assert set(found) == {("float32", "float32"), ("bfloat16", "bfloat16")}
    weights = qdit.quantize(full, "rtn", qdit.Recipe.preset("w4a16", full, group_size=16))
    found = dots(program(narrow, weights.params))
    assert set(found) == {("bfloat16", "bfloat16")}


def test_quantizers_see_float32():
    full = tiny_checkpoint()
    small = qdit.quantize(full, "rtn", qdit.Recipe.preset("w4a8", full, group_size=16))
    seen = []

    def quantizer(self, x, original=ActQuant.__call__):
        seen.append(x.dtype)
        return original(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ActQuant, "__call__", quantizer)
        jax.clear_caches()
        program(full.model.clone(dtype="bfloat16"), small.params)
    jax.clear_caches()
    assert seen
    assert set(seen) == {jnp.dtype("float32")}


def test_what_a_network_cannot_compute_in_is_refused():
    full = tiny_checkpoint()
    with pytest.raises(
        ValueError, match="dtype='float16' is not supported; use one of float32, bf"
    ):
        with_dtype(full, "float16")
    with pytest.raises(ValueError, match="dtype='int8' is not supported"):
        full.model.clone(dtype="int8")


def test_statistics_and_inputs_of_a_narrow_network_are_float32_and_close():
    full = tiny_checkpoint()
    narrow = with_dtype(full, "bfloat16")
    sampler = qdit.ddim(3)
    stats = [
        qdit.calibrate(c, jax.random.key(0), 4, sampler=sampler, hessians=".*fc2", num_tokens=2)
        for c in (full, narrow)
    ]
    for path in stats[0].low:
        exact, rounded = (np.asarray(s.high[path]) for s in stats)
        assert rounded.dtype == np.float32
        np.testing.assert_allclose(rounded, exact, atol=0.1 * np.abs(exact).max() + 1e-3)
    items = collect_items(narrow, jax.random.key(0), 4, sampler=sampler)
    assert items.x.dtype == np.float32


def test_a_checkpoint_is_the_same_however_it_runs(tmp_path):
    full = tiny_checkpoint()
    narrow = with_dtype(full, "bfloat16")
    assert digest(full.model) != digest(narrow.model)
    qdit.save(tmp_path / "out", narrow)
    assert qdit.load(tmp_path / "out").model == full.model
    items = collect_items(full, jax.random.key(0), 4, sampler=qdit.ddim(3))
    data = qdit.CalibrationData(items=items, dtype="bfloat16")
    small = qdit.quantize(full, "gptq", qdit.Recipe.preset("w4a8", full, group_size=16), data=data)
    assert small.model == full.model
    assert small.metadata["quantization"]["data"]["dtype"] == "bfloat16"


def test_a_digest_of_float32_is_that_of_networks_before_the_choice():
    model = NoFields()
    kind = type(model)
    expected = hashlib.sha256()
    expected.update(f"{kind.__module__}.{kind.__qualname__}:".encode())
    feed(expected.update, {"numerics": "simulated", "implementation": None})
    assert digest(model) == expected.hexdigest()[:16]
    assert digest(model.clone(dtype="bfloat16")) != digest(model)


def test_kernels_and_biases_are_cast_once_before_the_loop_and_nothing_changes():
    full = with_dtype(tiny_checkpoint(), "bfloat16")
    small = qdit.quantize(full, "rtn", qdit.Recipe.preset("w4a8", full, group_size=16))
    for params in (full.params, small.params):
        ran = running_params(full.model, params)
        given = inputs(full.model)
        np.testing.assert_array_equal(*(output(full.model, p, *given) for p in (ran, params)))
        flat = flatten_dict(ran, sep="/")
        assert flat["blocks_0/adaLN_modulation/kernel"].dtype == jnp.bfloat16
        assert flat["blocks_0/adaLN_modulation/bias"].dtype == jnp.float32  # its output is
        assert flat["y_embedder/embedding_table"].dtype == jnp.float32
        is_quantized = isinstance(flat["blocks_0/mlp/fc1/kernel"], QTensor)
        assert is_quantized == (params is small.params)
        # A kernel adds the bias of a quantized layer in float32.
        bias_dtype = jnp.float32 if is_quantized else jnp.bfloat16
        assert flat["blocks_0/mlp/fc1/bias"].dtype == bias_dtype
    plain = tiny_checkpoint()
    assert running_params(plain.model, plain.params) is plain.params
