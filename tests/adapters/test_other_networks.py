"""Networks of many builds: quantized, each equals the network run with dequantized kernels."""

from __future__ import annotations

import functools
import pickle
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import freeze
from flax.traverse_util import flatten_dict, unflatten_dict

from qdit_jax.adapters import quantize_linen
from qdit_jax.quant import ActSpec, QTensor, WeightSpec, dequantize
from qdit_jax.recipes import LayerSpec, Recipe, Rule

WEIGHTS = Recipe((Rule(".*", LayerSpec(WeightSpec(8, 8), None)),), "weights")
INPUTS = Recipe((Rule(".*", LayerSpec(None, ActSpec(8, 8))),), "inputs")
TOKENS = jnp.arange(6).reshape(2, 3)
STACKED = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}


def normal(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


ROWS, SEQUENCE, IMAGE = normal(4, 16), normal(2, 4, 16), normal(2, 4, 4, 3)


class Gpt(nn.Module):
    """Blocks of a fused attention, and a head tied to the table by a nested `apply`."""

    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(11, 16, name="wte")
        x = table(tokens) + nn.Embed(3, 16, name="wpe")(jnp.arange(3))
        q, k, v = jnp.split(nn.Dense(48, name="c_attn")(nn.LayerNorm()(x)), 3, -1)
        x = x + nn.Dense(16, name="c_proj")(nn.dot_product_attention(q, k, v))
        x = x + nn.Dense(16, name="fc_out")(nn.gelu(nn.Dense(32, name="fc_in")(x)))
        kernel = table.variables["params"]["embedding"].T
        return nn.Dense(11, use_bias=False).apply({"params": {"kernel": kernel}}, x)


class Bert(nn.Module):
    """Layers made in `setup`, one of them used twice; the decoder is tied, its bias its own."""

    def setup(self):
        self.table = nn.Embed(11, 16)
        self.layers = [nn.Dense(16), nn.Dense(16)]
        self.shared = nn.Dense(16)
        self.decoder = nn.Dense(11)
        self.bias = self.param("bias", nn.initializers.normal(), (11,))

    def __call__(self, tokens):
        x = self.table(tokens)
        for layer in self.layers:
            x = x + self.shared(nn.tanh(layer(x)))
        tied = {"params": {"kernel": self.table.embedding.T, "bias": self.bias}}
        return self.decoder.clone(parent=None).apply(tied, x)


class ResNet(nn.Module):
    """Convolutions, batch statistics and dropout."""

    @nn.compact
    def __call__(self, x, train=False):
        y = nn.BatchNorm(use_running_average=not train)(nn.Conv(16, (3, 3), name="conv")(x))
        y = nn.ConvTranspose(16, (2, 2), name="up")(nn.relu(y)).mean((1, 2))
        return nn.Dense(5, name="head")(nn.Dropout(0.5, deterministic=not train)(y))


class Mixer(nn.Module):
    """Products along tokens and along channels, of `nn.Einsum` and of `nn.DenseGeneral`."""

    @nn.compact
    def __call__(self, x):
        x = x + nn.Einsum((4, 4), "btd,ts->bsd", use_bias=False, name="tokens")(x)
        return nn.DenseGeneral((2, 3), axis=-1, name="channels")(x)


class Vit(nn.Module):
    """Patches, a class token, positions, and flax's own attention."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (2, 2), strides=(2, 2), name="patches")(x).reshape(2, 4, 16)
        x = x + self.param("pos_embedding", nn.initializers.normal(), (1, 4, 16))
        return x + nn.MultiHeadDotProductAttention(4, name="attention")(x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(16, name="down")(nn.gelu(nn.Dense(24, name="up")(x))), None


class Deep(nn.Module):
    """A scanned, rematerialized stack: its carry fixes the dtype."""

    axis: int = 0

    @nn.compact
    def __call__(self, x):
        axes = {"variable_axes": {"params": self.axis}, "split_rngs": {"params": True}}
        x = nn.Dense(16, name="first")(x)
        return nn.scan(nn.remat(Block), length=3, **axes)(name="blocks")(x, None)[0]


class Experts(nn.Module):
    """A mixture of experts stacked by `nn.vmap`."""

    @nn.compact
    def __call__(self, x):
        gates = nn.softmax(nn.Dense(3, name="router")(x))
        experts = nn.vmap(Block, in_axes=None, axis_size=3, **STACKED)(name="experts")(x)[0]
        return jnp.einsum("te,etd->td", gates, experts)


class Normed(nn.Module):
    use_scale: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, name="first")(x)
        x = nn.WeightNorm(nn.Dense(16, name="weight"), use_scale=self.use_scale)(x)
        return nn.SpectralNorm(nn.Dense(16, name="spectral"))(x, update_stats=False)


class Doubled(nn.Dense):
    """Arithmetic of its own around that of `nn.Dense`."""

    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


class Own(nn.Dense):
    @nn.compact
    def __call__(self, inputs):
        return inputs @ self.param("kernel", self.kernel_init, (16, self.features))


class Lora(nn.Module):
    """A layer that shares its scope with the `nn.Dense` inside."""

    def setup(self):
        self.dense = nn.Dense(16)
        nn.share_scope(self, self.dense)

    @nn.compact
    def __call__(self, x):
        return self.dense(x) + x @ self.param("lora", nn.initializers.normal(), (16, 16))


class Lifted(nn.Module):
    """Layers that are transformed themselves, subclasses, and a shared scope."""

    @nn.compact
    def __call__(self, x):
        x = nn.remat(nn.Dense)(16, name="remat")(x)
        x = nn.vmap(nn.Dense, **STACKED)(16, name="vmap")(x)
        x = nn.jit(nn.Dense)(16, name="jit")(x)
        return Own(4, name="own")(Lora(name="lora")(Doubled(16, name="doubled")(x)))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.RNN(nn.GRUCell(16, name="gru"))(x)
        return nn.RNN(nn.OptimizedLSTMCell(8, name="lstm"))(x)


class Partitioned(nn.Module):
    """Boxed parameters, stacked ones too."""

    @nn.compact
    def __call__(self, x):
        boxed = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
        block = functools.partial(nn.Dense, kernel_init=boxed)
        meta = {"metadata_params": {nn.PARTITION_NAME: "layers"}}
        scan = nn.scan(lambda layer, x, _: (layer(x), None), length=2, **STACKED, **meta)
        return scan(block(16, name="stack"), block(16, name="first")(x), None)[0]


class Reading(nn.Module):
    """A kernel that serves in another product as well, and a network that returns no arrays only."""

    def setup(self):
        self.up, self.down = nn.Dense(16), nn.Dense(16)

    def __call__(self, x, names):
        h = self.down(self.up(x))
        return {"tied": h @ self.up.variables["params"]["kernel"].T, "names": names, "ok": True}


class Mapped(nn.Module):
    """Parameters cast, or transposed, on the way to their layer."""

    map_fn: Any

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, name="first")(x)
        change = functools.partial(jax.tree.map, self.map_fn)
        mapped = nn.map_variables(
            nn.Dense, "params", trans_in_fn=change, init=self.is_initializing()
        )
        return mapped(16, use_bias=False, name="mapped")(x)


def cast(array):
    return array.astype(jnp.bfloat16)


def transposed(array):
    return array.T


# Network: its arguments, how many layers are quantized, and a part of the reason for each left one.
EMBEDDING, CONV = "table of embeddings", "it is a Conv"
CHANGED = "does not reach its product alone and unchanged"
NETWORKS: dict[str, tuple[nn.Module, tuple[Any, ...], int, dict[str, str]]] = {
    "gpt": (Gpt(), (TOKENS,), 4, {"wte": EMBEDDING, "wpe": EMBEDDING}),
    "bert": (Bert(), (TOKENS,), 3, {"table": EMBEDDING}),
    "resnet": (ResNet(), (IMAGE, False), 1, {"conv": CONV, "up": "it is a ConvTranspose"}),
    "mixer": (Mixer(), (SEQUENCE,), 2, {}),
    "vit": (Vit(), (IMAGE,), 4, {"patches": CONV, "pos_embedding": "'pos_embedding' of class Vit"}),
    "deep": (Deep(), (ROWS,), 3, {}),
    "second_axis": (Deep(1), (ROWS,), 1, {"blocks/up": "leading axes", "blocks/down": "leading"}),
    "experts": (Experts(), (ROWS,), 3, {}),
    "normed": (Normed(), (ROWS,), 1, {"weight": CHANGED, "spectral": CHANGED}),
    "normed_unscaled": (Normed(False), (ROWS,), 1, {"weight": CHANGED, "spectral": CHANGED}),
    "lifted": (
        Lifted(),
        (ROWS,),
        5,
        {"own": "it is a Own", "lora/lora": "'lora' of class Lora is not the kernel"},
    ),
    "recurrent": (
        Recurrent(),
        (SEQUENCE,),
        6,
        {f"lstm/{i}{gate}": "a DenseParams" for i in "hi" for gate in "fgio"},
    ),
    "partitioned": (Partitioned(), (ROWS,), 2, {}),
    "reading": (Reading(), (ROWS, "names"), 1, {"up": "reads the kernel's 'T'"}),
    "mapped_cast": (Mapped(cast), (ROWS,), 1, {"mapped": CHANGED}),
    "mapped_transposed": (Mapped(transposed), (ROWS,), 1, {"mapped": CHANGED}),
}


def made(model, args):
    """Random variables of every collection, biases too."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *args))
    rng = np.random.default_rng(0)

    def drawn(path, leaf):
        values = 0.3 * rng.normal(size=leaf.shape)
        positive = path[0].key != "params"  # variances among them
        return jnp.asarray(np.abs(values) + 0.5 if positive else values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(drawn, shapes)


def outputs(apply_fn, variables, args):
    """The arrays that a call returns, compiled: eager calls take several times as long."""
    return jax.jit(lambda tree: arrays(apply_fn(tree, *args)))(variables)


def by_hand(quantized, original):
    """Variables in which every quantized kernel is an array again, of its own shape and dtype."""
    before = flatten_dict(nn.unbox(flax.core.unfreeze(original))["params"])
    flat = {
        path: jnp.reshape(dequantize(leaf), before[path].shape).astype(before[path].dtype)
        if isinstance(leaf, QTensor)
        else leaf
        for path, leaf in flatten_dict(quantized["params"]).items()
        if path in before
    }
    return {**quantized, "params": unflatten_dict(flat)}


def arrays(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]


def check_equal(found, wanted, tol=2e-5):
    assert len(arrays(found)) == len(arrays(wanted)) > 0
    for one, other in zip(arrays(found), arrays(wanted), strict=True):
        assert one.dtype == other.dtype
        one, other = (np.asarray(a, np.float32) for a in (one, other))
        np.testing.assert_allclose(one, other, atol=tol * np.abs(other).max(), rtol=0)


def quantized_by(model, variables, recipe, args, left=True, **options):
    """`quantize_linen`, which warns if and only if a layer is left."""
    if not left:
        return quantize_linen(model, variables, recipe, example_args=args, **options)
    with pytest.warns(UserWarning, match="layers that the recipe matches are quantized; left: "):
        return quantize_linen(model, variables, recipe, example_args=args, **options)


@pytest.mark.filterwarnings("error:quantize_linen")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_equals_itself_with_dequantized_kernels(name):
    model, args, count, left = NETWORKS[name]
    variables = made(model, args)
    apply_fn, quantized = quantized_by(model, variables, WEIGHTS, args, bool(left))
    assert len(apply_fn.report.quantized) == count
    assert set(apply_fn.report.left) == set(left)
    for path, reason in left.items():
        assert reason in apply_fn.report.left[path]
    kernels = [leaf for leaf in flatten_dict(quantized["params"]).values() if is_q(leaf)]
    assert len(kernels) == count
    wanted = outputs(model.apply, by_hand(quantized, variables), args)
    check_equal(outputs(apply_fn, quantized, args), wanted)


def is_q(leaf):
    return isinstance(leaf, QTensor)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("recipe", [WEIGHTS, INPUTS], ids=["weights", "inputs"])
def test_parameters_cast_after_init_keep_the_carry_of_a_scan(dtype, recipe):
    model, x = Deep(), ROWS.astype(dtype)
    variables = jax.tree.map(lambda a: a.astype(dtype), made(model, (x,)))
    apply_fn, quantized = quantize_linen(model, variables, recipe, example_args=(x,))
    (found,) = outputs(apply_fn, quantized, (x,))
    assert found.dtype == dtype
    check_equal(found, outputs(model.apply, by_hand(quantized, variables), (x,)), tol=0.03)


DTYPES = [
    # of the layer, of its parameters' declaration, of the parameters, of the input
    (None, "float32", "bfloat16", "bfloat16"),
    (None, "float32", "float16", "float16"),
    (None, "float32", "float16", "bfloat16"),
    (None, "float32", "bfloat16", "float32"),
    (None, "float32", "float32", "bfloat16"),
    (None, "bfloat16", "bfloat16", "bfloat16"),
    (None, "bfloat16", "float32", "bfloat16"),
    ("float32", "float32", "bfloat16", "bfloat16"),
    ("bfloat16", "float32", "float32", "float32"),
    (None, "float32", "bfloat16", "int32"),
]


@pytest.mark.parametrize(("dtype", "declared", "held", "given"), DTYPES)
def test_a_result_has_the_dtype_of_full_precision(dtype, declared, held, given):
    settings = {"dtype": dtype, "param_dtype": declared}
    x = (3 * ROWS).astype(given)
    for layer, recipe in (
        (nn.Dense(6, **settings), WEIGHTS),
        (nn.DenseGeneral((2, 3), use_bias=False, **settings), INPUTS),
    ):
        variables = jax.tree.map(lambda a: a.astype(held), made(layer, (x,)))
        apply_fn, quantized = quantize_linen(layer, variables, recipe, example_args=(x,))
        wanted = outputs(layer.apply, by_hand(quantized, variables), (x,))
        check_equal(outputs(apply_fn, quantized, (x,)), wanted, tol=0.03)


def test_doubles_stay_doubles():
    with jax.enable_x64(True):
        for held, given in (("float64", "float64"), ("float32", "float64"), ("float64", "float32")):
            layer, x = nn.Dense(6, param_dtype=held), ROWS.astype(given)
            variables = made(layer, (x,))
            apply_fn, quantized = quantize_linen(layer, variables, WEIGHTS)
            found = apply_fn(quantized, x)
            assert found.dtype == "float64"
            check_equal(found, layer.apply(by_hand(quantized, variables), x), tol=1e-5)


def test_an_einsum_keeps_its_preferred_element_type():
    layer = nn.Einsum((16, 6), "td,df->tf", preferred_element_type=jnp.float32)
    x = ROWS.astype(jnp.bfloat16)
    variables = jax.tree.map(lambda a: a.astype(jnp.bfloat16), layer.init(jax.random.key(0), x))
    apply_fn, quantized = quantize_linen(layer, variables, WEIGHTS, example_args=(x,))
    found = apply_fn(quantized, x)
    assert found.dtype == "float32"
    check_equal(found, layer.apply(by_hand(quantized, variables), x), tol=0.01)


def test_saved_params_keep_the_dtype():
    layer, x = nn.Dense(6), ROWS.astype(jnp.bfloat16)
    variables = jax.tree.map(lambda a: a.astype(jnp.bfloat16), layer.init(jax.random.key(0), x))
    apply_fn, quantized = quantize_linen(layer, variables, WEIGHTS)
    loaded = pickle.loads(pickle.dumps(quantized))
    assert apply_fn(loaded, x).dtype == "bfloat16"
    del loaded["params"]["kernel_origin"]
    with pytest.raises(ValueError, match=r"Dense: its quantized kernel came without .*kernel_or"):
        apply_fn(loaded, x)


@pytest.mark.filterwarnings("ignore:quantize_linen")
def test_other_collections_pass_through():
    model = ResNet()
    variables = made(model, (IMAGE,))
    call = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(1)}}
    apply_fn, quantized = quantize_linen(
        model, variables, WEIGHTS, example_args=(IMAGE,), example_kwargs=call
    )
    assert set(quantized) == {"params", "batch_stats"}
    check_equal(
        apply_fn(quantized, IMAGE, **call),
        model.apply(by_hand(quantized, variables), IMAGE, **call),
    )
    rest = Recipe((*WEIGHTS.rules, Rule("conv|up", LayerSpec())), "rest")
    _, params = quantize_linen(model, variables["params"], rest)
    assert isinstance(params["head"]["kernel"], QTensor)
    with pytest.raises(ValueError, match=r"ResNet cannot be called .*pass|needs all variables"):
        quantize_linen(model, variables["params"], rest, example_args=(IMAGE,))


