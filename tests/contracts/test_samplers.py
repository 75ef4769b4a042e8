"""The contract of every sampler in the table, on data whose best denoiser is known in closed form."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdit_jax import diffusion
from qdit_jax.checkpoint import digest
from qdit_jax.diffusion import SAMPLERS, Sampler, Schedule, linear_betas, sampler_named
from qdit_jax.sampling.own_samplers import called_timesteps, has_known_calls

MEAN, VARIANCE = 0.4, 0.25  # of the data
SCHEDULE = Schedule(linear_betas())
MOST = SCHEDULE.num_timesteps
# Another value of every option than the one that `made` or a sampler itself takes. A row with an
# option that is not here fails: give it a value.
OTHER = {
    "eta": 0.5,
    "clip": 2.0,
    "schedule": Schedule(linear_betas(1000, 0.0002, 0.01)),
    "predict_fn": diffusion.v_prediction,
    "limit_fn": diffusion.data_clip,
    "variance_fn": diffusion.fixed_small,
    "solve_fn": diffusion.heun,
    "edges": np.array([0, 0.1, 0.3, 0.6, 1.0]),
    "sigmas": np.array([1.0, 0.9, 0.6, 0.3, 0.0]),
    "shift": 3.0,
    "spacing": "trailing",
    "flow_times": (1000.0, 0.0),
    "velocity_to": "noise",
}
SPACED = {True: "trained", False: "trailing"}  # another spacing of a flow's sampler, and of others
BAD = {
    "eta": (-0.1, 1.1, math.nan),
    "clip": (0.0, -1.0, math.nan),
    "edges": ([0.0, 1.0], [0, 0.5, 0.4, 0.7, 1.0], [0.1, 0.2, 0.3, 0.4, 1.0], [0, 1, 2, 3, 4.0]),
    "sigmas": ([1.0, 0.0], [1, 0.6, 0.7, 0.3, 0.0], [1, 0.9, 0.6, 0.3, 0.1], [2.0, 1, 0.5, 0.2, 0]),
    "shift": (0.0, -1.0, math.nan, math.inf),
    "spacing": ("karras", ""),
    "flow_times": ((0.0, 0.0), (0.0, math.inf)),
    "velocity_to": ("left", ""),
}
# (time at noise, time at data) and direction of networks: as SiT, SD3, STDiT3, FLUX.
UNITS = [
    ((0.0, 1.0), "data"),
    ((1000.0, 0.0), "noise"),
    ((1000.0, 0.0), "data"),
    ((1.0, 0.0), "noise"),
]
WHOLE = ("unipc", "flow-dpm-solver++")
every_sampler = pytest.mark.parametrize("row", SAMPLERS.values(), ids=SAMPLERS)


def made(row, steps, **options):
    """Returns a sampler for a network that returns no variance."""
    if "variance_fn" in row.options:
        options = {"variance_fn": diffusion.fixed_large, **options}
    return row.make_fn(steps, **options)


def best_noise(x, timestep, condition):
    """Returns `E[eps | x_t]` for Gaussian data."""
    alpha_bar = jnp.asarray(SCHEDULE.alphas_cumprod, jnp.float32)[timestep].reshape(-1, 1, 1, 1)
    total = alpha_bar * VARIANCE + 1 - alpha_bar
    return jnp.sqrt(1 - alpha_bar) * (x - jnp.sqrt(alpha_bar) * MEAN) / total


def best_velocity(x, timestep, condition):
    time = jnp.reshape(timestep, (-1, 1, 1, 1))
    total = time**2 * VARIANCE + (1 - time) ** 2
    return MEAN + (time * VARIANCE - (1 - time)) * (x - time * MEAN) / total


def denoiser_of(row):
    return best_velocity if row.is_flow else best_noise


def exact_ends(row, noise, sampler):
    """Returns where the probability-flow ODE leads from `noise`, in float64: an affine map.

    It starts where the sampler does, which may be above the first time of a flow.
    """
    if row.is_flow:
        signal = float(sampler.table.timestep[0])
        variance = (1 - signal) ** 2
    else:
        alpha_bar = SCHEDULE.alphas_cumprod[-1]
        signal, variance = np.sqrt(alpha_bar), 1 - alpha_bar
    spread = np.sqrt(VARIANCE / (signal**2 * VARIANCE + variance))
    return MEAN + spread * (np.asarray(noise, np.float64) - signal * MEAN)


def noise_of(num_samples=2, seed=0):
    drawn = np.random.default_rng(seed).standard_normal((num_samples, 4, 4, 3))
    return jnp.asarray(drawn, jnp.float32)


def sampled(row, sampler, noise, seed=0):
    condition = jnp.zeros(len(noise), jnp.int32)
    key = jax.random.key(seed)
    return np.asarray(diffusion.sample(denoiser_of(row), sampler, noise, condition, key))


@every_sampler
def test_a_row_is_complete(row):
    assert SAMPLERS[row.name] is row is sampler_named(row.name)
    assert row.idea.endswith(".")
    assert "arXiv:" in row.paper
    assert row.predictions in (diffusion.table.NOISE, (diffusion.table.VELOCITY,))
    assert set(row.options) <= set(OTHER), "give the new option a value in OTHER"
    if row.is_flow:
        assert ("edges" in row.options) != ("sigmas" in row.options)
        assert set(diffusion.table.OF_VELOCITY) <= set(row.options)
    else:
        assert "schedule" in row.options
    sampler = made(row, 5)
    assert isinstance(sampler, Sampler)
    lengths = {len(leaf) for leaf in jax.tree.leaves(sampler.table)}
    assert lengths == {5}
    for leaf in jax.tree.leaves(sampler):
        assert np.asarray(leaf).dtype in (np.float32, np.int32, bool)


@every_sampler
def test_the_same_key_gives_the_same_samples_in_a_batch_or_alone(row):
    sampler, noise = made(row, 4), noise_of(3)
    first = sampled(row, sampler, noise)
    np.testing.assert_array_equal(first, sampled(row, sampler, noise))
    other = sampled(row, sampler, noise, seed=1)
    assert np.array_equal(first, other) != sampler.stochastic
    keys = jax.random.split(jax.random.key(2), 3)
    condition = jnp.zeros(3, jnp.int32)
    fn = denoiser_of(row)
    whole = diffusion.sample(fn, sampler, noise, condition, keys)
    last = [np.asarray(part)[2:] for part in (noise, condition)]
    alone = diffusion.sample(fn, sampler, *last, keys[2:])
    np.testing.assert_allclose(whole[2:], alone, atol=1e-5)


@every_sampler
def test_compiled_or_not_the_samples_are_the_same(row):
    sampler, noise = made(row, 3), noise_of()
    compiled = sampled(row, sampler, noise)
    with jax.disable_jit():
        np.testing.assert_allclose(compiled, sampled(row, sampler, noise), atol=1e-5)


@every_sampler
@pytest.mark.parametrize("steps", [1, MOST])
def test_the_fewest_and_the_most_steps_visit_each_timestep_once(row, steps):
    sampler, noise = made(row, steps), noise_of()
    final, timestep = diffusion.sample_trajectory(
        denoiser_of(row), sampler, noise, jnp.zeros(2, jnp.int32), jax.random.key(0),
        collect_fn=timestep_of,
    )  # fmt: skip
    assert np.isfinite(final).all()
    timestep = np.asarray(timestep)
    assert timestep.shape == (steps,)
    forth = np.diff(timestep) * (1 if row.is_flow else -1)
    assert (forth > 0).all()
    assert timestep.min() >= 0
    assert timestep.max() < (1 if row.is_flow else MOST)


def timestep_of(step):
    return step.timestep


@every_sampler
def test_a_perfect_denoiser_leads_to_the_data(row):
    """Deterministic samplers converge to the exact flow, the others to the data's distribution."""
    if made(row, 2).stochastic:
        final = sampled(row, made(row, MOST), noise_of(400)).astype(np.float64)
        error = math.sqrt(VARIANCE / final.size)
        assert abs(final.mean() - MEAN) < 4 * error + 0.005
        assert abs(final.var() / VARIANCE - 1) < 4 * math.sqrt(2 / final.size) + 0.005
        return
    noise = noise_of()
    exact = exact_ends(row, noise, made(row, 50))
    errors = [np.abs(sampled(row, made(row, n), noise) - exact).max() for n in (50, 100, 200)]
    # Each is smaller, until rounding and the schedule's own step are all that is left.
    assert all(later < max(earlier / 1.6, 1e-3) for earlier, later in pairwise(errors))
    np.testing.assert_allclose(sampled(row, made(row, MOST), noise), exact, atol=0.02)


