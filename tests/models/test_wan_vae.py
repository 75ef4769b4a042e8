"""Wan's video autoencoders beside their golden: pieces, causality, memory, and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import random_params

import qdit_jax as qdit
from qdit_jax.models import WanAutoencoder, build_model
from qdit_jax.models.wan_families import RESIDUAL_WAN_VAE, SMALL_WAN_VAE

KINDS = {"wan 2.1": {}, "wan 2.2 5B": RESIDUAL_WAN_VAE}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    model = build_model("wan-vae", {**SMALL_WAN_VAE, **KINDS[request.param]})
    return model, random_params(model)


def coded(model, params, x, method, pieces=None):
    run = jax.jit(
        lambda p, x: model.apply({"params": p}, x, pieces, method=method),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    return jax.tree.map(np.asarray, run(params, jnp.asarray(x)))


def test_pieces_make_the_same_clip_as_the_whole(kind):
    model, params = kind
    z = np.random.default_rng(0).standard_normal((2, 5, 2, 3, 2)).astype(np.float32)
    clips = coded(model, params, z, "decode")
    side = model.side_factor
    assert clips.shape == (2, 9, 2 * side, 3 * side, 3)
    assert clips.std() > 0.01
    np.testing.assert_allclose(clips, coded(model, params, z, "decode", 1), atol=2e-5)
    mean, logvar = coded(model, params, clips, "encode")
    assert mean.shape == logvar.shape == z.shape
    whole = coded(model, params, clips, "encode", 1)
    np.testing.assert_allclose(mean, whole[0], atol=2e-5)
    np.testing.assert_allclose(logvar, whole[1], atol=2e-5)
    # What comes later has no effect on what was before.
    later = z + np.array([0, 0, 0, 1, 1])[:, None, None, None].astype(np.float32)
    moved = coded(model, params, later, "decode")
    np.testing.assert_array_equal(moved[:, :5], clips[:, :5])
    assert np.abs(moved[:, 5:] - clips[:, 5:]).max() > 1e-3


def test_memory_does_not_grow_with_the_clip():
    model = build_model("wan-vae", SMALL_WAN_VAE)
    params = random_params(model)

    def temporary(frames):
        z = jax.ShapeDtypeStruct((1, frames, 4, 4, 2), jnp.float32)
        run = jax.jit(lambda p, z: model.apply({"params": p}, z, method="decode"))
        return run.lower(params, z).compile().memory_analysis().temp_size_in_bytes

    frame = 2 * 8 * 8 * 3 * 4  # bytes of the frames of one latent frame: copies of the output
    short, long = temporary(9), temporary(33)
    assert long - short <= 24 * 4 * frame


def test_latents_are_scaled_by_channel():
    model = build_model("wan-vae", SMALL_WAN_VAE)
    np.testing.assert_allclose(model.scaling_factor, 1 / np.array([1.5, 2.0]), rtol=1e-6)
    np.testing.assert_allclose(model.shift_factor, [0.1, -0.2], rtol=1e-6)
    vae = qdit.Checkpoint(model, random_params(model))
    z = np.random.default_rng(0).standard_normal((1, 2, 1, 1, 2)).astype(np.float32)
    ours = np.asarray(qdit.sampling.decode(vae, jnp.asarray(z)))
    scaled = z * np.array([1.5, 2.0], np.float32) + np.array([0.1, -0.2], np.float32)
    np.testing.assert_allclose(ours, coded(model, vae.params, scaled, "decode"), atol=1e-5)


def test_what_does_not_fit_is_refused():
    model = build_model("wan-vae", SMALL_WAN_VAE)
    params = random_params(model)
    for shape, told in (
        ((1, 2, 2, 2, 3), r"T = 1 \+ 2 k"),
        ((1, 3, 3, 2, 3), "H and W divisible by 2"),
        ((1, 3, 2, 2, 4), r"\[B, T, H, W, 3\]"),
    ):
        with pytest.raises(ValueError, match=told):
            model.apply({"params": params}, jnp.zeros(shape), method="encode")
    with pytest.raises(ValueError, match=r"takes \[B, T, h, w, 2\]"):
        model.apply({"params": params}, jnp.zeros((1, 2, 2, 2, 3)), method="decode")
    wrong = WanAutoencoder(latents_mean=(0.0,))
    with pytest.raises(ValueError, match="latents_mean has 1 numbers"):
        wrong.init(jax.random.key(0), jnp.zeros((1, 5, 8, 8, 3)))
