"""A network of two experts: which one runs, what is seen of each, and how each is fitted."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import output, quantized_layers, random_params

import qdit_jax as qdit
from qdit_jax import diffusion
from qdit_jax.calibration import collect_items
from qdit_jax.evaluation import verify
from qdit_jax.methods import method_named
from qdit_jax.methods.reconstruction import reconstruct_blocks
from qdit_jax.models import RUNS, Wan, expert_alone, experts_of, with_runs
from qdit_jax.ptq import ReconstructionSettings
from qdit_jax.sampling import checkpoint_sampler, running_params

CONFIG = {
    "sample_size": (2, 4, 4),
    "in_channels": 4,
    "hidden_size": 32,
    "depth": 1,
    "num_heads": 2,
    "ffn_width": 48,
    "freq_width": 32,
    "text_width": 12,
    "text_length": 6,
    "boundary": 600.0,
}
LAYERS = r"(high|low)/blocks_0/(ffn_0|cross_attn/q)"
GUIDANCE = diffusion.SteppedScale(boundary=600.0, at_or_above=4.0, below=3.0)


@pytest.fixture(scope="module")
def full():
    model = Wan(**CONFIG)
    return qdit.Checkpoint(model, random_params(model))


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(5)
    text = rng.standard_normal((3, 6, 12)).astype(np.float32)
    return {"text": text, "null_text": 0.1 * text[:1]}


@pytest.fixture(scope="module")
def items(full, prompts):
    return collect_items(
        full,
        jax.random.key(2),
        4,
        conditions=prompts,
        sampler=checkpoint_sampler(full, 4, shift=1.0),
        guidance=GUIDANCE,
        batch_size=4,
    )


def inputs(timesteps):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((len(timesteps), *Wan(**CONFIG).sample_shape()))
    text = rng.standard_normal((len(timesteps), 6, 12))
    return (
        jnp.asarray(x, jnp.float32),
        jnp.asarray(timesteps, jnp.float32),
        {"text": jnp.asarray(text)},
    )


def outputs(model, params, given):
    return np.asarray(output(model, params, *given))


def test_every_sample_is_by_the_expert_of_its_timestep(full):
    given = inputs([999.0, 600.0, 599.0])
    out = outputs(full.model, full.params, given)
    for name, chosen in (("high", [0, 1]), ("low", [2])):
        alone = outputs(*expert_alone(full.model, full.params, name), given)
        np.testing.assert_allclose(out[chosen], alone[chosen], atol=1e-5)
        others = [i for i in range(3) if i not in chosen]
        assert np.abs(out[others] - alone[others]).min(axis=0).max() > 0.1


def test_tokens_that_are_given_do_not_choose_the_expert(full):
    x, _, text = inputs([900.0])
    tokens = jnp.full((1, 8), 900.0).at[:, :4].set(0.0)
    out = outputs(full.model, full.params, (x, tokens, text))
    high = outputs(*expert_alone(full.model, full.params, "high"), (x, tokens, text))
    np.testing.assert_allclose(out, high, atol=1e-5)


def test_only_the_experts_of_the_batch_run(full):
    """What an expert that does not run would return has no effect, NaN included."""
    broken = {**full.params, "low": jax.tree.map(lambda a: a * jnp.nan, full.params["low"])}
    given = inputs([999.0, 700.0])
    assert np.isfinite(outputs(full.model, broken, given)).all()
    program = jax.make_jaxpr(lambda p: full.model.apply({"params": p}, *given))(full.params)
    # One of each expert; what they hold chooses by platform.
    assert sum(equation.primitive.name == "cond" for equation in program.eqns) == 2


def test_an_expert_that_the_network_lacks_is_refused():
    with pytest.raises(ValueError, match="expert='middle' is not of this network; it has high and"):
        Wan(**CONFIG, expert="middle")
    with pytest.raises(ValueError, match="it has none"):
        Wan(expert="high")
    assert experts_of(Wan()) == ()


def test_long_runs_of_blocks_are_scanned_within_each_expert():
    model = Wan(**{**CONFIG, "depth": 9})
    params = random_params(model, scale=0.05)
    stacked = running_params(model, params)
    assert set(stacked["high"][RUNS]) == set(stacked["low"][RUNS]) == {"blocks_0"}
    assert with_runs(stacked, r"(?:(?:high|low)/)?blocks_\d+") == stacked
    given = inputs([999.0, 1.0])
    np.testing.assert_allclose(
        outputs(model, stacked, given), outputs(model, params, given), atol=1e-4
    )


def test_each_expert_is_calibrated_on_its_own_timesteps(full, prompts):
    sampler = checkpoint_sampler(full, 4, shift=1.0)
    options = {"conditions": prompts, "sampler": sampler, "guidance": GUIDANCE}
    stats = qdit.calibrate(full, jax.random.key(0), 2, num_tokens=2, **options)
    is_high = stats.timesteps >= 600
    assert is_high.any()
    assert not is_high.all()
    paths = {name.removeprefix("high/") for name in stats.low if name.startswith("high/")}
    assert paths == {name.removeprefix("low/") for name in stats.low if name.startswith("low/")}
    for name, runs in (("high", is_high), ("low", ~is_high)):
        own = np.flatnonzero(runs)
        for path in paths:
            low = stats.low[f"{name}/{path}"]
            assert np.isfinite(low).all()
            nearest = own[np.abs(np.arange(len(runs))[:, None] - own).argmin(axis=1)]
            np.testing.assert_array_equal(low, low[nearest])
            tokens = stats.tokens[f"{name}/{path}"]
            np.testing.assert_array_equal(tokens, tokens[nearest])
    # What the one sees at its steps is what it sees alone, on the same latents.
    other = dataclasses.replace(
        full, params={**full.params, "low": jax.tree.map(jnp.zeros_like, full.params["low"])}
    )
    changed = qdit.calibrate(other, jax.random.key(0), 2, num_tokens=2, **options)
    for path in paths:
        np.testing.assert_array_equal(changed.low[f"high/{path}"], stats.low[f"high/{path}"])
    one_step = checkpoint_sampler(full, 1)
    with pytest.raises(ValueError, match="expert 'low' runs at none of the 1 timesteps"):
        qdit.calibrate(full, jax.random.key(0), 2, **{**options, "sampler": one_step})


def test_each_expert_is_fitted_to_its_own_inputs(full, items):
    """What the other expert sees has no effect on how one is quantized."""
    data = qdit.CalibrationData(items=items, holdout=0.0)
    recipe = qdit.Recipe.preset("w4a8", full, layers=LAYERS, group_size=16)
    quantized = qdit.quantize(full, "gptq", recipe, data=data)
    layers = quantized_layers(quantized.params)
    assert layers == {
        f"{name}/blocks_0/{p}" for name in ("high", "low") for p in ("ffn_0", "cross_attn/q")
    }
    late = items.timestep < 600
    other = items._replace(x=np.where(late[:, None, None, None, None], 3 * items.x, items.x))
    again = qdit.quantize(full, "gptq", recipe, data=dataclasses.replace(data, items=other))
    for name, same in (("high", True), ("low", False)):
        one, two = (jax.tree.leaves(found.params[name]) for found in (quantized, again))
        assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True)) == same
    with pytest.raises(ValueError, match="expert 'high' runs at none of the"):
        qdit.quantize(full, "gptq", recipe, data=dataclasses.replace(data, items=items.only(late)))


def test_finished_blocks_of_one_expert_are_not_taken_for_the_other_s(full, items, tmp_path):
    layers = r"(high|low)/blocks_0/ffn_0"
    recipe = qdit.Recipe.preset("w4a16", group_size=16, layers=layers)
    data = qdit.CalibrationData(items=items, holdout=0.0, unfinished=tmp_path / "kept")
    short = functools.partial(reconstruct_blocks, settings=ReconstructionSettings(num_steps=5))
    method = dataclasses.replace(method_named("brecq"), apply=short)
    first = qdit.quantize(full, method, recipe, data=data)
    kept = sorted((tmp_path / "kept").rglob("*.npz"))
    assert [str(path.relative_to(tmp_path / "kept")) for path in kept] == [
        "high/0000.npz",
        "low/0000.npz",
    ]
    before = [path.stat().st_mtime_ns for path in kept]
    again = qdit.quantize(full, method, recipe, data=data)
    assert [path.stat().st_mtime_ns for path in kept] == before
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)


def test_a_recipe_of_one_expert_leaves_the_other_as_it_is(full, items):
    recipe = qdit.Recipe.preset("w4a8", layers=r"low/blocks_0/ffn_\d", group_size=16)
    data = qdit.CalibrationData(items=items, holdout=0.0)
    quantized = qdit.quantize(full, "gptq", recipe, data=data)
    assert quantized_layers(quantized.params) == {"low/blocks_0/ffn_0", "low/blocks_0/ffn_2"}
    jax.tree.map(np.testing.assert_array_equal, quantized.params["high"], full.params["high"])


def test_a_quantized_pair_is_saved_sampled_and_verified(full, prompts, tmp_path):
    quantized = qdit.quantize(full, "rtn", "w8a8", out=tmp_path / "q")
    read = qdit.load(tmp_path / "q")
    assert read.model == full.model
    sampler = checkpoint_sampler(full, 3, shift=1.0)
    texts = {"text": prompts["text"], "null_text": prompts["null_text"]}
    clips = [
        qdit.generate(c, sampler, texts, guidance=GUIDANCE, batch_size=3)
        for c in (full, read, quantized)
    ]
    np.testing.assert_array_equal(clips[1], clips[2])
    error = np.linalg.norm(clips[1] - clips[0]) / np.linalg.norm(clips[0])
    assert 0 < error < 0.2
    found = verify(
        read,
        against=full,
        conditions=texts,
        steps=10,  # of the published shift, so that the last is below the boundary
        guidance=4.0,
        num_samples=2,
        timing=False,
    )
    assert found.passed, found.failures
    measured = {layer.path: layer.db for layer in found.layers}
    assert len(measured) == 2 * 7
    assert all(20 < db < 80 for db in measured.values()), measured
