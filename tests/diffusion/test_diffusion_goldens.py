"""Schedules and single steps against recorded reference values."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdit_jax import diffusion
from qdit_jax.diffusion import Schedule, cosine_betas, linear_betas, respaced

COEFFICIENTS = [
    "timestep_map",
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "alphas_cumprod_next",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
]


def nhwc(x):
    return np.moveaxis(x, -3, -1)


def assert_close(ours, reference, tolerance=1e-5):
    reference = nhwc(reference)
    error = np.abs(np.asarray(ours) - reference).max()
    assert error <= tolerance * (1 + np.abs(reference).max())


def test_schedules_match_recorded_values(golden):
    recorded = np.load(golden("diffusion_schedules.npz"))
    full = Schedule(linear_betas())
    np.testing.assert_allclose(full.betas, recorded["full1000__betas"], rtol=1e-12)
    for name in json.loads(str(recorded["names"])):
        schedule = respaced(full, name.removeprefix("full"))
        found = [c for c in COEFFICIENTS if f"{name}__{c}" in recorded]
        assert len(found) >= 3
        for coefficient in found:
            np.testing.assert_allclose(
                getattr(schedule, coefficient), recorded[f"{name}__{coefficient}"], rtol=1e-13
            )
    np.testing.assert_allclose(cosine_betas(), recorded["cosine_full1000__betas"], rtol=1e-12)


def rows_at(sampler, indices, *, backwards=True):
    """Returns the sampler's rows for one index of the respaced schedule a sample."""
    num_steps = len(sampler.table.timestep)
    positions = num_steps - 1 - indices if backwards else indices
    return jax.tree.map(lambda values: values[positions], sampler.table)


def stepped(sampler, x, output, rows, noise):
    """Returns one step in which every sample has its own row."""

    def one(x, output, row, noise):
        return sampler.step(lambda *_: output[None], x[None], None, row, noise[None])

    step = jax.vmap(one)(x, output, rows, noise)
    return step._replace(x_next=step.x_next[:, 0])


def moments(sampler, x, output, rows):
    """Returns mean, log variance and x_0 where every sample has its own row."""

    def one(x, output, row):
        return [part[0] for part in sampler.moments(x[None], output[None], row)]

    return jax.vmap(one)(x, output, rows)


STEP_CASES = ["50_t49", "50_t30", "50_t1", "50_t0", "ddim25_t24", "ddim25_t7", "ddim25_t0"]
STEP_CASES += ["250_t249", "250_t111", "250_t3"]


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("case", STEP_CASES)
def test_steps_match_recorded_values(golden, case, clip):
    recorded = np.load(golden("diffusion_steps.npz"))
    spacing, indices = case.split("_")[0], recorded[f"{case}__t_index"]
    x, output = nhwc(recorded["x"]), nhwc(recorded[f"{case}__model_output"])
    prefix = f"{case}_clip{0 if clip is None else 1}__"

    def check(sampler, name, noise=None, *, backwards=True):
        noise = np.zeros_like(x) if noise is None else noise
        rows = rows_at(sampler, indices, backwards=backwards)
        assert (rows.timestep == recorded[f"{case}__t_model"]).all()
        assert_close(stepped(sampler, x, output, rows, noise).x_next, recorded[prefix + name])

    ancestral = diffusion.ddpm(spacing, clip=clip)
    mean, log_variance, x0 = moments(ancestral, x, output, rows_at(ancestral, indices))
    assert_close(mean, recorded[prefix + "mean"])
    assert_close(log_variance, recorded[prefix + "log_variance"])
    assert_close(np.exp(log_variance), recorded[prefix + "variance"])
    assert_close(x0, recorded[prefix + "pred_xstart"])
    check(diffusion.ddim(spacing, clip=clip), "ddim_eta0.0_sample")
    if clip is None:
        for eta in [0.6, 1.0]:
            noise = nhwc(recorded[f"{prefix}ddim_eta{eta}_noise"])
            check(diffusion.ddim(spacing, eta), f"ddim_eta{eta}_sample", noise)
        check(ancestral, "ddpm_sample", nhwc(recorded[prefix + "ddpm_noise"]))
        check(diffusion.reverse_ddim(spacing), "ddim_reverse_sample", backwards=False)


@pytest.mark.parametrize(
    ("name", "predict_fn", "variance_fn"),
    [
        ("fixed_large", diffusion.eps_prediction, diffusion.fixed_large),
        ("fixed_small", diffusion.eps_prediction, diffusion.fixed_small),
        ("xstart_fixed_large", diffusion.x0_prediction, diffusion.fixed_large),
    ],
)
def test_other_parametrizations_match_recorded_values(golden, name, predict_fn, variance_fn):
    recorded = np.load(golden("diffusion_steps.npz"))
    sampler = diffusion.ddpm("50", predict_fn=predict_fn, variance_fn=variance_fn)
    rows = rows_at(sampler, recorded["alt_t_index"])
    output, x = nhwc(recorded["alt_model_output"]), nhwc(recorded["x"])
    mean, log_variance, x0 = moments(sampler, x, output, rows)
    assert_close(mean, recorded[f"alt_{name}__mean"])
    assert_close(log_variance, recorded[f"alt_{name}__log_variance"])
    drawn = recorded["alt_t_index"] > 0  # the recorded variance of the last step may be 0
    assert_close(np.exp(log_variance)[drawn], recorded[f"alt_{name}__variance"][drawn])
    assert_close(x0, recorded[f"alt_{name}__pred_xstart"])


def test_forward_noising_matches_recorded_values(golden):
    recorded = np.load(golden("diffusion_steps.npz"))
    out = diffusion.noised(
        respaced(Schedule(linear_betas()), "50"),
        jnp.asarray(nhwc(recorded["x"])),
        jnp.asarray(recorded["q_sample_t"]),
        jnp.asarray(nhwc(recorded["q_sample_noise"])),
    )
    assert_close(out, recorded["q_sample_out"])