def test_a_mutable_params_collection_comes_back_quantized():
    model = Block()
    variables = made(model, (ROWS,))
    apply_fn, quantized = quantize_linen(
        model, variables, WEIGHTS, example_args=(ROWS,), example_kwargs={"mutable": True}
    )
    _, updated = apply_fn(quantized, ROWS, mutable=True)
    assert isinstance(updated["params"]["up"]["kernel"], QTensor)


@pytest.mark.filterwarnings("ignore:quantize_linen")
def test_strict_refuses_what_would_be_left():
    model, args, _, _ = NETWORKS["vit"]
    variables = made(model, args)
    with pytest.raises(ValueError, match=r"strict=True, but 4 of the 6 .*patches: it is a Conv"):
        quantize_linen(model, variables, WEIGHTS, example_args=args, strict=True)
    rest = Recipe((*WEIGHTS.rules, Rule("patches|pos_embedding", LayerSpec())), "rest")
    apply_fn, _ = quantize_linen(model, variables, rest, example_args=args, strict=True)
    assert not apply_fn.report.left
    assert str(apply_fn.report).startswith("4 of the 4 layers")
    for pattern, reason in (
        ("patches", "patches cannot be quantized: it is a Conv"),
        ("x", "no l"),
    ):
        named = Recipe((Rule(pattern, WEIGHTS.rules[0].spec),), "named")
        with pytest.raises(ValueError, match=reason):
            quantize_linen(model, variables, named, example_args=args)


