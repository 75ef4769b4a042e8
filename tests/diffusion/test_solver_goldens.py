"""Solvers of the text-to-image and video families against recorded steps, no network involved."""

from __future__ import annotations

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdit_jax import diffusion
from qdit_jax.diffusion import read_scheduler, scheduler_sampler
from qdit_jax.errors import UserError

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
SD3 = {"flow_times": (1000.0, 0.0), "velocity_to": "noise"}
FLUX = {"flow_times": (1.0, 0.0), "velocity_to": "noise"}
EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
UNIPC = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
}


@pytest.fixture(scope="module")
def recorded():
    return dict(np.load(GOLDENS / "schedules.npz"))


@pytest.fixture(scope="module")
def loops():
    return dict(np.load(GOLDENS / "solver_loops.npz"))


def states_in_turn(sampler, outputs, x):
    """Returns `x` after every step of a network that returns `outputs`, whatever it is given."""
    found, x = [], jnp.asarray(x)
    state = diffusion.initial_state(sampler, x)
    for i, output in enumerate(outputs):
        row = jax.tree.map(lambda a, i=i: a[i], sampler.table)
        step = diffusion.take_step(
            sampler, lambda *_, output=output: jnp.asarray(output), x, state, None, row, None
        )
        x, state = step.x_next, step.state
        found.append(np.asarray(x))
    return np.stack(found)


def assert_recorded(sampler, recorded, name):
    timesteps = recorded[f"{name}_timesteps"]
    if np.issubdtype(timesteps.dtype, np.integer):
        np.testing.assert_array_equal(sampler.table.timestep, timesteps)
    else:
        np.testing.assert_allclose(sampler.table.timestep, timesteps, atol=1e-4)
    if f"{name}_samples" in recorded:
        expected = recorded[f"{name}_samples"]
        found = states_in_turn(sampler, recorded["model_outputs"][: len(expected)], recorded["x"])
        np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize(("steps", "shift"), [(5, 3), (28, 3), (1, 3), (50, 1)])
def test_flow_euler_over_shifted_noise_levels(recorded, steps, shift):
    name = f"flow_euler_n{steps}_shift{shift}"
    sigmas = diffusion.flow_match_sigmas(steps, shift=shift)
    np.testing.assert_allclose(sigmas, recorded[f"{name}_sigmas"], atol=2e-7)
    ours = diffusion.flow_euler(steps, shift=shift, spacing="trained", **SD3)
    theirs = scheduler_sampler(read_scheduler(EULER | {"shift": shift}), steps, **SD3)
    given = diffusion.flow_euler(steps, sigmas=sigmas, **SD3)
    for sampler in (ours, theirs, given):
        assert_recorded(sampler, recorded, name)


@pytest.mark.parametrize(("steps", "tokens"), [(5, 24), (28, 4096), (20, 1024)])
def test_flow_euler_with_a_shift_by_the_number_of_tokens(recorded, steps, tokens):
    name = f"flow_flux_n{steps}_tokens{tokens}"
    shift = diffusion.dynamic_shift(tokens)
    assert np.log(shift) == pytest.approx(float(recorded[f"{name}_mu"]), abs=1e-12)
    config = EULER | {"use_dynamic_shifting": True, "shift": 3.0}  # the shift is not read
    scheduler = read_scheduler(config)
    assert "shift by the number of image tokens" in diffusion.sampling_text(scheduler)
    for sampler in (
        diffusion.flow_euler(steps, shift=shift, **FLUX),
        scheduler_sampler(scheduler, steps, num_tokens=tokens, **FLUX),
        scheduler_sampler(scheduler, steps, shift=shift, **FLUX),
    ):
        sigmas = recorded[f"{name}_sigmas"]
        np.testing.assert_allclose(sampler.table.timestep, sigmas[:-1], atol=2e-7)
    with pytest.raises(UserError, match=r"use_dynamic_shifting=True.*give the shift"):
        scheduler_sampler(scheduler, steps, **FLUX)
    with pytest.raises(ValueError, match="gives a shift of"):
        diffusion.dynamic_shift(24, base_shift=-9.0, max_shift=1.15, kind="linear")


