"""Networks for videos: formulas by hand, and what they refuse."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import output, random_params

from qdit_jax.models import FAMILIES, build_model
from qdit_jax.models.dit import Block
from qdit_jax.models.layers import line_positions, over_time
from qdit_jax.models.linear import Layers
from qdit_jax.models.stdit import STDiTBlock

NUMBERS = {"fps": 24.0, "height": 24.0, "width": 32.0}


def made(name, **config):
    model = build_model(name, {**FAMILIES[name].examples[0], **config})
    return model, random_params(model)


def text_of(model, count=2, rows=5):
    text = np.random.default_rng(2).standard_normal((count, rows, model.caption_channels))
    mask = np.arange(rows) < 2 + np.arange(count)[:, None]
    found = {"text": text.astype(np.float32), "text_mask": mask}
    if "fps" in model.example_condition(1):
        found |= {name: np.full(count, value, np.float32) for name, value in NUMBERS.items()}
    return found


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def norm(x):
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-6)


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def softmax_product(q, k, v):
    scores = q @ k.T / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def attended(p, x, heads=2):
    """Returns self-attention of one sequence `[T, D]`, head by head."""
    q, k, v = (np.split(part, heads, -1) for part in np.split(dense(p["qkv"], x), 3, -1))
    found = [softmax_product(*one) for one in zip(q, k, v, strict=True)]
    return dense(p["proj"], np.concatenate(found, -1))


def cross(p, x, text, heads=2):
    q = np.split(dense(p["q_linear"], x), heads, -1)
    k, v = (np.split(a, heads, -1) for a in np.split(dense(p["kv_linear"], text), 2, -1))
    found = [softmax_product(*one) for one in zip(q, k, v, strict=True)]
    return dense(p["proj"], np.concatenate(found, -1))


def mlp(p, x):
    h = dense(p["fc1"], x)
    gelu = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    return dense(p["fc2"], gelu)


def test_a_block_of_stdit_by_hand():
    frames, positions, width, heads = 3, 4, 16, 2
    block = STDiTBlock(heads, 4.0, Layers())
    x, text = normal(1, frames, positions, width), normal(1, 5, width, seed=1)
    m, times = normal(1, 1, 1, 6 * width, seed=2), normal(frames, 1, width, seed=3)
    mask = np.array([[True, True, False, True, False]])
    given = (x, m, text, mask, times)
    shapes = jax.eval_shape(block.init, jax.random.key(0), *given)["params"]
    rng = np.random.default_rng(4)
    p = jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape), shapes)
    shift1, scale1, gate1, shift2, scale2, gate2 = m.reshape(6, width) + p["scale_shift_table"]
    y = x[0].astype(np.float64)
    mod = norm(y) * (1 + scale1) + shift1
    y = y + gate1 * np.stack([attended(p["attn"], frame) for frame in mod])
    raw = y + times  # neither normed nor modulated, and gated like the attention before
    over = np.stack([attended(p["attn_temp"], raw[:, i]) for i in range(positions)], 1)
    y = y + gate1 * over
    flat = y.reshape(-1, width)
    y = y + cross(p["cross_attn"], flat, text[0][mask[0]]).reshape(y.shape)
    y = y + gate2 * mlp(p["mlp"], norm(y) * (1 + scale2) + shift2)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), p)
    found = block.apply({"params": params}, *map(jnp.asarray, given))
    np.testing.assert_allclose(found[0], y, atol=2e-5)


def test_lattes_blocks_alternate_and_the_position_in_time_is_added_once():
    model, params = made("latte", depth=4)
    x, label = jnp.asarray(normal(2, *model.sample_shape())), jnp.array([1, 4])
    timestep = jnp.array([10.0, 700.0])
    out = output(model, params, x, timestep, label)
    block = Block(2, 4.0, 1e-6, Layers())
    seen = []

    def record(next_fn, args, kwargs, context):
        found = next_fn(*args, **kwargs)
        if isinstance(context.module, Block):
            seen.append((context.module.name, args[0], args[1], found))
        return found

    with jax.disable_jit(), _intercepted(record):
        model.apply({"params": params}, x, timestep, label)
    assert [name for name, *_ in seen] == [f"blocks_{i}" for i in range(4)]
    tokens, c = seen[0][1], seen[0][2]
    for i in range(4):
        if i == 1:
            tokens = tokens + params["temp_embed"][:, :, None]
        own = {"params": params[f"blocks_{i}"]}
        one = lambda x, own=own: block.apply(own, x, c)  # noqa: E731
        tokens = over_time(one, tokens) if i % 2 else one(tokens)
    last = jnp.swapaxes(seen[-1][3], 1, 2)
    np.testing.assert_allclose(tokens, last, atol=1e-5)
    # Each frame of a spatial block alone gives the same.
    frames = [block.apply({"params": params["blocks_0"]}, seen[0][1][:, i], c) for i in range(3)]
    np.testing.assert_allclose(jnp.stack(frames, 1), seen[0][3], atol=1e-5)
    assert out.shape == (2, 3, 4, 4, 8)


def _intercepted(fn):
    from flax import linen as nn

    return nn.intercept_methods(fn)


def test_line_positions_are_sines_then_cosines():
    table = line_positions(8, np.array([0, 2]))
    angles = 2 * 10_000 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(table[0], [0] * 4 + [1] * 4)
    np.testing.assert_allclose(table[1], [*np.sin(angles), *np.cos(angles)], atol=1e-6)


def test_odd_latents_are_padded_and_cropped():
    model, params = made("stdit3")
    condition, x = text_of(model), normal(2, 5, 3, 5, 4)
    padded = np.pad(x, [(0, 0), (0, 0), (0, 1), (0, 1), (0, 0)])
    time = jnp.array([900.0, 30.0])
    odd, even = (output(model, params, jnp.asarray(a), time, condition) for a in (x, padded))
    assert odd.shape == x.shape
    np.testing.assert_allclose(odd, even[:, :, :3, :5], atol=1e-6)


def test_clean_frames_see_timestep_0():
    model, params = made("stdit3")
    condition, x = text_of(model), jnp.asarray(normal(2, *model.sample_shape()))
    apply = lambda t, **more: output(model, params, x, t, {**condition, **more})  # noqa: E731
    time = jnp.array([900.0, 30.0])
    every, none = np.ones((2, 5), bool), np.zeros((2, 5), bool)
    np.testing.assert_allclose(apply(time, frame_mask=every), apply(time), atol=1e-5)
    # As published, the output layer modulates clean frames by the timestep first.
    assert np.abs(apply(time, frame_mask=none) - apply(0 * time)).max() > 1e-3
    some = every.copy()
    some[:, 0] = False
    assert np.abs(apply(time, frame_mask=some) - apply(time)).max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"text": normal(2, 9, 12)},
            r"text has shape \(2, 9, 12\); this model takes \[B, 1 to 5, 12\]",
        ),
        ({"text_mask": np.ones((2, 5))}, "text_mask has dtype float64; give booleans"),
        ({"fps": np.zeros(2)}, "fps=0.0: give positive numbers"),
        ({"fps": np.array([1.0, np.nan])}, "fps has values that are NaN"),
        ({"height": np.array([8.0, 16.0])}, "goes by the first sample's; give one size per call"),
        ({"width": np.ones(3)}, r"width \(3,\); give one per sample"),
        ({"frame_mask": np.ones((2, 5))}, "frame_mask has dtype float64"),
        (
            {"colour": np.ones(2)},
            "give text and text_mask and fps and height and width; frame_mask too",
        ),
    ],
)
def test_conditions_of_stdit3_are_refused_by_name(change, message):
    model, _ = made("stdit3")
    model.check_condition(text_of(model))
    with pytest.raises(ValueError, match=message):
        model.check_condition({**text_of(model), **change})


@pytest.mark.parametrize(
    ("name", "config", "shape", "message"),
    [
        ("latte", {}, (3, 4, 6, 4), "its tables of positions are stored"),
        ("latte", {"depth": 3}, None, "depth=3 is not an even number"),
        ("latte", {"num_heads": 3}, None, "must be divisible by num_heads=3"),
        ("stdit", {}, (3, 5, 4, 4), "divisible by 2"),
        ("stdit3", {"num_heads": 16}, None, "odd width"),
        ("stdit3", {}, (5, 4, 4, 3), "takes 4 channels"),
        ("latte_t2v", {}, (2, 4, 4, 4), "takes 1 or video_length=3"),
        ("latte_t2v", {"activation": "relu"}, None, "activation='relu' is not supported"),
        ("latte_t2v", {"out_channels": 5}, None, "out_channels=5 of in_channels=4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(name, config, shape, message):
    model = build_model(name, {**FAMILIES[name].examples[0], **config})
    x = jax.ShapeDtypeStruct((1, *(shape or model.sample_shape())), jnp.float32)
    _, time, condition = model.example_inputs()
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), x, time, condition)
    if shape and name in ("stdit", "stdit3"):
        other = (*shape[:1], 8, 10, 4)
        x = jax.ShapeDtypeStruct((1, *other), jnp.float32)
        variables = jax.eval_shape(model.init, jax.random.key(0), x, time, condition)
        assert jax.eval_shape(model.apply, variables, x, time, condition).shape[:-1] == (
            1,
            *other[:-1],
        )
