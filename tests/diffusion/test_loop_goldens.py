"""Whole sampling loops of a converted network against recorded runs of the reference."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdit_jax import diffusion, sampling
from qdit_jax.models import build_model
from qdit_jax.ptq import quantize_params
from qdit_jax.quant import ActSpec, WeightSpec, ranges
from qdit_jax.recipes import LayerSpec, Recipe, Rule

qdit_convert = pytest.importorskip("qdit_convert")

CASES = [
    "ddim_ddim25_nocfg_clip0",
    "ddim_ddim25_cfg1.5_clip0",
    pytest.param("ddim_50_cfg1.5_clip0", marks=pytest.mark.slow),
    "ddim_20_nocfg_clip1_eta0.7",
    pytest.param("ddpm_50_nocfg_clip0", marks=pytest.mark.slow),
    "ddpm_20_cfg1.5_clip1",
]


def nhwc(x):
    return np.moveaxis(x, -3, -1)


def assert_close(ours, reference, tolerance=5e-5):
    error = np.abs(np.asarray(ours) - nhwc(reference)).max()
    assert error <= tolerance * (1 + np.abs(reference).max())


@pytest.fixture(scope="module")
def network(golden):
    read = qdit_convert.read_model(golden("dit_A.pt"), num_heads=4)
    return build_model(read.family, read.config), jax.tree.map(jnp.asarray, read.params)


def parsed(case):
    """Returns the sampler and the guidance scale (or None) of a recorded run's name."""
    kind, spacing, guidance, clip, *eta = case.split("_")
    clip = 1.0 if clip == "clip1" else None
    scale = None if guidance == "nocfg" else float(guidance.removeprefix("cfg"))
    if kind == "ddpm":
        return diffusion.ddpm(spacing, clip=clip), scale
    eta = float(eta[0].removeprefix("eta")) if eta else 0.0
    return diffusion.ddim(spacing, eta, clip=clip), scale


@pytest.mark.parametrize("case", CASES)
def test_loops_match_recorded_runs(golden, network, case):
    recorded = np.load(golden("diffusion_loops.npz"))
    assert case in json.loads(str(recorded["cases"]))
    sampler, scale = parsed(case)
    noise, label = nhwc(recorded["z"]), recorded["y"].astype(np.int32)
    denoise_fn = sampling.denoiser(*network, guidance=None)
    if scale is not None:
        denoise_fn = diffusion.guided_doubled(denoise_fn, scale)
        noise, label = np.concatenate([noise, noise]), recorded["y_cfg"].astype(np.int32)
    step_noise = nhwc(recorded[f"{case}__noise"]) if f"{case}__noise" in recorded else None
    final, step = diffusion.sample_trajectory(
        denoise_fn, sampler, jnp.asarray(noise), label, step_noise=step_noise
    )
    assert_close(final, recorded[f"{case}__final"])
    assert_close(step.x_next[recorded[f"{case}__steps"]], recorded[f"{case}__samples"])
    if f"{case}__pred_xstart" in recorded:
        assert_close(step.x0, recorded[f"{case}__pred_xstart"])
    if scale is not None and step_noise is None:  # the first half is what `guided` computes
        guided = sampling.denoiser(*network, guidance=scale)
        ours = diffusion.sample(guided, sampler, jnp.asarray(noise[:2]), label[:2])
        assert_close(ours, recorded[f"{case}__final"][:2])


def test_trajectory_holds_the_recorded_calibration_inputs(golden, network):
    recorded = np.load(golden("calibration_collect.npz"))
    sampler = diffusion.ddim(str(recorded["num_steps"]))
    denoise_fn = sampling.denoiser(*network, guidance=float(recorded["cfg_scale"]))
    noise, label = jnp.asarray(nhwc(recorded["z"])), recorded["y"].astype(np.int32)
    _, step = diffusion.sample_trajectory(denoise_fn, sampler, noise, label)
    assert_close(step.x, recorded["recorded_x"])
    np.testing.assert_array_equal(step.timestep, recorded["recorded_t"][:, 0])
    assert (recorded["recorded_y"] == label).all()
    # A calibration item is one sample at one recorded iteration.
    chosen = np.asarray(step.x)[recorded["chosen_steps"], np.arange(4)]
    assert_close(chosen, recorded["calib_x"])


@pytest.mark.parametrize("bits", [4, pytest.param(6, marks=pytest.mark.slow)])
@pytest.mark.parametrize("run", ["ddim25_nocfg", pytest.param("50_cfg1.5", marks=pytest.mark.slow)])
def test_quantized_loops_match_recorded_runs(golden, network, bits, run):
    recorded = np.load(golden("diffusion_loops_quant.npz"))
    model, params = network
    spec = LayerSpec(
        WeightSpec(bits, 32, range_fn=ranges.qdit_release),
        ActSpec(8, 32, range_fn=ranges.qdit_release),
    )
    params = quantize_params(
        params, recipe=Recipe((Rule(r"blocks_\d+/(attn/qkv|attn/proj|mlp/fc1|mlp/fc2)", spec),))
    )
    denoise_fn = sampling.denoiser(model, params, guidance=None)
    spacing, guidance = run.split("_")
    noise, label = nhwc(recorded["z"]), recorded["y"].astype(np.int32)
    if guidance != "nocfg":
        denoise_fn = diffusion.guided_doubled(denoise_fn, float(guidance.removeprefix("cfg")))
        noise, label = np.concatenate([noise, noise]), recorded["y_cfg"].astype(np.int32)
    final, step = diffusion.sample_trajectory(
        denoise_fn, diffusion.ddim(spacing), jnp.asarray(noise), label
    )

    def relative_error(ours, name):
        reference = nhwc(recorded[f"w{bits}a8_g32_{run}__{name}"])
        return np.linalg.norm(np.asarray(ours) - reference) / np.linalg.norm(reference)

    # Rounding flips: the reference moves by `jitter` when its own input moves by 1e-6.
    jitter = float(recorded[f"w{bits}a8_g32_{run}__jitter_rel_l2"])
    assert relative_error(step.x_next[0], "first_step") < jitter
    assert relative_error(final, "final") < 3 * jitter
    assert relative_error(final, "fp_final") > 3 * relative_error(final, "final")
