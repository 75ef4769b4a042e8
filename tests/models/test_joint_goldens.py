"""SD3 and FLUX against recorded runs of diffusers and of the authors' code, from file to output."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qdit_jax as qdit
from qdit_convert import convert
from qdit_jax import diffusion
from qdit_jax.models import abstract_params
from qdit_jax.sampling import checkpoint_sampler

FOLDER = "families/"
AUTHORS = {
    "sd3/sd35_original_layout": ("sd3.5_medium.safetensors", {"num_heads": 4}),
    "flux/dev_bfl_original_bf16": ("flux1-dev.safetensors", {"rope_axes": (2, 6, 6)}),
}
SD3 = ("sd3/small_diffusers_bf16", "sd3/sd3_medium", "sd3/sd35_medium_bf16")
FLUX = ("flux/schnell_diffusers_bf16", "flux/dev_diffusers", "flux/dev_bfl_original_bf16")
CASES = (*SD3, *FLUX, "sd3/sd35_original_layout", "eps_probe/sd35", "eps_probe/flux")


@pytest.fixture(scope="module")
def converted(golden):
    found = {}

    def read(case):
        if case not in found:
            file, options = AUTHORS.get(case, ("", {}))
            folder = golden(FOLDER + case)
            source = folder / file if file else folder
            found[case] = convert(source, dtype=None, **options), folder
        return found[case]

    return read


def nhwc(x):
    return jnp.asarray(np.moveaxis(x, -3, -1))


def unpacked(tokens, shape):
    """Returns NCHW latents of FLUX's tokens `[..., N, 4C]`, which hold (channel, row, column)."""
    channels, rows, columns = shape
    found = tokens.reshape(*tokens.shape[:-2], rows // 2, columns // 2, channels, 2, 2)
    found = np.moveaxis(found, -3, -5)  # [..., C, rows, columns, 2, 2]
    return np.moveaxis(found, -2, -3).reshape(*tokens.shape[:-2], channels, rows, columns)


def condition_of(arrays, **more):
    names = ("text", "pooled", "guidance", "null_text", "null_pooled")
    return {n: jnp.asarray(arrays[n]) for n in names if n in arrays} | more


def assert_close(ours, reference, tolerance):
    reference = np.asarray(nhwc(reference))
    assert ours.shape == reference.shape
    error = np.abs(np.asarray(ours) - reference).max()
    assert error <= tolerance * (1 + np.abs(reference).max())


def applied(checkpoint):
    return jax.jit(lambda *a: checkpoint.model.apply({"params": checkpoint.params}, *a))


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_the_originals(converted, case):
    checkpoint, folder = converted(case)
    arrays = np.load(folder / "io.npz")
    x = arrays["latent" if "latent" in arrays else "x"]
    out = arrays["out"] if "latent" not in arrays else unpacked(arrays["out"], x.shape[1:])
    condition = condition_of(arrays)
    checkpoint.model.check_condition(condition)
    found = applied(checkpoint)(nhwc(x), jnp.asarray(arrays["t"]), condition)
    assert_close(found, out, 3e-5)


@pytest.mark.parametrize("case", FLUX)
def test_positions_may_be_given(converted, case):
    checkpoint, folder = converted(case)
    arrays = np.load(folder / "io.npz")
    x, count = arrays["latent"], len(arrays["t"])
    ids = np.broadcast_to(arrays["img_ids"], (count, *arrays["img_ids"].shape[-2:]))
    condition = condition_of(arrays, position_ids=jnp.asarray(ids))
    checkpoint.model.check_condition(condition)
    out = unpacked(arrays["out"], x.shape[1:])
    apply = applied(checkpoint)
    assert_close(apply(nhwc(x), jnp.asarray(arrays["t"]), condition), out, 3e-5)
    moved = condition | {"position_ids": condition["position_ids"] * 2}
    text = np.zeros((count, arrays["text"].shape[1], 3), np.float32)
    for other in (moved, condition | {"text_ids": jnp.asarray(text + 3)}):
        checkpoint.model.check_condition(other)
        found = np.asarray(apply(nhwc(x), jnp.asarray(arrays["t"]), other))
        assert np.abs(found - nhwc(out)).max() > 1e-2


@pytest.mark.parametrize("case", [*SD3, *FLUX])
def test_loops_of_the_published_samplers(converted, case):
    checkpoint, folder = converted(case)
    loop = np.load(folder / "loop.npz")
    noise, is_flux = loop["noise"], case.startswith("flux")
    last = loop["latents"][-1]
    last = unpacked(last, noise.shape[1:]) if is_flux else last
    more = {"guidance": jnp.array([3.5])} if "dev" in case else {}
    sampler = checkpoint_sampler(checkpoint, len(loop["latents"]), shape=nhwc(noise).shape[1:])
    unit = checkpoint.model.flow_times[0]
    sigmas = loop["sigmas" if "sigmas" in loop else "schedule"]
    # The authors round mu's slope otherwise.
    np.testing.assert_allclose(sampler.table.timestep, unit * sigmas[:-1], rtol=5e-4)
    if "schedule" in loop:
        sampler = diffusion.flow_euler(
            len(sigmas) - 1, sigmas=sigmas, flow_times=(1.0, 0.0), velocity_to="noise"
        )
    guidance = None if is_flux else 5.0
    denoise_fn = qdit.denoiser(checkpoint.model, checkpoint.params, guidance=guidance)
    found = diffusion.sample(denoise_fn, sampler, nhwc(noise), condition_of(loop, **more))
    assert_close(found, last, 1e-4)


@pytest.mark.parametrize("case", ["sd3/small_diffusers_bf16", "flux/schnell_diffusers_bf16"])
def test_sixteen_bits_stay_as_they_are_and_no_leaf_is_larger_than_its_layer(converted, case):
    checkpoint, _ = converted(case)
    wanted = abstract_params(checkpoint.model)
    for path, leaf in jax.tree_util.tree_leaves_with_path(checkpoint.params):
        name = "/".join(entry.key for entry in path)
        assert leaf.dtype == jnp.bfloat16
        assert leaf.shape == wanted[name].shape