def test_a_layer_that_the_call_does_not_reach_is_told():
    model = Reading()
    variables = made(model, (ROWS, "names"))
    variables["params"]["unused"] = {"kernel": jnp.ones((4, 4))}
    variables["params"]["codes"] = {"kernel": jnp.ones((4, 4), jnp.int8)}
    apply_fn, _ = quantized_by(model, variables, WEIGHTS, (ROWS, "names"))
    assert "does not reach it" in apply_fn.report.left["unused"]
    assert apply_fn.report.left["codes"] == "its kernel is int8, not floating point"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("normed", "WeightNorm_0 is a WeightNorm, which cannot be computed"),
        ("normed_unscaled", r"wn|weight: its quantized kernel was changed on the way"),
        ("mapped_cast", "mapped: its quantized kernel was changed on the way"),
        ("mapped_transposed", "mapped: its quantized kernel was changed on the way"),
        ("recurrent", "is a DenseParams; only nn.Dense.*pass example_args"),
    ],
)
def test_without_an_example_the_first_call_refuses(name, message):
    model, args, _, _ = NETWORKS[name]
    apply_fn, quantized = quantize_linen(model, made(model, args), WEIGHTS)
    with pytest.raises(ValueError, match=message):
        apply_fn(quantized, *args)


@pytest.mark.filterwarnings("ignore:quantize_linen")
@pytest.mark.parametrize("name", ["resnet", "vit", "deep", "lifted", "second_axis"])
def test_without_an_example_a_kernel_of_many_axes_is_refused_at_once(name):
    model, args, _, _ = NETWORKS[name]
    with pytest.raises(ValueError, match=r"\(it may be a convolution's\); pass example_args"):
        quantize_linen(model, made(model, args), WEIGHTS)


