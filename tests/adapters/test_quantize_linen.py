"""Somebody else's linen networks: quantized, they equal their dequantized selves."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from qdit_jax.adapters import quantize_linen
from qdit_jax.adapters.linen_layout import of_einsum
from qdit_jax.quant import ActSpec, QTensor, WeightSpec, dequantize, fake_quantize
from qdit_jax.recipes import LayerSpec, OverTime, Recipe, Rule

WEIGHTS = Recipe((Rule(".*", LayerSpec(WeightSpec(4, 16), None)),), "weights")
BOTH = Recipe((Rule(".*", LayerSpec(WeightSpec(4, 16), ActSpec(8, 16))),), "both")


def initialized(model, *args, seed=0, **kwargs):
    """Random params (biases too) of the shapes that `model` makes."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *args, **kwargs))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype) * 0.3, shapes)


def normal(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def dequantized(quantized, params):
    """The params in full precision, every kernel on its grid; kernels `[*in, *out]` only."""
    original = flatten_dict(params)
    flat = {
        path: jnp.reshape(dequantize(leaf), original[path].shape)
        if isinstance(leaf, QTensor)
        else leaf
        for path, leaf in flatten_dict(quantized).items()
        if path[-1] not in ("act_quant", "kernel_origin")
    }
    return unflatten_dict(flat)


def close(found, wanted):
    scale = float(jnp.abs(wanted).max())
    np.testing.assert_allclose(found, wanted, atol=2e-5 * scale, rtol=0)


class Encoder(nn.Module):
    """A transformer encoder of flax's own attention."""

    @nn.compact
    def __call__(self, tokens, deterministic=True):
        x = nn.Embed(11, 32, name="embed")(tokens)
        for i in range(2):
            h = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(4, name=f"attention_{i}")(
                h, deterministic=deterministic
            )
            h = nn.Dense(48, name=f"up_{i}")(nn.LayerNorm()(x))
            x = x + nn.Dense(32, name=f"down_{i}")(nn.gelu(h))
        return nn.DenseGeneral((3, 2), axis=-1, name="head")(x)


TOKENS = jnp.arange(10).reshape(2, 5)


def test_an_encoder_equals_its_dequantized_self():
    model = Encoder()
    params = initialized(model, TOKENS)
    apply_fn, quantized = quantize_linen(model, params, WEIGHTS)
    attention = quantized["attention_0"]
    assert attention["query"]["kernel"].shape == (32, 32)
    assert attention["out"]["kernel"].shape == (32, 32)
    assert isinstance(quantized["embed"]["embedding"], jax.Array)
    wanted = model.apply({"params": dequantized(quantized, params)}, TOKENS)
    close(apply_fn({"params": quantized}, TOKENS), wanted)
    traced = quantize_linen(
        model, params, WEIGHTS, example_args=(TOKENS,), example_kwargs={"deterministic": True}
    )[1]
    jax.tree.map(np.testing.assert_array_equal, traced, quantized)


class Slashed(nn.Module):
    """Names with a slash, which is also what joins the names of a path."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("a/b", nn.initializers.ones, (32,))
        return nn.Dense(16, name="c/d")(x * scale)


def test_names_may_contain_a_slash_and_empty_entries_stay():
    model, x = Slashed(), normal(2, 32)
    params = initialized(model, x) | {"empty": {}}
    apply_fn, quantized = quantize_linen(model, params, BOTH)
    assert set(quantized) == {"a/b", "c/d", "empty"}
    assert set(quantized["c/d"]) == {"kernel", "bias", "act_quant", "kernel_origin"}
    assert quantized["empty"] == {}
    assert apply_fn({"params": quantized}, x).shape == (2, 16)


def test_both_numerics_agree_on_every_kind_of_layer():
    model = Encoder()
    params = initialized(model, TOKENS)
    simulated, quantized = quantize_linen(model, params, BOTH)
    integer, _ = quantize_linen(model, params, BOTH, numerics="integer")
    # A code may flip where both numerics round differently: compare one layer's worth tightly.
    found, wanted = (f({"params": quantized}, TOKENS) for f in (integer, simulated))
    error = float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted))
    assert error < 2e-3
    plain = model.apply({"params": params}, TOKENS)
    assert float(jnp.linalg.norm(wanted - plain)) > 1e-3 * float(jnp.linalg.norm(plain))


class Case(nn.Module):
    """One layer under a name."""

    layer: nn.Module

    def __call__(self, x):
        return self.layer(x)


GENERAL = {
    "dense": (nn.Dense(6), (2, 3, 32)),
    "no_bias": (nn.Dense(6, use_bias=False), (2, 32)),
    "vector": (nn.Dense(6), (32,)),
    "many_features": (nn.DenseGeneral((4, 2, 3)), (2, 5, 32)),
    "many_axes": (nn.DenseGeneral(6, axis=(-2, -1)), (2, 5, 4, 8)),
    "axes_apart": (nn.DenseGeneral((2, 3), axis=(1, 3)), (2, 4, 5, 8)),
    "axes_turned": (nn.DenseGeneral(6, axis=(-1, 1)), (2, 4, 5, 8)),
    "batched": (nn.DenseGeneral((2, 3), axis=-1, batch_dims=(0,)), (2, 5, 32)),
    "einsum": (nn.Einsum((32, 2, 3), "btd,dhk->bthk"), (2, 5, 32)),
    "einsum_out": (nn.Einsum((4, 8, 6), "bthk,hkd->btd"), (2, 5, 4, 8)),
    "einsum_turned": (nn.Einsum((6, 32), "...d,fd->f..."), (2, 5, 32)),
    "einsum_qkv": (nn.Einsum((3, 2, 32, 8), "btd,sndh->sbtnh"), (2, 5, 32)),
    "einsum_experts": (nn.Einsum((4, 32, 6), "etd,edf->tef"), (4, 5, 32)),
}


@pytest.mark.parametrize("name", GENERAL)
def test_a_layer_with_a_quantized_input_equals_its_definition(name):
    layer, shape = GENERAL[name]
    model, x = Case(layer), normal(*shape)
    params = initialized(model, x)
    recipe = Recipe((Rule("layer", LayerSpec(WeightSpec(8, 0), None)),))
    act = ActSpec(8, 0)
    both = Recipe((Rule("layer", LayerSpec(WeightSpec(8, 0), act)),))
    inputs_only = Recipe((Rule("layer", LayerSpec(None, act)),))
    plain = model.apply({"params": params}, x)
    cases = [(both, "simulated"), (both, "integer")]
    if name in ("axes_turned", "batched", "einsum_qkv"):
        cases += [(recipe, "simulated"), (inputs_only, "simulated")]
    for chosen, numerics in cases:
        apply_fn, quantized = quantize_linen(
            model, params, chosen, example_args=(x,), numerics=numerics
        )
        found = jax.jit(apply_fn)({"params": quantized}, x)
        assert found.shape == plain.shape
        assert found.dtype == plain.dtype
        assert float(jnp.linalg.norm(found - plain)) < 0.02 * float(jnp.linalg.norm(plain))
        assert not (found == plain).all()


def test_the_groups_of_an_input_run_along_its_summed_axes():
    model, x = Case(nn.Einsum((4, 8, 6), "bthk,hkd->btd", use_bias=False)), normal(2, 5, 4, 8)
    params = initialized(model, x)
    apply_fn, quantized = quantize_linen(model, params, BOTH, example_args=(x,))
    kernel = quantized["layer"]["kernel"]
    wanted = fake_quantize(x.reshape(2, 5, 32), ActSpec(8, 16)) @ dequantize(kernel)
    close(apply_fn({"params": quantized}, x), wanted)


def test_a_whole_network_may_be_one_layer():
    model, x = nn.Dense(6), normal(2, 32)
    params = initialized(model, x)
    apply_fn, quantized = quantize_linen(model, params, BOTH)
    assert isinstance(quantized["kernel"], QTensor)
    assert apply_fn({"params": quantized}, x).shape == (2, 6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_output_keeps_its_dtype(dtype):
    model, x = Case(nn.Dense(6, dtype=dtype)), normal(2, 32)
    params = initialized(model, x)
    apply_fn, quantized = quantize_linen(model, params, BOTH)
    assert apply_fn({"params": quantized}, x).dtype == dtype


class Stacked(nn.Module):
    """Layers stacked by `nn.scan`, rematerialized and compiled on their own."""

    @nn.compact
    def __call__(self, x):
        block = nn.remat(nn.jit(Residual))
        scan = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scan(name="blocks")(x, None)[0]


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(x.shape[-1], name="linear")(jnp.tanh(x)), None


def test_stacked_layers_are_quantized_one_by_one():
    model, x = Stacked(), normal(4, 32)
    params = initialized(model, x)
    model.apply({"params": params}, x)  # compiled before: must not be taken for the quantized one
    apply_fn, quantized = quantize_linen(model, params, BOTH, example_args=(x,))
    kernel = quantized["blocks"]["linear"]["kernel"]
    assert kernel.codes.shape == (3, 32, 16)
    weights = dequantize(kernel)
    wanted = x
    for i in range(3):
        hidden = fake_quantize(jnp.tanh(wanted), ActSpec(8, 16))
        wanted = wanted + hidden @ weights[i] + params["blocks"]["linear"]["bias"][i]
    close(apply_fn({"params": quantized}, x), wanted)
    with pytest.raises(ValueError, match="pass example_args"):
        quantize_linen(model, params, BOTH)


def test_one_compilation_and_a_loop():
    model = Encoder()
    params = initialized(model, TOKENS)
    apply_fn, quantized = quantize_linen(model, params, BOTH)
    traces = []

    def counted(tree, tokens):
        traces.append(1)
        return apply_fn({"params": tree}, tokens)

    compiled = jax.jit(counted)
    first = compiled(quantized, TOKENS)
    compiled(jax.tree.map(lambda a: a + 0, quantized), TOKENS + 0)
    assert len(traces) == 1

    def step(total, _):
        return total + apply_fn({"params": quantized}, TOKENS), None

    total, _ = jax.jit(lambda: jax.lax.scan(step, jnp.zeros_like(first), None, length=3))()
    close(total, 3 * first)


def test_an_apply_compiled_before_does_not_answer_for_the_quantized_one():
    model, x = Case(nn.Dense(6)), normal(2, 32)
    params = initialized(model, x)
    plain = jax.jit(model.apply)
    before = plain({"params": params}, x)
    apply_fn, quantized = quantize_linen(model, params, BOTH)
    assert not (jax.jit(apply_fn)({"params": quantized}, x) == before).all()
    np.testing.assert_array_equal(plain({"params": params}, x), before)
    with pytest.raises(Exception, match="shape"):  # flax's own: never silently unquantized
        plain({"params": quantized}, x)


class Convolution(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), name="conv")(x)
        return nn.Dense(4, name="dense")(x)


def test_what_cannot_be_quantized_is_named():
    model, x = Convolution(), normal(1, 4, 4, 3)
    params = initialized(model, x)
    with pytest.warns(
        UserWarning, match="1 of the 2 layers .* left: conv: it is a Conv; only nn.D"
    ):
        _, traced = quantize_linen(model, params, BOTH, example_args=(x,))
    assert isinstance(traced["dense"]["kernel"], QTensor)
    assert isinstance(traced["conv"]["kernel"], jax.Array)
    with pytest.raises(ValueError, match=r"conv: its kernel \(3, 3, 3, 8\) .* pass example_args"):
        quantize_linen(model, params, BOTH)
    wrong = Recipe((Rule("block.*", LayerSpec(WeightSpec(), None)),), "wrong")
    with pytest.raises(ValueError, match=r"'block\.\*' matches no layer; the layers are dense"):
        quantize_linen(model, params, wrong, example_args=(x,))
    scheduled = dataclasses.replace(BOTH, over_time=OverTime((900.0,), (16,)))
    with pytest.raises(ValueError, match="changes bits over time, which needs a network called by"):
        quantize_linen(model, params, scheduled, example_args=(x,))
    with pytest.raises(ValueError, match="quantized already"):
        quantize_linen(model, traced, Recipe((Rule("dense", BOTH.rules[0].spec),)))
    with pytest.raises(ValueError, match="numerics='fast' is not known"):
        quantize_linen(model, params, BOTH, numerics="fast")


def test_an_equation_that_is_no_product_of_matrices_names_the_layer():
    model, x = Case(nn.Einsum((4, 32), "bhd,hd->bhd")), normal(2, 4, 32)
    params = initialized(model, x)
    with pytest.raises(ValueError, match="layer cannot be quantized: the equation 'bhd,hd->bhd'"):
        quantize_linen(model, params, BOTH, example_args=(x,))


@pytest.mark.parametrize(
    ("equation", "message"),
    [
        ("bd,...df->bf", "ellipsis in the kernel"),
        ("bdd,df->bf", "repeats an axis"),
        ("bcd,df->bf", "sums over an axis of one operand"),
        ("bd,dfg->bf", "sums over an axis of one operand"),
        ("bd,d->b", "is not a product of matrices"),
    ],
)
def test_equations_outside_the_product_are_refused(equation, message):
    with pytest.raises(ValueError, match=message):
        of_einsum(equation, len(equation.split(",")[0]), (4,) * 8)


def test_a_dot_general_of_its_own_is_refused():
    model, x = Case(nn.Dense(6, dot_general=jax.lax.dot_general)), normal(2, 32)
    params = initialized(model, x)
    with pytest.raises(ValueError, match="dot_general of its own"):
        quantize_linen(model, params, BOTH, example_args=(x,))
