"""From weights on disk to images: the same noise gives what the original samplers give."""

from __future__ import annotations

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_samples import CLASSES, dit_shapes, random_arrays

from qdit_convert import convert
from qdit_jax import diffusion, sampling
from qdit_jax.checkpoint import load


def nhwc(tensor):
    return jnp.asarray(tensor.detach().numpy().transpose(0, 2, 3, 1))


@pytest.fixture
def torch():
    module = pytest.importorskip("torch")
    module.manual_seed(2)
    return module


def pipeline(diffusers, torch, sample_size):
    """Returns a pipeline of DiT-XL/2's layout and settings, small and random."""
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=sample_size,
        patch_size=2,
        num_embeds_ada_norm=1000,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_zero",
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        scaling_factor=0.18215,
    )
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        embedder = transformer.transformer_blocks[0].norm1.emb.state_dict()
        for block in transformer.transformer_blocks:  # one embedder, as in every trained file
            block.norm1.emb.load_state_dict(embedder)
    # The scheduler of the published pipelines.
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=0,
    )
    made = diffusers.DiTPipeline(transformer.eval(), vae.eval(), scheduler)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sample_size", "guidance", "safe"), [(8, 4.0, True), (16, 1.5, False), (8, 1.0, True)]
)
def test_images_of_a_diffusers_pipeline(tmp_path, torch, sample_size, guidance, safe):
    diffusers = pytest.importorskip("diffusers")
    original = pipeline(diffusers, torch, sample_size)
    original.save_pretrained(tmp_path / "pipeline", safe_serialization=safe)
    labels, steps = [1, 207, 999], 8
    expected = original(
        class_labels=labels,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(3),
        num_inference_steps=steps,
        output_type="np",
    ).images

    convert(tmp_path / "pipeline", tmp_path / "ours")
    checkpoint = load(tmp_path / "ours")
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn((3, 4, sample_size, sample_size), generator=generator)
    denoise_fn = sampling.denoiser(
        checkpoint.model, checkpoint.params, guidance, guidance_channels=None
    )
    scheduler = diffusion.read_scheduler(checkpoint.metadata["scheduler"])
    sampler = diffusion.ddim(f"ddim{steps}", schedule=diffusion.scheduler_process(scheduler))
    latents = diffusion.sample(denoise_fn, sampler, nhwc(noise), jnp.asarray(labels))
    images = np.asarray(sampling.decode(checkpoint.vae, latents))
    found = np.clip(images / 2 + 0.5, 0, 1)
    assert found.shape == expected.shape == (3, 8 * sample_size, 8 * sample_size, 3)
    assert expected.std() > 0.02
    assert ((expected > 0) & (expected < 1)).mean() > 0.5
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert np.abs(found - expected).mean() < 1e-4


def published_euler(apply, noise, label, null_label, num_points, guidance):
    """Returns the samples of SiT's fixed-grid Euler rule, in its own convention.

    Noise at time 0, data at time 1, `num_points` points of time with the ends; both halves of a
    doubled batch are sampled, and of the velocity the first three channels are guided.
    """
    x = np.concatenate([noise, noise]).astype(np.float64)
    label = np.concatenate([label, np.full_like(label, null_label)])
    times = np.linspace(0, 1, num_points)
    for now, following in pairwise(times):
        half = x[: len(noise)]
        velocity = apply(np.concatenate([half, half]), np.full(len(x), now), label)
        eps, rest = velocity[..., :3], velocity[..., 3:]
        cond, null = np.split(eps, 2)
        guided = null + guidance * (cond - null)
        velocity = np.concatenate([np.concatenate([guided, guided]), rest], axis=-1)
        x = x + (following - now) * velocity
    return x[: len(noise)]


@pytest.mark.slow
def test_latents_of_sit_follow_the_published_euler_rule(tmp_path, pt):
    arrays = random_arrays(dit_shapes(), seed=4)
    convert(pt({"ema": arrays}), tmp_path / "ours", family="sit", num_heads=2)
    checkpoint = load(tmp_path / "ours")
    model, params = checkpoint.model, checkpoint.params
    assert model.velocity
    noise = np.random.default_rng(0).standard_normal((3, *model.sample_shape()))
    label = np.array([0, CLASSES - 1, 1])
    run = jax.jit(lambda x, t, y: model.apply({"params": params}, x, t, y))

    def apply(x, t, y):
        given = jnp.asarray(x, jnp.float32), jnp.asarray(t, jnp.float32), jnp.asarray(y)
        return np.asarray(run(*given), np.float64)

    expected = published_euler(apply, noise, label, CLASSES, num_points=7, guidance=4.0)
    denoise_fn = sampling.denoiser(model, params, 4.0)
    found = diffusion.sample(
        denoise_fn, diffusion.flow(6), jnp.asarray(noise, jnp.float32), jnp.asarray(label)
    )
    assert np.abs(expected - noise).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4)