@every_sampler
def test_sampling_is_one_loop_on_the_device_and_values_do_not_recompile(row):
    @jax.jit
    def run(sampler, noise, key):
        return diffusion.sample(denoiser_of(row), sampler, noise, jnp.zeros(2, jnp.int32), key)

    arguments = (made(row, 20), noise_of(), jax.random.key(0))
    text = run.lower(*arguments).compile().as_text()
    assert "while(" in text
    for word in ("callback", "infeed", "outfeed", " send(", " recv("):
        assert word not in text
    with jax.transfer_guard("disallow"):
        placed = jax.device_put(arguments)
        run(*placed)
    option = next(name for name in ("edges", "sigmas", "schedule") if name in row.options)
    edges = np.linspace(0, 1, 21) ** 2
    others = {"edges": edges, "sigmas": edges[::-1], "schedule": OTHER["schedule"]}
    other = made(row, 20, **{option: others[option]})
    run(other, noise_of(seed=1), jax.random.key(1))
    assert run._cache_size() <= 2  # placed or not


@every_sampler
def test_every_setting_has_a_fingerprint_of_its_own(row):
    samplers = {"steps": row.make_fn(5), "none": row.make_fn(4)}
    other = OTHER | {"spacing": SPACED[row.is_flow]}
    samplers |= {name: row.make_fn(4, **{name: other[name]}) for name in row.options}
    found = {name: digest(sampler) for name, sampler in samplers.items()}
    for one, other in combinations(found, 2):
        assert found[one] != found[other], (one, other)
    assert digest(row.make_fn(4)) == found["none"]


