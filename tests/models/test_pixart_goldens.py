"""PixArt against recorded runs of diffusers and of the authors' code, from the file to the output."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qdit_jax as qdit
from qdit_convert import convert
from qdit_jax import diffusion

FOLDER = "families/pixart/"
AUTHORS = {
    "alpha_original_pth": (
        "PixArt-XL-2-512x512.pth",
        {"num_heads": 4, "interpolation_scale": 1.0},
    ),
    "sigma_original_pth_fp16": (
        "PixArt-Sigma-XL-2-1024-MS.pth",
        {"num_heads": 8, "input_size": 16, "interpolation_scale": 2.0},
    ),
}
DIFFUSERS = ("alpha_diffusers_1024ms", "sigma_diffusers_bf16")
CASES = (*AUTHORS, *DIFFUSERS, "alpha_small_diffusers")
DDIM = {
    "_class_name": "DDIMScheduler",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def nhwc(x):
    return jnp.asarray(np.moveaxis(x, -3, -1))


def assert_close(ours, reference, tolerance=3e-5):
    reference = nhwc(reference)
    assert ours.shape == reference.shape
    error = np.abs(np.asarray(ours) - reference).max()
    assert error <= tolerance * (1 + np.abs(reference).max())


@pytest.fixture(scope="module")
def converted(golden):
    found = {}

    def read(case):
        if case not in found:
            file, options = AUTHORS.get(case, ("", {}))
            folder = golden(FOLDER + case)
            found[case] = convert(folder / file if file else folder, **options), folder
        return found[case]

    return read


def condition_of(arrays):
    """Returns the condition of a recorded call under the names of ours."""
    text = arrays["text"] if "text" in arrays else arrays["y"][:, 0]
    mask = arrays["text_mask"] if "text_mask" in arrays else arrays["mask"]
    found = {"text": jnp.asarray(text), "text_mask": jnp.asarray(mask == 1)}
    for theirs, ours in (("resolution", "size"), ("aspect_ratio", "aspect_ratio")):
        if theirs in arrays:
            found[ours] = jnp.asarray(arrays[theirs])
    return found


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_the_originals(converted, case):
    checkpoint, folder = converted(case)
    arrays = np.load(folder / "io.npz")
    apply = jax.jit(lambda *a: checkpoint.model.apply({"params": checkpoint.params}, *a))
    x, timestep, condition = nhwc(arrays["x"]), jnp.asarray(arrays["t"]), condition_of(arrays)
    checkpoint.model.check_condition(condition)
    assert_close(apply(x, timestep, condition), arrays["out"])
    every = {name: entry for name, entry in condition.items() if name != "text_mask"}
    assert_close(apply(x, timestep, every), arrays["out_nomask"])
    assert ("out_null" in arrays) == checkpoint.model.null_caption
    if checkpoint.model.null_caption:
        null = checkpoint.model.null_condition(condition, checkpoint.params)
        assert null["text_mask"] is condition["text_mask"]
        assert_close(apply(x, timestep, null), arrays["out_null"])


def sampled(checkpoint, sampler, noise, condition):
    denoise_fn = qdit.denoiser(checkpoint.model, checkpoint.params, guidance=4.5)
    return diffusion.sample(denoise_fn, sampler, nhwc(noise), condition)


@pytest.mark.parametrize("solver", ["dpm", "ddim"])
@pytest.mark.parametrize("case", DIFFUSERS)
def test_loops_of_diffusers(converted, case, solver):
    checkpoint, folder = converted(case)
    loop = np.load(folder / "loop.npz")
    condition = condition_of(loop)
    condition["null_text"] = jnp.asarray(loop["null_text"])
    condition["null_text_mask"] = jnp.asarray(loop["null_mask"] == 1)
    if checkpoint.model.size_conditions:
        rows, columns = loop["noise"].shape[-2:]
        condition["size"] = jnp.array([[8.0 * rows, 8.0 * columns]])
        condition["aspect_ratio"] = jnp.array([[rows / columns]])
    sampler = diffusion.dpm_solver_pp(5) if solver == "dpm" else diffusers_ddim(5)
    visited = np.asarray(sampler.table.timestep)
    assert sorted(visited.tolist()) == sorted(loop[f"{solver}_timesteps"].tolist())
    out = sampled(checkpoint, sampler, loop["noise"], condition)
    assert_close(out, loop[f"{solver}_latents"][-1], 1e-4)


def diffusers_ddim(steps):
    return diffusion.scheduler_sampler(diffusion.read_scheduler(DDIM), steps)


@pytest.mark.parametrize("case", AUTHORS)
def test_loops_of_the_authors(converted, case):
    checkpoint, folder = converted(case)
    loop = np.load(folder / "loop.npz")
    sampler = diffusion.dpm_solver_pp(5, spacing="continuous")
    np.testing.assert_allclose(sampler.table.timestep, loop["model_t"][:, 0], atol=1e-3)
    out = sampled(checkpoint, sampler, loop["noise"], condition_of(loop))
    assert_close(out, loop["sample"], 1e-4)