@pytest.mark.parametrize(("steps", "shift"), [(5, 3), (50, 5), (3, 8)])
@pytest.mark.parametrize(("kind", "spacing"), [("flow", "unipc"), ("authors", "wan")])
def test_unipc_from_both_starts(recorded, steps, shift, kind, spacing):
    name = f"unipc_{kind}_n{steps}_shift{shift}"
    sampler = diffusion.unipc(steps, shift=shift, spacing=spacing, **SD3)
    np.testing.assert_allclose(sampler.table.sigma, recorded[f"{name}_sigmas"][:-1], rtol=1e-7)
    assert_recorded(sampler, recorded, name)
    scheduler = read_scheduler(UNIPC | {"flow_shift": shift})
    assert (scheduler.sampler, scheduler.replaced) == ("unipc", False)
    assert diffusion.sampling_text(scheduler) == f"UniPC (order 2), shift {shift}"
    own = None if kind == "flow" else spacing
    assert_recorded(scheduler_sampler(scheduler, steps, spacing=own, **SD3), recorded, name)


@pytest.mark.parametrize("steps", [5, 14, 20])
def test_dpm_solver_of_diffusers(recorded, steps):
    scheduler = read_scheduler({"_class_name": "DPMSolverMultistepScheduler"})
    assert (scheduler.sampler, scheduler.replaced) == ("dpm-solver++", False)
    assert diffusion.sampling_text(scheduler) == "DPM-Solver++ (2M), linspace spacing"
    for sampler in (diffusion.dpm_solver_pp(steps), scheduler_sampler(scheduler, steps)):
        assert_recorded(sampler, recorded, f"dpmpp2m_n{steps}")


def test_a_learned_variance_is_not_read(recorded):
    sampler, x = diffusion.dpm_solver_pp(5), recorded["x"]
    outputs = recorded["model_outputs"][:5]
    twice = np.concatenate([outputs, 7 + outputs], axis=-1)
    expected = states_in_turn(sampler, outputs, x)
    np.testing.assert_array_equal(states_in_turn(sampler, twice, x), expected)


def test_dpm_solver_as_pixarts_authors_run_it(loops):
    sampler = diffusion.dpm_solver_pp(5, spacing="continuous")
    np.testing.assert_allclose(sampler.table.timestep, loops["pixart/model_t"][:, 0], atol=1e-4)
    null, conditional = loops["pixart/model_out"][:, 0], loops["pixart/model_out"][:, 1]
    outputs = (null + 4.5 * (conditional - null))[:, None]
    found = states_in_turn(sampler, outputs, loops["pixart/noise"])[-1]
    expected = loops["pixart/sample"]
    np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())
    # With ten steps and more the last one is of second order as well.
    assert diffusion.dpm_solver_pp(9, spacing="continuous").table.change[-1] == 0
    assert diffusion.dpm_solver_pp(10, spacing="continuous").table.change[-1] != 0
    respaced = diffusion.respaced(diffusion.Schedule(diffusion.linear_betas()), 10)
    with pytest.raises(ValueError, match=r"spacing='continuous' needs a schedule that was not"):
        diffusion.dpm_solver_pp(5, schedule=respaced, spacing="continuous")
    with pytest.raises(ValueError, match=r"spacing='leading' does not fit steps='ddim25'"):
        diffusion.dpm_solver_pp("ddim25", spacing="leading")


def test_the_timestep_transform_of_open_sora(loops):
    shift = diffusion.resolution_shift(144, 256, 17)
    sampler = diffusion.flow_euler(5, shift=shift, flow_times=(1000.0, 0.0), velocity_to="data")
    np.testing.assert_allclose(sampler.table.timestep, loops["stdit3/timesteps"], atol=1e-4)
    assert diffusion.resolution_shift(512, 512) == 1
    assert diffusion.resolution_shift(512, 512, 34) == pytest.approx(10**0.5)
    with pytest.raises(ValueError, match="num_frames=16 is not supported; use 1, or 17 or more"):
        diffusion.resolution_shift(512, 512, 16)
    with pytest.raises(ValueError, match="height=0 and width=512 must be positive"):
        diffusion.resolution_shift(0, 512)