def test_a_turned_square_kernel_is_refused_without_an_example():
    layer = nn.Einsum((16, 16), "...d,fd->...f")
    variables = made(layer, (ROWS,))
    apply_fn, guessed = quantize_linen(layer, variables, WEIGHTS)
    with pytest.raises(ValueError, match=r"with input axes \(0,\), but .* with input axes \(1,\)"):
        apply_fn(guessed, ROWS)
    apply_fn, traced = quantize_linen(layer, variables, WEIGHTS, example_args=(ROWS,))
    params = {"kernel": dequantize(traced["params"]["kernel"]).T, "bias": traced["params"]["bias"]}
    check_equal(apply_fn(traced, ROWS), layer.apply({"params": params}, ROWS))


def test_a_stack_as_long_as_its_inputs_is_not_taken_for_features():
    params = {"kernel": jnp.ones((4, 4, 6)), "bias": jnp.ones((4, 6))}
    with pytest.raises(ValueError, match="do not tell inputs from outputs"):
        quantize_linen(nn.Dense(6), params, WEIGHTS)


def test_odd_leaves_and_frozen_trees_come_back():
    model = Block()
    params = made(model, (ROWS,))["params"]
    params |= {"none": None, "empty": {}, "float0": np.zeros((), jax.dtypes.float0)}
    apply_fn, quantized = quantize_linen(model, freeze(params), WEIGHTS, example_args=(ROWS,))
    assert quantized["none"] is None
    assert quantized["empty"] == {}
    assert quantized["float0"].dtype == jax.dtypes.float0
    wanted = model.apply(by_hand({"params": quantized}, {"params": params}), ROWS)
    check_equal(apply_fn({"params": quantized}, ROWS), wanted)


