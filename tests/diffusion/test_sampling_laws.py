"""Laws of the samplers: closed forms of Gaussian data, straight paths, guidance, compilation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdit_jax import diffusion
from qdit_jax.diffusion import Schedule, linear_betas, respaced
from qdit_jax.diffusion.loop import _sample_loop, _typed

SCHEDULE = Schedule(linear_betas())
MEAN, VARIANCE = 0.4, 0.25  # of the data


def alpha_bar_at(timestep, xp=jnp):
    return xp.asarray(SCHEDULE.alphas_cumprod, xp.float32 if xp is jnp else None)[timestep]


def gaussian_eps(x, timestep, label, xp=jnp):
    """Returns `E[eps | x_t]` for Gaussian data, the best possible denoiser."""
    alpha_bar = xp.reshape(alpha_bar_at(timestep, xp), (-1, 1, 1, 1))
    total = alpha_bar * VARIANCE + 1 - alpha_bar
    return xp.sqrt(1 - alpha_bar) * (x - xp.sqrt(alpha_bar) * MEAN) / total


def latents(num_samples=2, channels=3, seed=0):
    # NumPy's numbers: compiling jax.random for every shape would dominate these tests.
    drawn = np.random.default_rng(seed).standard_normal((num_samples, 4, 4, channels))
    return jnp.asarray(drawn, jnp.float32)


def noise_of_steps(steps, noise):
    drawn = np.random.default_rng(9).standard_normal((steps, *noise.shape))
    return jnp.asarray(drawn, jnp.float32)


def zeros(num_samples=2):
    return jnp.zeros((num_samples,), jnp.int32)


def gaussian_ddim_oracle(noise, steps):
    """Returns deterministic DDIM on Gaussian data in float64: one affine map a step."""
    process = respaced(SCHEDULE, steps)
    x = np.asarray(noise, np.float64)
    for i in reversed(range(process.num_timesteps)):
        timestep = np.full(x.shape[0], process.timestep_map[i])
        eps = gaussian_eps(x, timestep, None, np)
        x0 = (x - np.sqrt(1 - process.alphas_cumprod[i]) * eps) / np.sqrt(process.alphas_cumprod[i])
        target = process.alphas_cumprod_prev[i]
        x = np.sqrt(target) * x0 + np.sqrt(1 - target) * eps
    return x


@pytest.mark.parametrize("steps", [1, "ddim25", 1000])
def test_ddim_equals_the_closed_form(steps):
    noise = latents()
    ours = diffusion.sample(gaussian_eps, diffusion.ddim(steps), noise, zeros())
    np.testing.assert_allclose(ours, gaussian_ddim_oracle(noise, steps), atol=3e-5)


def test_ddim_converges_to_the_exact_flow():
    # The probability-flow ODE maps the end of the process onto the data by one affine map.
    noise, alpha_bar = latents(), SCHEDULE.alphas_cumprod[-1]
    spread = np.sqrt(VARIANCE / (alpha_bar * VARIANCE + 1 - alpha_bar))
    exact = MEAN + spread * (np.asarray(noise, np.float64) - np.sqrt(alpha_bar) * MEAN)
    errors = [
        np.abs(diffusion.sample(gaussian_eps, diffusion.ddim(n), noise, zeros()) - exact).max()
        for n in [50, 100, 200]
    ]
    assert errors[0] > 1.5 * errors[1] > 1.5**2 * errors[2]


def test_ancestral_steps_equal_the_closed_form():
    # With the posterior's variance, x_0's mean and the same noise, every step is affine.
    noise, steps = latents(), 20
    step_noise = noise_of_steps(steps, noise)
    sampler = diffusion.ddpm(steps, variance_fn=diffusion.fixed_small)
    ours = diffusion.sample(gaussian_eps, sampler, noise, zeros(), step_noise=step_noise)
    process, x = respaced(SCHEDULE, steps), np.asarray(noise, np.float64)
    for i, drawn in zip(reversed(range(steps)), np.asarray(step_noise, np.float64), strict=True):
        alpha_bar, beta = process.alphas_cumprod[i], process.betas[i]
        eps = gaussian_eps(x, np.full(x.shape[0], process.timestep_map[i]), None, np)
        x = (x - beta / np.sqrt(1 - alpha_bar) * eps) / np.sqrt(1 - beta)
        x = x + np.sqrt(process.posterior_variance[i]) * drawn
    np.testing.assert_allclose(ours, x, atol=3e-5)


def ancestral_moments(steps, variance):
    """Returns mean and variance of ancestral samples of Gaussian data, propagated in float64."""
    process, mean, spread = respaced(SCHEDULE, steps), 0.0, 1.0
    for i in reversed(range(steps)):
        alpha_bar, beta = process.alphas_cumprod[i], process.betas[i]
        total = alpha_bar * VARIANCE + 1 - alpha_bar
        slope = (1 - beta / total) / np.sqrt(1 - beta)
        mean = slope * mean + beta * np.sqrt(alpha_bar) * MEAN / total / np.sqrt(1 - beta)
        spread = slope**2 * spread + (variance(process)[i] if i else 0)
    return mean, spread


@pytest.mark.parametrize(
    ("sampler", "variance"),
    [
        (diffusion.ddim(50, eta=1), lambda process: process.posterior_variance),
        (
            diffusion.ddpm(50, variance_fn=diffusion.fixed_large),
            lambda process: process.betas,
        ),
    ],
    ids=["ddim_eta1", "ddpm_large"],
)
def test_stochastic_samplers_have_the_chains_moments(sampler, variance):
    mean, spread = ancestral_moments(50, variance)
    noise = latents(num_samples=2000, channels=1)
    step_noise = noise_of_steps(50, noise)
    out = diffusion.sample(gaussian_eps, sampler, noise, zeros(2000), step_noise=step_noise)
    assert abs(out.mean() - mean) < 4 * np.sqrt(spread / out.size)
    assert abs(out.var() / spread - 1) < 4 * np.sqrt(2 / out.size)


def test_ancestral_sampling_converges_to_the_data():
    mean, spread = ancestral_moments(1000, lambda process: process.betas)
    assert abs(mean - MEAN) < 0.005
    assert abs(spread / VARIANCE - 1) < 0.005


def test_full_eta_is_ancestral_sampling_with_the_smaller_variance():
    noise = latents()
    step_noise = noise_of_steps(30, noise)
    small = diffusion.ddpm(30, variance_fn=diffusion.fixed_small)
    ancestral = diffusion.sample(gaussian_eps, small, noise, zeros(), step_noise=step_noise)
    implicit = diffusion.sample(
        gaussian_eps, diffusion.ddim(30, 1.0), noise, zeros(), step_noise=step_noise
    )
    # The clipped log variance differs from the exact one only where no noise is added.
    np.testing.assert_allclose(ancestral, implicit, atol=2e-5)


def test_clipping_keeps_the_result_in_range():
    sampler = diffusion.ddim(10, clip=0.5)
    out = diffusion.sample(gaussian_eps, sampler, 5 * latents(), zeros())
    assert jnp.abs(out).max() <= 0.5


def test_predicting_the_data_equals_predicting_the_noise():
    def gaussian_x0(x, timestep, label):
        alpha_bar = jnp.reshape(alpha_bar_at(timestep), (-1, 1, 1, 1))
        eps = gaussian_eps(x, timestep, label)
        return (x - jnp.sqrt(1 - alpha_bar) * eps) / jnp.sqrt(alpha_bar)

    noise, by_x0 = latents(), diffusion.ddim(20, predict_fn=diffusion.x0_prediction)
    np.testing.assert_allclose(
        diffusion.sample(gaussian_x0, by_x0, noise, zeros()),
        diffusion.sample(gaussian_eps, diffusion.ddim(20), noise, zeros()),
        atol=1e-4,
    )


def test_reverse_ddim_inverts():
    data = MEAN + np.sqrt(VARIANCE) * latents(seed=3)
    # Without the last row, which leaves the process for a signal of exactly 0.
    reverse = diffusion.reverse_ddim(500)
    reverse = diffusion.DDIM(
        jax.tree.map(lambda row: row[:-1], reverse.table), None, reverse.predict_fn, False
    )
    encoded = diffusion.sample(gaussian_eps, reverse, data, zeros())
    decoded = diffusion.sample(gaussian_eps, diffusion.ddim(500), encoded, zeros())
    assert jnp.abs(encoded - data).max() > 0.5
    np.testing.assert_allclose(decoded, data, atol=0.02)


@pytest.mark.parametrize("solve_fn", [diffusion.euler, diffusion.heun])
def test_flow_is_exact_on_straight_paths(solve_fn):
    noise, data = latents(), latents(seed=4)
    times = []

    def velocity(x, timestep, label):
        times.append(timestep.dtype)
        return data - noise

    out = diffusion.sample(velocity, diffusion.flow(7, solve_fn=solve_fn), noise, zeros())
    np.testing.assert_allclose(out, data, atol=1e-5)
    assert times[0] == jnp.float32


def gaussian_velocity(x, timestep, label):
    time = jnp.reshape(timestep, (-1, 1, 1, 1))
    total = time**2 * VARIANCE + (1 - time) ** 2
    centered = (x - time * MEAN) / total
    return MEAN + (time * VARIANCE - (1 - time)) * centered


@pytest.mark.parametrize(("solve_fn", "order"), [(diffusion.euler, 1), (diffusion.heun, 2)])
def test_flow_solvers_have_their_order(solve_fn, order):
    noise = latents()
    exact = MEAN + np.sqrt(VARIANCE) * np.asarray(noise)
    errors = []
    for steps in [10, 20, 40]:
        sampler = diffusion.flow(steps, solve_fn=solve_fn)
        out = diffusion.sample(gaussian_velocity, sampler, noise, zeros())
        errors.append(np.abs(out - exact).max())
    assert np.log2(errors[0] / errors[1]) > order - 0.25
    assert np.log2(errors[1] / errors[2]) > order - 0.25


def test_flow_starts_at_noise_and_stays_within_unit_time():
    sampler = diffusion.flow(4)
    _, step = diffusion.sample_trajectory(gaussian_velocity, sampler, latents(), zeros())
    np.testing.assert_allclose(step.timestep, [0, 0.25, 0.5, 0.75])


def test_trajectory_records_what_the_model_saw():
    sampler = diffusion.ddim(5)
    final, step = diffusion.sample_trajectory(gaussian_eps, sampler, latents(), zeros())
    assert step.x.shape == (5, *latents().shape)
    np.testing.assert_array_equal(step.timestep, respaced(SCHEDULE, 5).timestep_map[::-1])
    np.testing.assert_array_equal(step.x[0], latents())
    np.testing.assert_array_equal(step.x[1:], step.x_next[:-1])
    np.testing.assert_array_equal(step.x_next[-1], final)
    timestep = jnp.full((2,), step.timestep[2])
    np.testing.assert_allclose(step.output[2], gaussian_eps(step.x[2], timestep, None), atol=1e-5)


def test_one_key_a_sample_makes_samples_independent_of_the_batch():
    sampler, keys = diffusion.ddim(5, eta=1.0), jax.random.split(jax.random.key(0), 4)
    noise = latents(4)
    together = diffusion.sample(gaussian_eps, sampler, noise, zeros(4), keys)
    alone = diffusion.sample(gaussian_eps, sampler, noise[3:], zeros(1), keys[3:])
    np.testing.assert_allclose(together[3:], alone, atol=1e-5)


def test_legacy_keys_are_keys():
    assert (_typed(jax.random.PRNGKey(3), 2) == jax.random.key(3)).all()
    with pytest.raises(ValueError, match="give one key, or 2"):
        _typed(jax.random.split(jax.random.key(0), 3), 2)


def labeled(params, x, timestep, label):
    """Returns eps and a variance that depend on the label; 9 is the null class."""
    shift = (label.astype(x.dtype) * params)[:, None, None, None]
    return jnp.concatenate([0.1 * x + shift, jnp.broadcast_to(shift / 10, x.shape)], axis=-1)


@jax.jit
def called(denoise_fn, *arguments):
    return denoise_fn(*arguments)


@pytest.mark.parametrize(("channels", "num_guided"), [(3, 3), (None, 4)])
def test_guidance_extrapolates_only_the_chosen_channels(channels, num_guided):
    model = jax.tree_util.Partial(labeled, jnp.float32(0.5))
    fn = diffusion.guided(model, 1.5, null=9, channels=channels)
    x, timestep, label = latents(3, 4), jnp.zeros((3,), jnp.int32), jnp.array([1, 2, 3])
    out, cond = called(fn, x, timestep, label), called(model, x, timestep, label)
    null = called(model, x, timestep, jnp.full((3,), 9))
    np.testing.assert_allclose(
        out[..., :num_guided], (null + 1.5 * (cond - null))[..., :num_guided], atol=1e-5
    )
    np.testing.assert_allclose(out[..., num_guided:], cond[..., num_guided:], atol=1e-6)
    doubled = called(
        diffusion.guided_doubled(model, 1.5, channels=channels),
        jnp.concatenate([x, x + 7]),
        jnp.zeros((6,), jnp.int32),
        jnp.array([1, 2, 3, 9, 9, 9]),
    )
    np.testing.assert_allclose(doubled[:3], out, atol=1e-5)
    np.testing.assert_allclose(doubled[3:, ..., num_guided:], null[..., num_guided:], atol=1e-6)


def test_a_scale_of_one_is_no_guidance_and_scales_may_differ_by_sample():
    model = jax.tree_util.Partial(labeled, jnp.float32(0.5))
    x, timestep, label = latents(2, 4), jnp.zeros((2,), jnp.int32), jnp.array([1, 2])
    scale = jnp.array([1.0, 4.0])
    out = called(diffusion.guided(model, scale, null=9), x, timestep, label)
    np.testing.assert_allclose(out[0], model(x, timestep, label)[0], atol=1e-5)
    four = called(diffusion.guided(model, 4.0, null=9), x, timestep, label)
    np.testing.assert_allclose(out[1], four[1], atol=1e-5)


def test_values_do_not_recompile():
    def run(weight, scale, eta, clip, label, seed):
        model = jax.tree_util.Partial(labeled, jnp.float32(weight))
        fn = diffusion.guided(model, scale, null=9)
        sampler = diffusion.ddim(6, eta, clip=clip)
        key = jax.random.key(seed)
        return diffusion.sample(fn, sampler, latents(2, 4, seed), jnp.array(label), key)

    run(0.1, 1.5, 0.5, 1.0, [1, 2], 0)
    before = _sample_loop._cache_size()
    first = run(0.2, 4.0, 0.9, 0.7, [3, 4], 1)
    second = run(0.2, 4.0, 0.9, 0.7, [3, 5], 1)
    assert _sample_loop._cache_size() == before
    assert jnp.abs(first - second).max() > 1e-3


def test_the_loop_is_one_loop_without_host_traffic():
    model = jax.tree_util.Partial(labeled, jnp.float32(0.1))
    fn = diffusion.guided(model, 1.5, null=9)
    arguments = (fn, diffusion.ddpm(50), latents(2, 4), zeros(), jax.random.key(0), None)
    text = _sample_loop.lower(*arguments, collect_fn=lambda step: None).compile().as_text()
    assert "while(" in text
    for word in ["callback", "infeed", "outfeed", " send(", " recv("]:
        assert word not in text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: diffusion.ddim(1001), "1001 steps where the process has 1000"),
        (lambda: diffusion.ddim("ten"), "cannot be read; use a positive number"),
        (lambda: diffusion.ddim("ddim7x"), "cannot be read"),
        (lambda: diffusion.ddim("ddim999"), "no integer stride visits exactly 999"),
        (lambda: diffusion.ddim(0), "positive number of steps"),
        (lambda: diffusion.ddim(10, eta=2), "eta=2 is not supported"),
        (lambda: diffusion.ddim(10, clip=-1.0), "clip=-1.0 is not supported"),
        (lambda: diffusion.flow(0), "steps=0 is not supported"),
        (lambda: Schedule(np.array([0.1, -0.1])), "betas must be"),
        (
            lambda: diffusion.sample(gaussian_eps, diffusion.ddim(3), latents(), zeros(3)),
            "one entry per sample",
        ),
        (
            lambda: diffusion.sample(gaussian_eps, diffusion.ddim(3, 1.0), latents(), zeros()),
            "give key, or step_noise",
        ),
        (
            lambda: diffusion.sample(
                gaussian_eps, diffusion.ddpm(3), latents(), zeros(), jax.random.key(0)
            ),
            "use variance_fn=fixed_large",
        ),
        (
            lambda: diffusion.sample(
                gaussian_eps, diffusion.ddim(3, 1.0), latents(), zeros(), step_noise=latents()
            ),
            "step_noise has shape",
        ),
        (
            lambda: diffusion.sample(
                lambda x, *_: x[..., :1], diffusion.ddim(3), latents(), zeros()
            ),
            "it must return the same shape",
        ),
        (lambda: diffusion.guided(gaussian_eps, 2.0, null=9, channels=0), "channels=0"),
        (
            lambda: diffusion.guided(gaussian_eps, 2.0, null=9, channels=4)(
                latents(), zeros(), zeros()
            ),
            "channels=4 but the latents have 3",
        ),
    ],
)
def test_errors_name_the_argument_and_the_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()
