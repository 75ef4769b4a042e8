"""Sana, Z-Image and FLUX.2 against diffusers' own classes, of small random networks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qdit_convert import convert

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.slow

SANA = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 12,
    "cross_attention_dim": 24,
    "caption_channels": 10,
    "sample_size": 4,
}
NORMED = {"qk_norm": "rms_norm_across_heads"}
SANAS = {
    "plain": SANA,
    "other widths": SANA | {"cross_attention_head_dim": 7, "mlp_ratio": 1.7, "norm_eps": 1e-3},
    "sprint": SANA | NORMED | {"guidance_embeds": True, "timestep_scale": 1000.0},
    "positions": SANA | {"interpolation_scale": 2, "patch_size": 2, "attention_bias": True},
    "variance": SANA | NORMED | {"out_channels": 8, "attention_bias": True},
}
Z_IMAGE = {
    "in_channels": 4,
    "dim": 48,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 10,
    "axes_dims": [8, 8, 8],
    "axes_lens": [128, 32, 32],
}
Z_IMAGES = {
    "plain": Z_IMAGE,
    "no norms": Z_IMAGE | {"qk_norm": False, "norm_eps": 1e-2, "t_scale": 300.0},
    "wide": Z_IMAGE | {"dim": 288, "n_heads": 3, "axes_dims": [32, 48, 16], "rope_theta": 10000.0},
    "deep": Z_IMAGE | {"n_refiner_layers": 2, "n_layers": 3, "axes_dims": [4, 12, 8]},
}
FLUX2 = {
    "in_channels": 12,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 10,
    "axes_dims_rope": (4, 4, 4, 4),
    "guidance_embeds": False,
}
FLUX2S = {
    "klein": FLUX2,
    "dev": FLUX2 | {"guidance_embeds": True},
    "others": FLUX2
    | {
        "mlp_ratio": 1.7,
        "axes_dims_rope": (2, 4, 8, 2),
        "rope_theta": 10000,
        "eps": 1e-2,
        "timestep_guidance_channels": 64,
        "num_layers": 1,
        "num_single_layers": 3,
    },
}


def made(cls, config, seed=0):
    """Returns a network whose every parameter matters."""
    torch.manual_seed(seed)
    model = cls(**config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = (
                0.3 if parameter.ndim < 2 or "table" in name else 1.2 * parameter.shape[-1] ** -0.5
            )
            drawn = scale * torch.randn_like(parameter)
            parameter.copy_(1 + drawn if parameter.ndim == 1 and "norm" in name else drawn)
    return model


def converted(model, folder, **options):
    model.save_pretrained(folder)
    return convert(folder, **options)


def numbers(*shape, seed=1):
    return torch.tensor(np.random.default_rng(seed).standard_normal(shape), dtype=torch.float32)


def assert_close(checkpoint, x, timestep, condition, expected):
    """Compares NCHW arrays."""
    given = {name: jnp.asarray(entry.numpy()) for name, entry in condition.items()}
    checkpoint.model.check_condition(given)
    run = jax.jit(lambda *a: checkpoint.model.apply({"params": checkpoint.params}, *a))
    found = run(jnp.asarray(x.numpy().transpose(0, 2, 3, 1)), jnp.asarray(timestep.numpy()), given)
    found, expected = np.asarray(found).transpose(0, 3, 1, 2), expected.numpy()
    assert found.shape == expected.shape
    assert expected.std() > 0.01
    assert np.abs(found - expected).max() <= 3e-5 * (1 + np.abs(expected).max())


MASK = torch.tensor([[True] * 5, [True] * 2 + [False] * 3, [True, False, True, True, False]])
TIMES = torch.tensor([999.0, 421.0, 3.0])


@pytest.mark.parametrize("name", SANAS)
@pytest.mark.parametrize("size", [(4, 4), (6, 2)])
def test_sana(tmp_path, name, size):
    config = SANAS[name]
    model = made(diffusers.SanaTransformer2DModel, config)
    checkpoint = converted(model, tmp_path)
    x, text = numbers(3, 4, *size), numbers(3, 5, 10, seed=2)
    condition = {"text": text}
    guidance = torch.tensor([0.1, 0.45, 2.0]) if config.get("guidance_embeds") else None
    if guidance is not None:
        condition["guidance"] = guidance
    for mask in (None, MASK):
        with torch.no_grad():
            out = model(x, text, TIMES, guidance=guidance, encoder_attention_mask=mask).sample
        given = condition if mask is None else condition | {"text_mask": mask}
        assert_close(checkpoint, x, TIMES, given, out[:, :4])


def test_the_authors_file_of_sana(tmp_path):
    from diffusers.loaders.single_file_utils import convert_sana_transformer_to_diffusers

    from qdit_convert.sana import AS_AUTHORS, in_original, leaves_of

    sizes = AS_AUTHORS.__class__(**{**vars(AS_AUTHORS), "qk_norm": False})
    rng = np.random.default_rng(0)
    arrays = {
        key: (0.2 * rng.standard_normal(leaf.expected[key][0])).astype(np.float32)
        for leaf in leaves_of(sizes, in_original)
        for key in leaf.sources
    }
    extra = {"pos_embed": np.zeros((1, 16, 32), np.float32)}
    extra["y_embedder.y_embedding"] = np.zeros((5, 10), np.float32)
    save_file(arrays | extra, tmp_path / "sana.safetensors")
    theirs = {key: torch.tensor(value) for key, value in (arrays | extra).items()}
    model = diffusers.SanaTransformer2DModel(
        **SANA
        | {
            "num_attention_heads": 1,
            "attention_head_dim": 32,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 32,
            "mlp_ratio": 60 / 32,
        }
    )
    model.load_state_dict(convert_sana_transformer_to_diffusers(theirs))
    checkpoint = convert(tmp_path / "sana.safetensors", num_heads=2)
    x, text = numbers(3, 4, 4, 4), numbers(3, 5, 10, seed=2)
    with torch.no_grad():
        out = model.eval()(x, text, TIMES).sample
    assert_close(checkpoint, x, TIMES, {"text": text}, out)


@pytest.mark.parametrize("name", Z_IMAGES)
@pytest.mark.parametrize(("size", "length"), [((4, 4), 5), ((14, 10), 33), ((8, 16), 40)])
def test_z_image(tmp_path, name, size, length):
    model = made(diffusers.ZImageTransformer2DModel, Z_IMAGES[name])
    checkpoint = converted(model, tmp_path)
    x, text = numbers(3, 4, *size), numbers(3, length, 10, seed=2)
    times = torch.tensor([0.0, 0.43, 0.99])
    mask = torch.zeros(3, length, dtype=torch.bool)
    mask[0], mask[1, :3], mask[2, ::2] = True, True, True  # all, some, and with gaps
    images = list(x[:, :, None])
    with torch.no_grad():
        out = torch.stack(model(images, times, list(text)).sample)[:, :, 0]
    assert_close(checkpoint, x, times, {"text": text}, out)
    with torch.no_grad():
        given = [t[m] for t, m in zip(text, mask, strict=True)]
        out = torch.stack(model(images, times, given).sample)[:, :, 0]
    assert_close(checkpoint, x, times, {"text": text, "text_mask": mask}, out)


def test_the_authors_file_of_z_image(tmp_path):
    from diffusers.loaders.single_file_utils import (
        convert_z_image_transformer_checkpoint_to_diffusers as renamed,
    )

    from qdit_convert.z_image import SMALL, in_original, leaves_of

    rng = np.random.default_rng(0)
    arrays = {
        key: (0.2 * rng.standard_normal(leaf.expected[key][0])).astype(np.float32)
        for leaf in leaves_of(SMALL, in_original)
        for key in leaf.sources
    }
    arrays["norm_final.weight"] = np.ones(24, np.float32)
    arrays = {f"model.diffusion_model.{key}": value for key, value in arrays.items()}
    save_file(arrays, tmp_path / "z.safetensors")
    theirs = renamed({key: torch.tensor(value) for key, value in arrays.items()})
    save_file({k: v.numpy().copy() for k, v in theirs.items()}, tmp_path / "renamed.safetensors")
    one = convert(tmp_path / "z.safetensors", rope_axes=(4, 4, 4))
    other = convert(tmp_path / "renamed.safetensors", rope_axes=(4, 4, 4))
    assert one.metadata["layout"] != other.metadata["layout"]
    assert one.model == other.model
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


@pytest.mark.parametrize("name", FLUX2S)
@pytest.mark.parametrize("size", [(4, 4), (3, 5)])
def test_flux2(tmp_path, name, size):
    config = FLUX2S[name]
    model = made(diffusers.Flux2Transformer2DModel, config)
    checkpoint = converted(model, tmp_path)
    x, text = numbers(3, 12, *size), numbers(3, 7, 10, seed=2)
    times = torch.tensor([1.0, 0.43, 0.01])
    condition = {"text": text}
    guidance = torch.tensor([1.0, 4.0, 2.5]) if config["guidance_embeds"] else None
    if guidance is not None:
        condition["guidance"] = guidance
    pipeline = diffusers.Flux2KleinPipeline
    for moved in (0, 3):
        image_ids = pipeline._prepare_latent_ids(x).float() + moved
        text_ids = pipeline._prepare_text_ids(text).float() + moved
        with torch.no_grad():
            out = model(
                x.flatten(2).transpose(1, 2),
                text,
                times,
                image_ids,
                text_ids,
                guidance=guidance,
            ).sample
        out = out.transpose(1, 2).reshape(x.shape)
        ids = {"position_ids": image_ids, "text_ids": text_ids} if moved else {}
        assert_close(checkpoint, x, times, condition | ids, out)


def test_the_authors_file_of_flux2(tmp_path):
    from diffusers.loaders.single_file_utils import (
        convert_flux2_transformer_checkpoint_to_diffusers as renamed,
    )

    from qdit_convert.flux import in_original
    from qdit_convert.flux2 import SMALL, leaves_of

    rng = np.random.default_rng(0)
    arrays = {
        key: (0.2 * rng.standard_normal(leaf.expected[key][0])).astype(np.float32)
        for leaf in leaves_of(SMALL, in_original)
        for key in leaf.sources
    }
    save_file(arrays, tmp_path / "flux2.safetensors")
    theirs = renamed({key: torch.tensor(value) for key, value in arrays.items()})
    save_file({k: v.numpy().copy() for k, v in theirs.items()}, tmp_path / "renamed.safetensors")
    assert len(load_file(tmp_path / "renamed.safetensors")) > len(arrays)
    one = convert(tmp_path / "flux2.safetensors", rope_axes=(2, 2, 2, 2))
    other = convert(tmp_path / "renamed.safetensors", rope_axes=(2, 2, 2, 2))
    assert one.model == other.model
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 14, 20])
def test_the_solver_of_sanas_scheduler(shift, steps):
    from qdit_jax import diffusion

    settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    theirs = diffusers.DPMSolverMultistepScheduler(**settings)
    theirs.set_timesteps(steps)
    x = noise = numbers(2, 4, 4, 3)
    for timestep in theirs.timesteps:
        x = theirs.step(0.7 * torch.tanh(x) + 1e-3 * timestep, timestep, x).prev_sample
    scheduler = diffusion.read_scheduler({"_class_name": type(theirs).__name__} | settings)
    assert scheduler.sampler == "flow-dpm-solver++"
    sampler = diffusion.scheduler_sampler(
        scheduler, steps, flow_times=(1000.0, 0.0), velocity_to="noise"
    )
    np.testing.assert_array_equal(sampler.table.timestep, theirs.timesteps.numpy())

    def denoise_fn(x, timestep, condition):
        return 0.7 * jnp.tanh(x) + 1e-3 * timestep[:, None, None, None]

    found = diffusion.sample(denoise_fn, sampler, jnp.asarray(noise.numpy()), None)
    np.testing.assert_allclose(found, x.numpy(), atol=1e-5)