def test_noise_levels_of_fluxs_authors(loops):
    sigmas = loops["flux/sigmas"]
    sampler = diffusion.flow_euler(len(sigmas) - 1, shift=diffusion.dynamic_shift(10), **FLUX)
    np.testing.assert_allclose(sampler.table.timestep, sigmas[:-1], atol=1e-6)
    schnell = diffusion.flow_euler(4, **FLUX)
    np.testing.assert_array_equal(schnell.table.timestep, np.array([1, 0.75, 0.5, 0.25], "f"))


def test_the_experts_of_wan_and_their_guidance_change_at_a_timestep(loops):
    sampler = diffusion.unipc(6, shift=3, **SD3)
    np.testing.assert_array_equal(sampler.table.timestep, loops["wan/timesteps"])
    scale = diffusion.SteppedScale(boundary=875.0, at_or_above=4.0, below=3.0)
    found = scale(jnp.asarray(sampler.table.timestep))
    np.testing.assert_array_equal(found, np.where(loops["wan/expert"] == 0, 4.0, 3.0))
    assert scale(jnp.asarray([875.0, 874.0])).tolist() == [4.0, 3.0]


def test_the_respaced_chain_of_open_sora_1_0(loops):
    chain = diffusion.respaced(diffusion.Schedule(diffusion.linear_betas()), 5)
    np.testing.assert_array_equal(chain.timestep_map, loops["stdit/timestep_map"])
    np.testing.assert_allclose(chain.betas, loops["stdit/betas"], rtol=1e-12)
    found = chain.posterior_log_variance_clipped
    expected = loops["stdit/posterior_log_variance_clipped"]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    sampler = diffusion.ddpm(5)
    np.testing.assert_array_equal(sampler.table.timestep, loops["stdit/timesteps"])
    assert sampler.clip is None
    assert sampler.variance_fn is diffusion.learned_range


def test_levels_are_given_or_computed():
    sigmas = [1.0, 0.4, 0.0]
    assert diffusion.flow_euler(2, sigmas=sigmas).table.timestep.tolist() == [
        0.0,
        np.float32(0.6),
    ]
    for given in ({"shift": 3.0}, {"spacing": "uniform"}):
        with pytest.raises(ValueError, match=f"{next(iter(given))}=.*no effect on given sigmas"):
            diffusion.unipc(2, sigmas=sigmas, **given)
    scheduler = read_scheduler(EULER | {"shift": 3.0})
    sampler = scheduler_sampler(scheduler, 2, sigmas=sigmas)
    assert sampler.table.timestep.tolist() == [0.0, np.float32(0.6)]
    with pytest.raises(
        ValueError,
        match=r"shift=2 is an option of flow-euler, flow-dpm-solver\+\+ and unipc, not of flow",
    ):
        scheduler_sampler(scheduler, 2, sampler="flow", shift=2)
    heun = diffusion.flow(2, solve_fn=diffusion.heun, **SD3)
    plain = diffusion.flow(2, solve_fn=diffusion.heun)
    x = jnp.ones((1, 2))
    ends = [
        diffusion.sample(fn, sampler, x, None)
        for fn, sampler in (
            (lambda x, t, c: x * t[:, None] / 1000, heun),
            (lambda x, t, c: -(x * (1 - t[:, None])), plain),
        )
    ]
    np.testing.assert_allclose(*ends, rtol=1e-6)


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def test_the_shift_of_flux_2_by_hand():
    """Published fits at 10 and 200 steps, a line between; above 4300 tokens that of 200 steps."""
    at_10, at_200 = (
        slope * 1024 + start
        for slope, start in ((8.73809524e-05, 1.89833333), (0.00016927, 0.45666666))
    )
    for steps, mu in ((10, at_10), (200, at_200), (105, (at_10 + at_200) / 2)):
        assert math.isclose(diffusion.empirical_shift(1024, steps), math.exp(mu), rel_tol=1e-9)
        found = diffusion.empirical_shift(1024, steps, "linear")
        assert math.isclose(found, mu, rel_tol=1e-9)
    assert diffusion.empirical_shift(4301, 4) == diffusion.empirical_shift(4301, 50)
    assert diffusion.empirical_shift(4300, 4) > 1.2 * diffusion.empirical_shift(4300, 50)
    with pytest.raises(ValueError, match="num_tokens=0"):
        diffusion.empirical_shift(0, 4)
    with pytest.raises(ValueError, match="give shift"):
        diffusion.empirical_shift(4096, 2000, "linear")


