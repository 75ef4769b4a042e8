"""A network says once how its layers compute."""

import jax
import pytest

from qdit_jax import Recipe, quantize_params
from qdit_jax.models import DiT, Layers, config_of, example_inputs, tapped

MODEL = DiT(input_size=8, hidden_size=24, depth=1, num_heads=2, num_classes=3)


def settings_of_layers(model):
    """Returns `{path: (numerics, implementation)}` of every linear layer of a call."""
    found = {}

    def look(path, layer, x, call):
        found[path] = layer.numerics, layer.implementation
        return call()

    with tapped(look):
        jax.eval_shape(model.init, jax.random.key(0), *example_inputs(model))
    return found


def test_every_layer_computes_as_its_network_says():
    default = settings_of_layers(MODEL)
    assert len(default) == 10
    assert set(default.values()) == {("simulated", None)}
    changed = MODEL.clone(numerics="integer", implementation="xla")
    assert settings_of_layers(changed) == dict.fromkeys(default, ("integer", "xla"))


def test_how_a_network_computes_is_no_part_of_its_configuration():
    changed = MODEL.clone(numerics="integer", implementation="xla")
    assert config_of(changed) == config_of(MODEL)
    assert not {"numerics", "implementation", "layers"} & set(config_of(MODEL))


def test_equal_networks_are_compiled_once():
    traces = []

    def call(x, model):
        traces.append(model.layers)
        return x

    fn = jax.jit(call, static_argnames="model")
    for _ in range(2):
        fn(1.0, model=MODEL.clone())
        fn(1.0, model=MODEL.clone(numerics="integer"))
    assert traces == [Layers(), Layers("integer")]


@pytest.mark.parametrize("given", [{"numerics": "fast"}, {"implementation": "fast"}])
def test_an_unknown_way_to_compute_is_named(given):
    inputs = example_inputs(MODEL)
    params = jax.eval_shape(MODEL.init, jax.random.key(0), *inputs)["params"]
    recipe = Recipe.preset("w4a8", params)
    packed = jax.eval_shape(lambda p: quantize_params(p, recipe=recipe), params)
    (name,) = given
    with pytest.raises(ValueError, match=f"{name}='fast' is not known; use one of"):
        jax.eval_shape(
            lambda p, *inputs: MODEL.clone(**given).apply({"params": p}, *inputs), packed, *inputs
        )
