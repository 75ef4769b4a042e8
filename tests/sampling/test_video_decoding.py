"""An autoencoder of images decodes videos frame by frame."""

import jax
import jax.numpy as jnp
import numpy as np
from tiny_models import tiny_vae

from qdit_jax.sampling.decoding import _decoded, decode

VAE = tiny_vae()


def latents_of(frames):
    x = np.random.default_rng(0).standard_normal((2, frames, 4, 6, 4))
    return jnp.asarray(x, jnp.float32)


def test_a_video_is_its_frames():
    latents = latents_of(5)
    video = decode(VAE, latents)
    assert video.shape == (2, 5, 8, 12, 3)
    for i in range(5):
        np.testing.assert_allclose(video[:, i], decode(VAE, latents[:, i]), atol=1e-5)
    assert np.abs(video[:, 0] - video[:, 1]).max() > 1e-3


def test_the_frames_of_a_video_are_not_decoded_all_at_once():
    def memory(*shape):
        latents = jax.ShapeDtypeStruct(shape, jnp.float32)
        lowered = _decoded.lower(VAE.model, VAE.params, latents)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert memory(2, 32, 4, 6, 4) < memory(64, 4, 6, 4) / 3
