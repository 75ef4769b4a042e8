"""What PixArt has of its own: compressed keys and values, positions, null captions, conditions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import output, random_params

import qdit_jax as qdit
from qdit_jax.checkpoint import with_dtype
from qdit_jax.models import RUNS, build_model, sincos_positions
from qdit_jax.models.linear import Layers
from qdit_jax.models.pixart import SelfAttention
from qdit_jax.sampling import running_params

SMALL = {
    "sample_size": 4,
    "hidden_size": 24,
    "depth": 2,
    "num_heads": 2,
    "mlp_width": 48,
    "text_length": 6,
    "text_width": 16,
}


def network(**fields):
    return build_model("pixart", {**SMALL, **fields})


def condition(model, batch=2, rows=6):
    rng = np.random.default_rng(0)
    found = {
        "text": jnp.asarray(rng.standard_normal((batch, rows, model.text_width)), jnp.float32),
        "text_mask": jnp.arange(rows) < 2 + jnp.arange(batch)[:, None],
    }
    if model.size_conditions:
        found |= {"size": jnp.full((batch, 2), 512.0), "aspect_ratio": jnp.ones((batch, 1))}
    return found


def outputs(model, params, shape=None):
    shape = model.sample_shape() if shape is None else shape
    x = np.random.default_rng(1).standard_normal((2, *shape)).astype(np.float32)
    return np.asarray(output(model, params, x, jnp.full(2, 500.0), condition(model)))


def numpy_norm(x, params):
    centered = x - x.mean(-1, keepdims=True)
    normal = centered / np.sqrt(np.square(centered).mean(-1, keepdims=True) + 1e-5)
    return normal * params["scale"] + params["bias"]


def numpy_attention(x, params, heads, factor, grid):
    """Returns self-attention by its definition: each window of the grid becomes one key and value."""
    width = x.shape[-1]
    linear = {n: (params[n]["kernel"], params[n]["bias"]) for n in ("qkv", "proj")}
    q, k, v = np.split(x @ linear["qkv"][0] + linear["qkv"][1], 3, axis=-1)
    q, k = numpy_norm(q, params["q_norm"]), numpy_norm(k, params["k_norm"])

    def fewer(tokens):
        rows, columns = grid
        found = []
        for r in range(0, rows - factor + 1, factor):
            for c in range(0, columns - factor + 1, factor):
                total = np.array(params["sr"]["bias"])
                for i in range(factor):
                    for j in range(factor):
                        weight = params["sr"]["filter"][i, j, 0]
                        total = total + weight * tokens[(r + i) * columns + c + j]
                found.append(total)
        return numpy_norm(np.stack(found), params["norm"])

    k, v = fewer(k), fewer(v)
    parts = []
    for h in range(heads):
        at = slice(h * width // heads, (h + 1) * width // heads)
        scores = q[:, at] @ k[:, at].T / np.sqrt(width // heads)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        parts.append(weights / weights.sum(-1, keepdims=True) @ v[:, at])
    return np.concatenate(parts, -1) @ linear["proj"][0] + linear["proj"][1]


@pytest.mark.parametrize(("factor", "grid"), [(2, (4, 6)), (2, (5, 3)), (3, (3, 6))])
def test_compressed_attention_is_its_definition(factor, grid):
    module = SelfAttention(2, True, factor, grid, Layers())
    x = jnp.asarray(
        np.random.default_rng(3).standard_normal((1, grid[0] * grid[1], 12)), jnp.float32
    )
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    rng = np.random.default_rng(4)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), "float32"), shapes
    )
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    expected = numpy_attention(np.asarray(x[0], np.float64), wide, 2, factor, grid)
    found = np.asarray(output(module, params, x))[0]
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_a_scanned_run_computes_the_same():
    model = network(depth=9, kv_compression=(1, *(2,) * 8), hidden_size=8, mlp_width=8)
    full = qdit.Checkpoint(model, random_params(model))
    ran = running_params(model, full.params)
    assert {name: jax.tree.leaves(tree)[0].shape[0] for name, tree in ran[RUNS].items()} == {
        "blocks_1": 8
    }
    found, plain = outputs(model, ran), outputs(model, full.params)
    np.testing.assert_allclose(found, plain, atol=1e-5 * np.abs(plain).max())


def test_sixteen_bits_are_close():
    model = network(size_conditions=True, qk_norm=True, kv_compression=(1, 2))
    full = qdit.Checkpoint(model, random_params(model))
    narrow = with_dtype(full, "bfloat16")
    exact, coarse = outputs(model, full.params), outputs(narrow.model, narrow.params)
    assert coarse.dtype == np.float32
    assert 0 < np.linalg.norm(coarse - exact) < 0.03 * np.linalg.norm(exact)


def test_stored_positions_count_at_their_size_only():
    model = network(stored_positions=True, interpolation_scale=0.5, depth=1)
    params = random_params(model)
    computed = network(interpolation_scale=0.5, depth=1)
    others = {name: tree for name, tree in params.items() if name != "pos_embed"}
    own, wide = model.sample_shape(), (4, 8, 4)
    assert np.abs(outputs(model, params) - outputs(computed, others)).max() > 1e-3
    np.testing.assert_allclose(
        outputs(model, params, wide), outputs(computed, others, wide), atol=1e-6
    )
    table = sincos_positions(24, (2, 2), (2.0, 2.0))[None]
    same = {**params, "pos_embed": jnp.asarray(table)}
    np.testing.assert_allclose(outputs(model, same, own), outputs(computed, others), atol=1e-6)


def test_positions_are_stretched_to_the_range_of_the_base():
    steps = sincos_positions(8, (2, 4), (0.5, 0.25))
    fine = sincos_positions(8, (4, 4), (0.25, 0.25))
    np.testing.assert_array_equal(steps[4:], fine[8:12])
    assert np.abs(sincos_positions(8, (2, 4)) - steps).max() > 0.1


def test_the_null_caption_has_the_mask_of_its_prompt():
    model = network(depth=1)
    params, given = random_params(model), condition(model, rows=4)
    null = model.null_condition(given, params)
    assert null["text_mask"] is given["text_mask"]
    np.testing.assert_array_equal(null["text"][1], params["y_embedder"]["y_embedding"][:4])
    with pytest.raises(ValueError, match="text has 7 rows and the null caption of this network 6"):
        model.null_condition(condition(model, rows=7), params)


def test_without_a_null_caption_the_caller_brings_one():
    model = network(null_caption=False, depth=1)
    checkpoint = qdit.Checkpoint(model, random_params(model))
    given = condition(model)
    sampler = qdit.ddim(1)
    with pytest.raises(ValueError, match=r"no null condition of its own.*give null_text"):
        qdit.generate(checkpoint, sampler, given, guidance=4.5)
    null = {"null_text": jnp.zeros((1, 6, 16)), "null_text_mask": jnp.ones((1, 6), bool)}
    guided = qdit.generate(checkpoint, sampler, {**given, **null}, guidance=4.5)
    assert guided.shape == (2, 4, 4, 4)
    assert np.isfinite(guided).all()


def test_every_channel_is_guided_and_the_variance_is_not():
    model = network(depth=1)
    params, given = random_params(model), condition(model)
    x, times = np.ones((2, *model.sample_shape()), np.float32), np.full(2, 700.0, np.float32)
    cond, null = (
        output(model, params, x, times, c) for c in (given, model.null_condition(given, params))
    )
    guided = jax.jit(qdit.denoiser(model, params, guidance=4.5))(x, times, given)
    expected = null[..., :4] + 4.5 * (cond - null)[..., :4]
    np.testing.assert_allclose(guided[..., :4], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(guided[..., 4:], cond[..., 4:], rtol=1e-5, atol=1e-5)
    assert model.learned_variance
    assert model.guided_channels is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": jnp.zeros((2, 6, 15))}, r"text has shape \(2, 6, 15\); give \[B, L, 16\]"),
        ({"text_mask": jnp.ones((2, 6))}, "text_mask has .* dtype float32; give booleans"),
        ({"text_mask": jnp.ones((2, 5), bool)}, r"text_mask has shape \(2, 5\)"),
        ({"text_mask": jnp.zeros((2, 6), bool)}, "True for at least one token"),
        ({"size": jnp.zeros((2, 1))}, r"size has shape \(2, 1\); give \[B, 2\]"),
        ({"aspect_ratio": jnp.zeros(2)}, r"aspect_ratio has shape \(2,\); give \[B, 1\]"),
        ({"fps": jnp.zeros(2)}, "condition has .*'fps'.*; give text"),
    ],
)
def test_conditions_that_do_not_fit_are_named(change, message):
    model = network(size_conditions=True)
    model.check_condition(condition(model))
    with pytest.raises(ValueError, match=message):
        model.check_condition({**condition(model), **change})


@pytest.mark.parametrize(
    ("fields", "shape", "message"),
    [
        ({}, (4, 5, 4), r"x has shape \(2, 4, 5, 4\); this model takes \[B, H, W, 4\]"),
        ({}, (4, 4, 3), "x has shape"),
        ({"kv_compression": (1, 4)}, (4, 4, 4), "divisible by 2, at least 8"),
        ({"kv_compression": (2,)}, (4, 4, 4), r"kv_compression=\(2,\): give one number"),
        ({"num_heads": 5}, (4, 4, 4), "hidden_size=24 must be divisible by num_heads=5"),
        ({"hidden_size": 16, "size_conditions": True}, (4, 4, 4), "by 3 for the sizes"),
    ],
)
def test_what_makes_no_network_is_refused(fields, shape, message):
    model = network(**fields)
    x = jnp.zeros((2, *shape))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), x, jnp.zeros(2), condition(model))


def test_a_condition_that_lacks_the_sizes_is_refused_by_the_call():
    model = network(size_conditions=True)
    given = {name: e for name, e in condition(model).items() if name != "size"}
    x = jnp.zeros((2, *model.sample_shape()))
    with pytest.raises(ValueError, match=r"lacks size: \[B, 2\], rows and columns in pixels"):
        model.apply({"params": random_params(model)}, x, jnp.zeros(2), given)