def test_a_network_may_be_quantized_in_parts():
    model = Block()
    variables = made(model, (ROWS,))
    first, second = (Recipe((Rule(n, WEIGHTS.rules[0].spec),), n) for n in ("up", "down"))
    _, half = quantize_linen(model, variables, first, example_args=(ROWS,))
    apply_fn, both = quantize_linen(model, half, second, example_args=(ROWS,))
    check_equal(apply_fn(both, ROWS), model.apply(by_hand(both, variables), ROWS))


def test_abstract_examples_and_methods_are_taken():
    model = Block()
    variables = made(model, (ROWS,))
    shape = jax.ShapeDtypeStruct(ROWS.shape, ROWS.dtype)
    apply_fn, quantized = quantize_linen(
        model, variables, WEIGHTS, example_kwargs={"x": shape, "method": "__call__"}
    )
    check_equal(apply_fn(quantized, x=ROWS), model.apply(by_hand(quantized, variables), ROWS))


def test_static_inputs_of_a_stack_are_refused():
    static = LayerSpec(None, ActSpec(8, 8, mode="static"))
    model = Deep()
    recipe = Recipe((Rule("blocks/up", static),), "static")
    with pytest.raises(ValueError, match=r"blocks/up is a stack of layers.*mode='dynamic'"):
        quantize_linen(model, made(model, (ROWS,)), recipe, example_args=(ROWS,))


