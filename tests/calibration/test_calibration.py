"""Calibration: statistics by half and timestep, resuming, and collections of single inputs."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import layer_ranges
from told import Told

import qdit_convert
import qdit_jax as qdit
from qdit_jax.calibration import calibrate, collect_items, qdit_release_steps, trajectory
from qdit_jax.calibration.items import spread_steps, trajectory_items
from qdit_jax.models import build_model
from qdit_jax.sampling import denoiser
from qdit_jax.testing import realistic_dit

STEPS = 3
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def checkpoint():
    return qdit.Checkpoint(*realistic_dit(0, hidden_size=48, depth=1, num_heads=4))


def run(checkpoint, **options):
    return calibrate(
        checkpoint, KEY, 4, sampler=qdit.ddim(steps=STEPS), batch_size=2,
        hessians="blocks_0/attn/qkv", num_tokens=3, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def stats(checkpoint):
    return run(checkpoint)


def assert_equal(found, expected):
    np.testing.assert_array_equal(found.timesteps, expected.timesteps)
    for kind in ("low", "high", "hessians", "tokens"):
        assert getattr(found, kind).keys() == getattr(expected, kind).keys()
        for path, array in getattr(expected, kind).items():
            np.testing.assert_array_equal(getattr(found, kind)[path], array)
    assert found.halves.keys() == expected.halves.keys()
    for half in expected.halves:
        assert_equal(found.halves[half], expected.halves[half])


def test_both_halves_are_recorded_at_every_timestep(checkpoint, stats):
    model, params = checkpoint.model, checkpoint.params
    guided = denoiser(model, params, 1.5)
    sampler = qdit.ddim(steps=STEPS)
    batches = [
        (jnp.array(i), *trajectory(guided, sampler, model, KEY, np.array(i), jnp.array(i)))
        for i in ([0, 1], [2, 3])
    ]
    for half in ("conditional", "null"):
        low, high = np.inf, -np.inf
        for label, x, timestep in batches:
            label = label if half == "conditional" else jnp.full_like(label, 10)
            t = jnp.full(2, float(timestep[1]))
            found = layer_ranges(params, x[1], t, label, model=model)["blocks_0/mlp/fc1"]
            low, high = np.minimum(low, found[0]), np.maximum(high, found[1])
        one = stats.halves[half]
        np.testing.assert_allclose(one.low["blocks_0/mlp/fc1"][1], low, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(one.high["blocks_0/mlp/fc1"][1], high, rtol=1e-4, atol=1e-4)
    path = "blocks_0/mlp/fc1"
    both = np.minimum(stats.halves["conditional"].low[path], stats.halves["null"].low[path])
    np.testing.assert_array_equal(stats.low[path], both)
    assert (stats.absmax(path) == np.maximum(-stats.low[path], stats.high[path])).all()
    assert not np.array_equal(stats.halves["null"].low[path], both)


def test_operands_hessians_and_tokens_are_recorded(stats):
    assert stats.low["blocks_0/attn/operands/q"].shape == (STEPS, 12)
    assert (stats.low["blocks_0/attn/operands/softmax"] >= 0).all()
    assert (stats.high["blocks_0/attn/operands/softmax"] <= 1).all()
    assert list(stats.hessians) == ["blocks_0/attn/qkv"]
    tokens = stats.tokens["blocks_0/attn/qkv"]
    assert tokens.shape == (STEPS, 2 * 2 * 3, 48)  # batches, halves, tokens of a call
    assert (tokens >= stats.low["blocks_0/attn/qkv"][:, None] - 1e-6).all()
    assert np.abs(tokens).sum(-1).min() > 0
    hessian = stats.hessians["blocks_0/attn/qkv"]
    np.testing.assert_allclose(hessian, hessian.T, rtol=1e-4, atol=1e-3 * np.abs(hessian).max())
    assert (np.diag(hessian) <= stats.absmax("blocks_0/attn/qkv").max(0) ** 2 * 1.001).all()


def test_a_killed_run_goes_on_to_the_same_statistics(checkpoint, stats, tmp_path):
    file = tmp_path / "unfinished.npz"

    def kill(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, unfinished=file, progress_fn=kill)
    seen = Told()
    assert_equal(run(checkpoint, unfinished=file, progress_fn=seen.tell), stats)
    assert seen.counts == [2, 2]
    with pytest.raises(qdit.UserError, match="unfinished calibration with other settings"):
        calibrate(checkpoint, KEY, 6, sampler=qdit.ddim(steps=STEPS), unfinished=file)
    file.write_bytes(b"no archive")
    with pytest.raises(qdit.UserError, match="is not an unfinished calibration"):
        run(checkpoint, unfinished=file)


def test_statistics_survive_their_file(stats, tmp_path):
    stats.save(tmp_path / "stats.npz")
    assert_equal(qdit.Stats.load(tmp_path / "stats.npz"), stats)


def test_static_operands_come_from_their_statistics(checkpoint, stats):
    recipe = qdit.Recipe.preset("w16a8", act_mode="static", group_size=0)
    recipe = recipe.with_part("attention", "w16a8", act_mode="static")
    params = qdit.quantize_params(checkpoint.params, recipe=recipe, stats=stats)
    act = params["blocks_0"]["attn"]["softmax_quant"]
    np.testing.assert_allclose(
        act.scale, stats.high["blocks_0/attn/operands/softmax"].max() / 255, rtol=1e-5
    )
    x = jax.random.normal(KEY, (1, 8, 8, 4))
    at = jnp.zeros(1), jnp.zeros(1, int)
    apply = jax.jit(checkpoint.model.apply)
    full, out = (apply({"params": p}, x, *at) for p in (checkpoint.params, params))
    assert 0 < jnp.linalg.norm(out - full) < jnp.linalg.norm(full)


def test_static_ranges_may_be_searched_on_the_kept_tokens(checkpoint, stats):
    path = "blocks_0/mlp/fc2"

    def act(range_fn, **options):
        spec = qdit.ActSpec(4, 0, range_fn=range_fn, mode="static", **options)
        recipe = qdit.Recipe((qdit.Rule(path, qdit.LayerSpec(None, spec)),))
        params = qdit.quantize_params(checkpoint.params, recipe=recipe, stats=stats)
        return params["blocks_0"]["mlp"]["fc2"]["act_quant"]

    tokens = jnp.asarray(stats.tokens[path])

    def error(quantizer):
        return float(jnp.square(quantizer(tokens) - tokens).sum())

    searched, plain = act(qdit.ranges.mse()), act(qdit.ranges.minmax)
    assert searched.scale.shape == (1,)
    assert searched.scale < plain.scale
    assert error(searched) < error(plain)
    table = act(qdit.ranges.percentile(0.99), per_timestep=True)
    for i in range(STEPS):
        low, high = np.quantile(stats.tokens[path][i], [0.01, 0.99])
        expected = (max(high, 0) - min(low, 0)) / 15
        np.testing.assert_allclose(table.scale[i], expected, rtol=0.05)
    without = qdit.Stats(stats.timesteps, stats.low, stats.high)
    recipe = qdit.Recipe.preset(
        "w16a8", act_mode="static", act_range_fn=qdit.ranges.mse(), group_size=0
    )
    with pytest.raises(ValueError, match=r"'mse' of the input of .* needs tokens"):
        qdit.quantize_params(checkpoint.params, recipe=recipe, stats=without)


def test_the_authors_collection_equals_the_recorded_one(golden):
    read = qdit_convert.read_model(golden("dit_A.pt"), num_heads=4)
    model = build_model(read.family, read.config)
    recorded = np.load(golden("calibration_collect.npz"))
    index = np.arange(4)
    items = trajectory_items(
        denoiser(model, read.params, guidance=float(recorded["cfg_scale"])),
        qdit.ddim(steps=int(recorded["num_steps"])),
        jnp.asarray(np.moveaxis(recorded["z"], 1, -1)),
        jnp.asarray(recorded["y"], jnp.int32),
        None,
        index,
        qdit_release_steps(int(recorded["numpy_seed"]))(index, int(recorded["num_steps"])),
    )
    expected = np.moveaxis(recorded["calib_x"], 1, -1)
    np.testing.assert_allclose(items.x, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(items.timestep, recorded["calib_t"])
    np.testing.assert_array_equal(items.condition, recorded["calib_y"])


def test_items_see_labels_and_the_null_class(checkpoint):
    sampler = qdit.ddim(steps=STEPS)
    items = collect_items(checkpoint, KEY, 3, sampler=sampler, choose_fn=spread_steps(2))
    assert items.x.shape == (12, 8, 8, 4)
    np.testing.assert_array_equal(items.condition, [0, 0, 1, 1, 2, 2] + [10] * 6)
    np.testing.assert_array_equal(items.x[:6], items.x[6:])
    alone = collect_items(checkpoint, KEY, 3, sampler=sampler, null=False, batch_size=2)
    assert set(alone.condition) == {0, 1, 2}


def test_chosen_steps_cover_the_trajectory():
    steps = spread_steps(4)(np.arange(200), 50)
    counts = np.bincount(steps.ravel(), minlength=50)
    assert counts.min() >= 0.7 * counts.mean()
    assert all(len(set(row)) == 4 for row in steps)
    assert spread_steps(9)(np.arange(2), 3).shape == (2, 3)
    with pytest.raises(ValueError, match="use batch_size=3 or less"):
        qdit_release_steps(0)(np.arange(4), 3)


def last_value_changed(checkpoint):
    params = jax.tree.map(jnp.asarray, checkpoint.params)
    kernel = params["blocks_0"]["mlp"]["fc2"]["kernel"]
    params["blocks_0"]["mlp"]["fc2"]["kernel"] = kernel.at[-1, -1].add(1e-3)
    return qdit.Checkpoint(checkpoint.model, params)


def network_changed(checkpoint):
    return qdit.Checkpoint(checkpoint.model.clone(mlp_norm_eps=1e-5), checkpoint.params)


OTHER_SETTINGS = [
    ("params", {"checkpoint": last_value_changed}),
    ("model", {"checkpoint": network_changed}),
    ("key", {"key": jax.random.key(9)}),
    ("num_samples", {"num_samples": 6}),
    ("sampler", {"sampler": qdit.ddim(steps=STEPS, eta=0.5)}),
    ("guidance", {"guidance": 3.0}),
    ("batch_size", {"batch_size": 1}),
    ("conditions", {"conditions": np.array([1, 2])}),
    ("hessians", {"hessians": None}),
    ("num_tokens", {"num_tokens": 2}),
    ("shape", {"shape": (8, 8, 4)}),
]


def test_every_setting_of_a_calibration_is_changed_below():
    """A new argument fails here until it has a line of its own."""
    changed = {name for _, changes in OTHER_SETTINGS for name in changes}
    arguments = set(inspect.signature(calibrate).parameters)
    assert arguments - {"unfinished", "progress_fn", "processes"} == changed


@pytest.mark.parametrize(("name", "changes"), OTHER_SETTINGS)
def test_an_unfinished_calibration_is_taken_up_by_the_same_settings_only(
    checkpoint, tmp_path, name, changes
):
    def kill(event):
        raise KeyboardInterrupt

    file = tmp_path / "unfinished.npz"
    base = {
        "sampler": qdit.ddim(steps=STEPS), "batch_size": 2, "guidance": 1.5,
        "hessians": "blocks_0/attn/qkv", "num_tokens": 3, "num_samples": 4,
    }  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        calibrate(checkpoint, KEY, **base, unfinished=file, progress_fn=kill)
    changes = dict(changes)
    other = changes.pop("checkpoint", lambda same: same)(checkpoint)
    key = changes.pop("key", KEY)
    with pytest.raises(qdit.UserError, match=rf"\(its {name} is not the same\)"):
        calibrate(other, key, **{**base, **changes}, unfinished=file)
