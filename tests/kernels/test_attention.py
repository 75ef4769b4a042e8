"""Attention in one place, against float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdit_jax.kernels import ATTENTION_IMPLEMENTATIONS, attention
from qdit_jax.kernels import splash_attention as splash_module
from qdit_jax.kernels.attention_call import AttentionShapes
from qdit_jax.kernels.splash_attention import blocks_of, splash_attention, splash_reason

B, Q, T, H, D = 2, 5, 7, 3, 8


def operands(keys=T, dtype=jnp.float32, size=1.0):
    rng = np.random.default_rng(0)
    shapes = (B, Q, H, D), (B, keys, H, D), (B, keys, H, D)
    return [jnp.asarray(size * rng.normal(size=shape), dtype) for shape in shapes]


def expected(q, k, v, mask=None, scale=D**-0.5):
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    logits = np.einsum("bqhd,bkhd->bhqk", q, k) * scale
    allowed = np.ones(logits.shape, bool) if mask is None else np.asarray(mask)
    if allowed.ndim == 2:
        allowed = allowed[:, None, None]
    allowed = np.broadcast_to(allowed, logits.shape)
    weights = np.where(allowed, np.exp(logits - logits.max(-1, keepdims=True)), 0)
    total = weights.sum(-1, keepdims=True)
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    return np.einsum("bhqk,bkhd->bqhd", weights, v)


@pytest.mark.parametrize("name", ATTENTION_IMPLEMENTATIONS)
@pytest.mark.parametrize("keys", [Q, T, 1])
def test_self_and_cross_attention(name, keys):
    q, k, v = operands(keys)
    shapes = AttentionShapes(
        q.shape, k.shape, None, False, "float32", jax.default_backend(), v.shape[-1]
    )
    if reason := ATTENTION_IMPLEMENTATIONS[name].unsupported_reason(shapes):
        with pytest.raises(ValueError, match=f"implementation='{name}' of attention"):
            attention(q, k, v, implementation=name)
        pytest.skip(reason)
    for scale in (None, 0.3):
        found = attention(q, k, v, scale=scale, implementation=name)
        np.testing.assert_allclose(found, expected(q, k, v, None, scale or D**-0.5), atol=2e-6)


@pytest.mark.parametrize("shape", [(B, T), (B, 1, 1, T), (B, 1, Q, T), (1, H, Q, T), (B, H, Q, T)])
def test_masked_keys_have_no_weight(shape):
    q, k, v = operands()
    mask = np.random.default_rng(1).random(shape) < 0.6
    mask[..., 2] = True
    found = attention(q, k, v, jnp.asarray(mask))
    np.testing.assert_allclose(found, expected(q, k, v, mask), atol=2e-6)
    changed = v.at[:, 0].set(jnp.inf)
    mask[..., 0] = False
    masked = attention(q, k, jnp.where(jnp.isinf(changed), 1e30, changed), jnp.asarray(mask))
    np.testing.assert_allclose(masked, attention(q, k, v, jnp.asarray(mask)), atol=2e-6)


def test_a_query_that_may_look_nowhere_gets_zero():
    q, k, v = operands()
    mask = jnp.ones((B, 1, Q, T), bool).at[1, 0, 3].set(False)
    found = attention(q, k, v, mask)
    np.testing.assert_array_equal(found[1, 3], 0)
    np.testing.assert_allclose(found, expected(q, k, v, mask), atol=2e-6)


def test_the_softmax_of_half_precision_is_float32_and_large_logits_do_not_overflow():
    q, k, v = operands(dtype=jnp.bfloat16)
    found = attention(q, k, v)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(found), expected(q, k, v), atol=2e-2)
    q, k, v = operands(size=100.0)
    np.testing.assert_allclose(attention(q, k, v), expected(q, k, v), rtol=1e-3, atol=1e-2)


def test_weights_fn_sees_the_softmax():
    q, k, v = operands()
    seen = []
    attention(q, k, v, weights_fn=lambda w: seen.append(w) or w)
    assert seen[0].shape == (B, H, Q, T)
    np.testing.assert_allclose(seen[0].sum(-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(attention(q, k, v, weights_fn=jnp.zeros_like), 0)


def test_what_does_not_fit_is_named():
    q, k, v = operands()
    with pytest.raises(ValueError, match=r"k \(2, 7, 2, 8\)"):
        attention(q, k[:, :, :2], v[:, :, :2])
    with pytest.raises(TypeError, match="mask has dtype float32; use booleans"):
        attention(q, k, v, jnp.ones((B, T)))
    with pytest.raises(ValueError, match=r"mask has shape \(2, 5\); use \[2, 7\]"):
        attention(q, k, v, jnp.ones((B, Q), bool))
    with pytest.raises(ValueError, match="implementation='fast' of attention is not known; use"):
        attention(q, k, v, implementation="fast")


def test_works_under_jit_and_grad():
    q, k, v = operands()
    mask = jnp.ones((B, T), bool).at[0, 1:].set(False)
    grad = jax.jit(jax.grad(lambda q: attention(q, k, v, mask).sum()))(q)
    assert np.isfinite(grad).all()


def test_fused_kernels_refuse_what_they_cannot_compute():
    bf16 = AttentionShapes((2, 256, 3, 72), (2, 256, 3, 72), None, False, "bfloat16", "cuda", 72)
    cudnn = ATTENTION_IMPLEMENTATIONS["cudnn"].unsupported_reason
    splash = ATTENTION_IMPLEMENTATIONS["splash"].unsupported_reason
    for changes, reason in (
        ({"platform": "cpu"}, "NVIDIA GPUs only"),
        ({"dtype": "float32"}, "these are float32"),
        ({"sees_weights": True}, "never holds the softmax"),
        ({"q_shape": (2, 256, 3, 71)}, "that 8 divides"),
        ({"q_shape": (2, 256, 3, 136)}, "at most 128"),
        ({"v_width": 64}, "one width"),
    ):
        assert reason in cudnn(dataclasses.replace(bf16, **changes))
    assert "TPUs only" in splash(bf16)


@pytest.mark.parametrize(
    ("queries", "keys"),
    [(128, 256), (256, 200), (130, 128), (130, 200)],
    ids=["whole blocks", "keys added", "queries added", "both added"],
)
def test_the_splash_kernel_equals_the_products_of_its_operands(queries, keys):
    rng = np.random.default_rng(0)
    sizes = (queries, keys, keys)
    # All keys are far from 0: one that was added would be seen.
    q, k, v = (jnp.asarray(1 + rng.normal(size=(2, n, 2, 72)), jnp.float32) for n in sizes)
    found = splash_attention(q, -k, v, None, 72**-0.5, None, interpret=True)
    np.testing.assert_allclose(found, expected(q, -k, v, scale=72**-0.5), atol=4e-6)


@pytest.mark.parametrize("keys", [256, 200])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_splash_kernel_sees_no_key_that_is_masked(batch, keys):
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(1 + rng.normal(size=(2, n, 2, 72)), jnp.float32) for n in (130, keys, keys)
    )
    mask = rng.random((batch, 1, 1, keys)) < 0.4
    mask[-1, ..., 128:] = False  # a whole block
    if batch == 2:
        mask[0] = False  # no key is left
    found = splash_attention(q, -k, v, jnp.asarray(mask), 72**-0.5, None, interpret=True)
    np.testing.assert_allclose(found, expected(q, -k, v, mask, 72**-0.5), atol=4e-6)


@pytest.mark.parametrize(
    ("positions", "filled"),
    [(32760, (32768, 512)), (1560, (1664, 128)), (384, (384, 128)), (512, (512, 512))],
)
def test_splash_blocks_add_as_few_positions_as_they_can(positions, filled):
    assert blocks_of(positions) == filled


def test_the_splash_kernel_takes_the_tokens_of_a_published_video(monkeypatch):
    """Wan at 81 frames of 480 x 832, whose 32,760 tokens no block divides."""
    monkeypatch.setattr(splash_module, "find_spec", lambda name: object())
    clip = (1, 32760, 12, 128)
    shapes = AttentionShapes(clip, clip, None, False, "bfloat16", "tpu", 128)
    assert splash_reason(shapes) is None
    text = dataclasses.replace(shapes, k_shape=(1, 512, 12, 128))
    assert splash_reason(text) is None
    assert splash_reason(dataclasses.replace(text, mask_shape=(1, 1, 1, 512))) is None
    of_queries = dataclasses.replace(text, mask_shape=(1, 1, 32760, 512))
    assert "differs between heads or queries" in splash_reason(of_queries)
    frames = dataclasses.replace(shapes, q_shape=(900, 16, 16, 72), k_shape=(900, 16, 16, 72))
    assert "16 queries and 16 keys 128 and 128: more than 1.5 times the work" in splash_reason(
        dataclasses.replace(frames, v_width=72)
    )
