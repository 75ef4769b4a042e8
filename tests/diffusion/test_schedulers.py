"""Samplers of diffusers' schedulers: the same end from the same noise, recorded and live."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scheduler_cases import CASES, DDIM, DDPM, FILE, FLOW, ZERO, by_diffusers, network, noises

from qdit_jax import diffusion
from qdit_jax.diffusion import read_scheduler, scheduler_process, scheduler_sampler
from qdit_jax.errors import UserError


def nhwc(array):
    return jnp.asarray(np.moveaxis(array, -3, -1))


def sampled(config, steps):
    """Returns our samples, `[B, C, H, W]`."""
    scheduler = read_scheduler(config)
    sampler = scheduler_sampler(scheduler, steps)
    drawn = nhwc(noises(steps))
    count = scheduler.settings["num_train_timesteps"]
    is_flow = scheduler.is_flow

    def denoise_fn(x, timestep, label):
        timestep = timestep[0]
        if not is_flow:
            return network(jnp, x, timestep, count, -1)
        # The formula is in diffusers' terms: time is the noise level, velocity toward the noise.
        return -network(jnp, x, count * (1 - timestep), count, -1)[..., : x.shape[-1]]

    out = diffusion.sample(denoise_fn, sampler, drawn[0], jnp.zeros(2, int), step_noise=drawn[1:])
    return np.moveaxis(np.asarray(out), -1, -3)


def assert_same_samples(found, expected):
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())
    assert np.abs(found - expected).mean() < 2e-4 * np.abs(expected).max()


@pytest.fixture(scope="module")
def recorded():
    return dict(np.load(FILE))


@pytest.mark.parametrize("name", CASES)
def test_samples_are_those_of_diffusers(recorded, name):
    assert_same_samples(sampled(*CASES[name]), recorded[name])


def test_recorded_samples_are_those_of_the_installed_diffusers(recorded):
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    for name, case in CASES.items():
        np.testing.assert_allclose(by_diffusers(*case), recorded[name], atol=1e-4, rtol=1e-4)


def test_every_setting_changes_the_samples(recorded):
    """So that a setting that is read and then forgotten cannot pass."""
    same = {("ddim_trailing", "ddim_trailing_last"), ("ddpm_small", "ddpm_small_log")}
    for a in CASES:
        for b in CASES:
            if a < b and (a, b) not in same:
                assert np.abs(recorded[a] - recorded[b]).max() > 5e-3, (a, b)


RECORDED = FILE.with_name("schedules.npz")


def outputs_in_turn(sampler, outputs, x):
    """Returns `x` after every step of a network that returns `outputs`, whatever it is given."""
    found, x = [], jnp.asarray(x)
    state = diffusion.initial_state(sampler, x)
    for i, output in enumerate(outputs):
        row = jax.tree.map(lambda a, i=i: a[i], sampler.table)
        step = diffusion.take_step(
            sampler, lambda *_, output=output: jnp.asarray(output), x, state, None, row, None
        )
        x, state = step.x_next, step.state
        found.append(x)
    return np.stack(found)


@pytest.mark.parametrize("steps", [5, 50])
def test_ddim_of_an_offset_and_a_last_alpha_is_the_recorded_one(steps):
    recorded, name = np.load(RECORDED), f"ddim_n{steps}"
    config = DDIM | {"steps_offset": 1, "set_alpha_to_one": False}
    sampler = scheduler_sampler(read_scheduler(config), steps)
    np.testing.assert_array_equal(sampler.table.timestep, recorded[f"{name}_timesteps"])
    last = recorded[f"{name}_final_alpha_cumprod"]
    np.testing.assert_allclose(sampler.table.x0_weight[-1] ** 2, last, rtol=1e-6)
    if f"{name}_samples" in recorded:
        found = outputs_in_turn(sampler, recorded["model_outputs"][:steps], recorded["x"])
        expected = recorded[f"{name}_samples"]
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_timesteps_by_hand():
    def visited(*args):
        return diffusion.scheduler_timesteps(*args).tolist()

    assert visited(10, 5, "leading", 1) == [9, 7, 5, 3, 1]
    assert visited(10, 3, "leading") == [6, 3, 0]
    assert visited(10, 5, "trailing") == [9, 7, 5, 3, 1]
    assert visited(10, 3, "trailing") == [9, 6, 2]
    assert visited(10, 4, "linspace") == [9, 6, 3, 0]
    with pytest.raises(ValueError, match=r"steps_offset=2 lead to timestep 10"):
        visited(10, 5, "leading", 2)
    with pytest.raises(ValueError, match="use 1 to 10"):
        visited(10, 11, "leading")


def test_zero_terminal_snr_by_hand():
    betas = diffusion.zero_snr_betas(np.array([0.19, 0.75 / 0.81 * 0.81 + 0.06]))
    kept = np.cumprod(1 - betas)
    np.testing.assert_allclose(kept, [0.81, 0.0], atol=1e-12)
    betas = diffusion.zero_snr_betas(np.array([0.36, 0.4375, 5 / 9]))  # roots 0.8, 0.6, 0.4
    np.testing.assert_allclose(np.cumprod(1 - betas), [0.64, 0.16, 0.0], atol=1e-12)


def test_v_is_the_rotation_of_noise_and_data():
    signal, noise = 0.6, 0.8
    data, eps = jnp.array([[1.5, -2.0]]), jnp.array([[0.3, 0.7]])
    row = diffusion.posterior.Prediction(1 / signal, noise / signal, signal, noise)
    x, v = signal * data + noise * eps, signal * eps - noise * data
    for found, expected in zip(diffusion.v_prediction(x, v, row), (data, eps), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_multi_step_solver_is_replaced_by_ddim_on_its_betas():
    config = {
        "_class_name": "DPMSolverMultistepScheduler",
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "solver_order": 3,
        "use_karras_sigmas": True,
        "timestep_spacing": "trailing",
        "clip_sample": True,  # of another class: diffusers does not read it
    }
    scheduler = read_scheduler(config)
    assert scheduler.ignored == ("clip_sample",)
    betas = diffusion.zero_snr_betas(diffusion.scaled_linear_betas(1000, 0.0001, 0.02))
    expected = diffusion.ddim(
        7, schedule=diffusion.Schedule(betas), predict_fn=diffusion.v_prediction
    )
    found = scheduler_sampler(scheduler, 7)
    assert found.predict_fn is diffusion.v_prediction
    assert found.clip is None
    for a, b in zip(found.table[2:], expected.table[2:], strict=True):
        np.testing.assert_array_equal(a, b)
    text = "DDIM (in place of DPMSolverMultistepScheduler's own with use_karras_sigmas=True and solver_order=3)"
    assert scheduler.because == ("use_karras_sigmas=True", "solver_order=3")
    assert text in diffusion.sampling_text(scheduler)


TO_A_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler"])
def test_a_solver_set_to_a_flow_is_replaced_by_eulers_rule(name):
    scheduler = read_scheduler({"_class_name": name, "solver_order": 3} | TO_A_FLOW)
    expected = diffusion.flow_euler(6, shift=3.0, spacing="trained")
    np.testing.assert_array_equal(
        scheduler_sampler(scheduler, 6).table.timestep, expected.table.timestep
    )
    text = f"Euler's rule (in place of {name}'s own with solver_order=3), shift 3"
    assert text in diffusion.sampling_text(scheduler)
    with pytest.raises(ValueError, match="no schedule of betas"):
        scheduler_process(scheduler)


def test_classes_have_their_own_defaults():
    assert read_scheduler({"_class_name": "KDPM2DiscreteScheduler"}).settings["beta_end"] == 0.012
    heun = read_scheduler({"_class_name": "HeunDiscreteScheduler", "clip_sample": True})
    assert scheduler_sampler(heun, 5).limit_fn is diffusion.data_clip
    assert read_scheduler({"_class_name": "DDIMScheduler"}).settings["clip_sample"] is True
    assert read_scheduler(DDPM).settings["variance_type"] == "fixed_small"


REFUSED = [
    ({"_class_name": "LCMScheduler"}, "_class_name='LCMScheduler', which is not understood"),
    ({"_class_name": None}, "_class_name=None"),
    ({"num_train_timesteps": "1000"}, "num_train_timesteps='1000', which is not a whole number"),
    ({"num_train_timesteps": 1000.5}, "num_train_timesteps=1000.5, which is not a whole number"),
    ({"num_train_timesteps": True}, "num_train_timesteps=True, which is not a whole number"),
    ({"num_train_timesteps": 0}, "num_train_timesteps=0, which is not in 1 to"),
    ({"beta_start": "0.1"}, "beta_start='0.1', which is not a number"),
    ({"beta_start": None}, "beta_start=None, which is not a number"),
    ({"beta_end": 1.5}, "beta_end=1.5, which is not in"),
    ({"beta_end": float("nan")}, "beta_end=nan, which is not a number"),
    ({"beta_schedule": "laplace"}, "beta_schedule='laplace'; only 'linear' or"),
    ({"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'; only 'epsilon'"),
    (
        {"prediction_type": "x", "trained_betas": [0.1], "num_train_timesteps": 1},
        "prediction_type='x'; only",
    ),
    ({"trained_betas": "linear"}, "trained_betas='linear', which is not a list of numbers"),
    ({"trained_betas": [0.1, "b"]}, "which is not a list of numbers"),
    ({"trained_betas": [0.1, 0.0], "num_train_timesteps": 2}, r"each must be in \(0, 1\]"),
    ({"trained_betas": [0.1], "num_train_timesteps": 7}, "=7, but trained_betas has 1"),
    ({"clip_sample": "yes"}, "clip_sample='yes', which is neither true nor false"),
    ({"clip_sample": 1}, "clip_sample=1, which is neither true nor false"),
    ({"clip_sample_range": 0}, "clip_sample_range=0, which is not in"),
    ({"timestep_spacing": "karras"}, "timestep_spacing='karras'; only 'leading'"),
    ({"steps_offset": -1}, "steps_offset=-1, which is not in"),
    ({"steps_offset": 0.5}, "steps_offset=0.5, which is not a whole number"),
    ({"set_alpha_to_one": None}, "set_alpha_to_one=None"),
    ({"thresholding": None}, "thresholding=None"),
    ({"dynamic_thresholding_ratio": 2}, "dynamic_thresholding_ratio=2"),
    ({"rescale_betas_zero_snr": "true"}, "rescale_betas_zero_snr='true'"),
    ({"ddim_temperature": 2.0}, "ddim_temperature=2.0, which is not a setting that is understood"),
    (DDPM | {"variance_type": "learned"}, "variance_type='learned'; only 'fixed_small'"),
    (DDPM | {"variance_type": "fixed_large_log"}, "variance_type='fixed_large_log'"),
    (FLOW | {"shift": "3"}, "shift='3', which is not a number"),
    (FLOW | {"use_dynamic_shifting": "yes"}, "use_dynamic_shifting='yes', which is neither"),
    (FLOW | {"base_shift": None}, "base_shift=None"),
    (FLOW | {"time_shift_type": "quadratic"}, "time_shift_type='quadratic'; only 'exponential'"),
    (FLOW | {"use_karras_sigmas": True}, "use_karras_sigmas=True"),
    (FLOW | {"invert_sigmas": True}, "invert_sigmas=True"),
    (FLOW | {"stochastic_sampling": True}, "stochastic_sampling=True"),
    (FLOW | {"shift_terminal": 1.5}, "shift_terminal=1.5"),
    (
        {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"},
        "timestep_type='continuous'",
    ),
    (
        {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"},
        "prediction_type='flow_prediction' and use_flow_sigmas=False",
    ),
    (
        {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True},
        "prediction_type='epsilon' and use_flow_sigmas=True",
    ),
    (
        {
            "_class_name": "UniPCMultistepScheduler",
            "use_flow_sigmas": True,
            "prediction_type": "flow_prediction",
            "use_dynamic_shifting": True,
        },
        "use_dynamic_shifting=True",
    ),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_what_is_not_understood_is_refused_by_name_and_value(config, message):
    with pytest.raises(UserError, match=f"scheduler_config.json says .*{message}"):
        read_scheduler(DDIM | config)


def test_noise_says_nothing_where_there_is_no_signal():
    config = DDIM | {"rescale_betas_zero_snr": True}
    strange = [config | {"timestep_spacing": spacing} for spacing in ("trailing", "linspace")]
    for refused in (*strange, {"_class_name": "EulerDiscreteScheduler"} | ZERO):
        with pytest.raises(UserError, match=r"zero_snr=True and prediction_type='epsilon'"):
            read_scheduler(refused)
    with pytest.raises(ValueError, match="no signal at all"):
        scheduler_sampler(read_scheduler(config), 1000)


def test_user_choices_come_before_the_schedulers():
    clipped = read_scheduler({"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"})
    sampler = scheduler_sampler(clipped, "ddim25", eta=0.5, clip=2.0)
    assert sampler.clip == 2
    assert sampler.limit_fn is diffusion.consistent_clip
    assert sampler.stochastic
    assert sampler.predict_fn is diffusion.v_prediction
    expected = diffusion.ddim("ddim25", 0.5).table
    np.testing.assert_array_equal(sampler.table.timestep, expected.timestep)
    sampler = scheduler_sampler(clipped, 5, sampler="ddpm", variance_fn=diffusion.learned_range)
    assert isinstance(sampler, diffusion.DDPM)
    assert sampler.clip == 1
    assert sampler.variance_fn is diffusion.learned_range
    with pytest.raises(ValueError, match="sampler='flow' does not fit"):
        scheduler_sampler(clipped, 5, sampler="flow")


def test_every_setting_of_the_installed_diffusers_is_in_the_table():
    diffusers = pytest.importorskip("diffusers")
    import inspect

    for name, row in diffusion.scheduler_settings.CLASSES.items():
        given = set(inspect.signature(getattr(diffusers, name).__init__).parameters)
        unknown = given - {"self", "kwargs"} - set(row.table)
        assert not unknown, (name, unknown)
        defaults = inspect.signature(getattr(diffusers, name).__init__).parameters
        for key, setting in row.table.items():
            if setting.used and key in given:
                assert defaults[key].default == setting.default, (name, key)