OTHER_SOLVERS = [
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    ("DPMSolverMultistepScheduler", {"solver_type": "heun"}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -5.1}),
    ("DPMSolverMultistepScheduler", FLOW | {"solver_type": "heun"}),
    ("DPMSolverMultistepScheduler", FLOW | {"thresholding": True}),
    ("UniPCMultistepScheduler", UNIPC | {"solver_type": "bh1"}),
    ("UniPCMultistepScheduler", UNIPC | {"predict_x0": False}),
    ("UniPCMultistepScheduler", UNIPC | {"disable_corrector": [0]}),
    ("UniPCMultistepScheduler", UNIPC | {"thresholding": True}),
    ("UniPCMultistepScheduler", UNIPC | {"lower_order_final": False}),
]


@pytest.mark.parametrize(("name", "config"), OTHER_SOLVERS)
def test_another_solver_is_replaced_and_the_setting_named(name, config):
    scheduler = read_scheduler({"_class_name": name} | config)
    assert scheduler.replaced
    assert scheduler.sampler == ("flow-euler" if scheduler.is_flow else "ddim")
    setting, value = list(config.items())[-1]
    text = f"(in place of {name}'s own with {setting}={value!r})"
    assert text in diffusion.sampling_text(scheduler)


@pytest.mark.parametrize(
    "config",
    [
        {"algorithm_type": "deis", "solver_type": "logrho", "lambda_min_clipped": -np.inf},
        {"euler_at_final": True, "lower_order_final": False, "variance_type": "learned_range"},
        {"use_karras_sigmas": False, "solver_order": 2, "final_sigmas_type": "zero"},
    ],
)
def test_settings_without_effect_on_the_solver_keep_it(config):
    scheduler = read_scheduler({"_class_name": "DPMSolverMultistepScheduler"} | config)
    assert scheduler.sampler == "dpm-solver++"
    found = scheduler_sampler(scheduler, 20).table
    jax.tree.map(np.testing.assert_array_equal, found, diffusion.dpm_solver_pp(20).table)


def test_spacings_of_multi_step_solvers_by_hand():
    visited = diffusion.dpm_solver.multistep_timesteps
    assert visited(10, 3, "linspace").tolist() == [9, 6, 3]
    assert visited(10, 3, "leading", 1).tolist() == [7, 5, 3]
    assert visited(10, 3, "trailing").tolist() == [9, 6, 2]
    with pytest.raises(ValueError, match="visit a timestep of 10 twice"):
        visited(10, 10, "linspace")
    with pytest.raises(ValueError, match="steps_offset=5 lead to timestep 11"):
        visited(10, 3, "leading", 5)
    config = {"_class_name": "DPMSolverMultistepScheduler", "timestep_spacing": "trailing"}
    sampler = scheduler_sampler(read_scheduler(config), 3)
    assert sampler.table.timestep.tolist() == [999, 666, 332]
    replaced = scheduler_sampler(read_scheduler(config), 3, spacing="linspace")
    assert replaced.table.timestep.tolist() == [999, 666, 333]


def test_the_order_of_multi_step_solvers_is_two():
    """On a velocity that is smooth in time, halved steps leave a quarter of the error or less."""

    def denoise_fn(x, timestep, condition):
        return jnp.sin(3 * timestep[:, None]) - 0.5 * x

    noise = jnp.asarray([[0.3, -1.0]])
    levels = {n: 1 - np.linspace(0.1, 0.9, n + 1) for n in (8, 16, 32, 512)}
    ends = {}
    for n, sigmas in levels.items():
        sampler = diffusion.unipc(n + 1, sigmas=np.append(sigmas, 0.0))
        steps = diffusion.sample_trajectory(denoise_fn, sampler, noise, None)[1]
        ends[n] = np.asarray(steps.x[-1], np.float64)  # at the last level before 0
    errors = [np.abs(ends[n] - ends[512]).max() for n in (8, 16, 32)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