@pytest.mark.parametrize(
    "row", [row for row in SAMPLERS.values() if row.is_flow], ids=lambda row: row.name
)
def test_a_network_is_called_in_its_own_units(row):
    """The same flow, said in any times and in both directions, leads to the same samples."""
    noise, ends, times_of = noise_of(), [], []
    whole = row.name in WHOLE  # published code calls at whole timesteps of 1000
    for times, direction in UNITS:
        sampler = row.make_fn(8, flow_times=times, velocity_to=direction)

        def denoise_fn(x, timestep, condition, times=times, direction=direction):
            time = (timestep - times[0]) / (times[1] - times[0])
            velocity = best_velocity(x, time, condition)
            return velocity if direction == "data" else -velocity

        final, steps = diffusion.sample_trajectory(denoise_fn, sampler, noise, None)
        for x, timestep, output in zip(steps.x, steps.timestep, steps.output, strict=True):
            expected = denoise_fn(x, jnp.full(2, timestep), None)
            np.testing.assert_allclose(output, expected, atol=1e-5)
        ends.append(np.asarray(final))
        timestep = np.asarray(sampler.table.timestep, np.float64)
        assert not (whole and times[0] == 1000) or (timestep % 1 == 0).all()
        times_of.append((timestep - times[0]) / (times[1] - times[0]))
    for end, found in zip(ends, times_of, strict=True):
        np.testing.assert_allclose(found, times_of[0], atol=1e-3 if whole else 1e-6)
        np.testing.assert_allclose(end, ends[0], atol=2e-3 if whole else 1e-5)