def test_a_specs_fault_names_the_layer():
    recipe = Recipe((Rule(".*", LayerSpec(WeightSpec(8, 8, channel_group=5), None)),), "blocks")
    with pytest.raises(ValueError, match="down: channel_group=5 does not divide the 16 output"):
        quantize_linen(Block(), made(Block(), (ROWS,)), recipe)


def test_networks_of_nnx_and_other_kinds_are_refused_by_sentence():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

    net = Net()
    graph, state = nnx.split(net)
    for model, params in (
        (net, {}),
        (graph, state),
        (Net, {}),
        (nn.Dense(4), state),
        (nn.Dense(4), {"params": {"kernel": net.linear.kernel}}),
    ):
        with pytest.raises(TypeError, match=r"an nnx\..*which qdit_jax.quantize_nnx takes"):
            quantize_linen(model, params, WEIGHTS)
    for model, params, message in (
        (nn.Dense, {}, "is not a flax.linen module"),
        (nn.Dense(4), None, "params is a NoneType; pass the dict that model.init"),
    ):
        with pytest.raises(TypeError, match=message):
            quantize_linen(model, params, WEIGHTS)
    with pytest.raises(TypeError, match=r"example_args is a .*; pass a tuple, such as \(x,\)"):
        quantize_linen(nn.Dense(4), {"kernel": jnp.ones((4, 4))}, WEIGHTS, example_args=ROWS)