@every_sampler
def test_what_a_sampler_remembers_keeps_its_shape_and_starts_anew(row):
    sampler, x = made(row, 3), noise_of()
    state = diffusion.initial_state(sampler, x)
    assert (state is None) != isinstance(sampler, diffusion.MultistepSampler)
    given = jax.tree.map(jnp.zeros_like, x) if sampler.stochastic else None
    kinds, taken = jax.eval_shape(lambda: state), x
    for i in range(3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], sampler.table)
        step = diffusion.take_step(
            sampler, denoiser_of(row), taken, state, jnp.zeros(2, jnp.int32), one, given
        )
        taken, state = step.x_next, step.state
        assert jax.eval_shape(lambda state=state: state) == kinds
    if not sampler.stochastic:
        np.testing.assert_allclose(taken, sampled(row, sampler, x), atol=1e-5)
    # A first step does not read the state.
    first = jax.tree.map(lambda leaf: leaf[0], sampler.table)
    rubbish = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 3.0, leaf.dtype), kinds)
    ends = [
        diffusion.take_step(sampler, denoiser_of(row), x, s, jnp.zeros(2, jnp.int32), first, given)
        for s in (diffusion.initial_state(sampler, x), rubbish)
    ]
    np.testing.assert_allclose(ends[0].x_next, ends[1].x_next, atol=1e-6)


@every_sampler
@pytest.mark.parametrize("steps", [0, -1, 2.5, True, "ten", "", None, math.nan])
def test_a_bad_number_of_steps_is_refused_by_name(row, steps):
    # Where annotations are checked, as in these tests, a wrong kind is refused by them.
    with pytest.raises((ValueError, TypeError), match=r"steps=|spacing=|'steps'") as caught:
        row.make_fn(steps)
    assert repr(steps) in str(caught.value) or str(steps) in str(caught.value)


@every_sampler
def test_more_steps_than_the_schedule_has_are_refused(row):
    if "schedule" in row.options:
        with pytest.raises(ValueError, match=f"{MOST + 1} steps where the process has {MOST}"):
            row.make_fn(MOST + 1)
    assert row.make_fn(MOST).table.timestep.shape == (MOST,)


@pytest.mark.parametrize(
    ("row", "name"),
    [(row, name) for row in SAMPLERS.values() for name in row.options if name in BAD],
    ids=lambda value: getattr(value, "name", value),
)
def test_bad_options_are_refused_by_name(row, name):
    for value in BAD[name]:
        with pytest.raises((ValueError, TypeError), match=f"{name}="):
            row.make_fn(4, **{name: value})


def test_names_and_options_of_others_are_refused_by_name():
    with pytest.raises(
        ValueError, match="sampler='euler' is not known; use one of ddim, ddpm, dpm"
    ):
        sampler_named("euler")
    with pytest.raises(ValueError, match=r"eta=0.5 is an option of ddim, not of flow"):
        sampler_named("flow").chosen(eta=0.5)
    with pytest.raises(
        ValueError, match=r"clip=2 is an option of ddim, ddpm and dpm-solver\+\+, not of flow"
    ):
        sampler_named("flow").chosen(clip=2)
    assert sampler_named("ddim").chosen(eta=0.5, clip=None) == {"eta": 0.5}


@every_sampler
@pytest.mark.parametrize("solve", [False, True])
def test_it_calls_the_network_where_its_table_says(row, solve):
    if solve and "solve_fn" not in row.options:
        pytest.skip("it has one rule")
    sampler = made(row, 4, **({"solve_fn": OTHER["solve_fn"]} if solve else {}))
    grid, denoise_fn = np.asarray(called_timesteps(sampler)), denoiser_of(row)

    def known_only(x, timestep, condition):
        distance = jnp.min(jnp.abs(grid - timestep[:, None]), axis=1)
        is_known = (distance <= 2**-20 * np.abs(grid).max()).reshape(-1, 1, 1, 1)
        return jnp.where(is_known, denoise_fn(x, timestep, condition), jnp.nan)

    noise = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
    assert has_known_calls(sampler)
    assert np.isfinite(
        diffusion.sample(known_only, sampler, noise, None, key=jax.random.key(1))
    ).all()
