"""Weights by timestep: the right kernels at every step, what they cost, saved, loaded and verified."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import quantized_layers, tiny_checkpoint
from told import Told

import qdit_jax as qdit
from qdit_jax import diffusion
from qdit_jax.cli import main
from qdit_jax.ptq import quantize_checkpoint, schedule_act_bits
from qdit_jax.quant import OVER_TIME, QTensor, other_kernel, with_act_bits, with_weight_bits
from qdit_jax.recipes import OverTime, Recipe, at_weight_bits
from qdit_jax.sampling import Denoiser, denoiser, sampler_timesteps

STEPS = 4
DATA = {"num_samples": 4, "num_steps": 4, "batch_size": 4}
LINEARS = {"blocks_0/attn/proj", "blocks_0/attn/qkv", "blocks_0/mlp/fc1", "blocks_0/mlp/fc2"}


@pytest.fixture(scope="module")
def full():
    return tiny_checkpoint()


def recipe_at(steps, name="w4a8"):
    timesteps = sampler_timesteps(diffusion.ddim(STEPS))
    over_time = OverTime.at_steps(timesteps, steps)
    return dataclasses.replace(Recipe.preset(name, group_size=16), over_time=over_time)


@pytest.fixture(scope="module")
def small(full):
    return qdit.quantize(full, "rtn", recipe_at({"0": "w8", "last": "w16a16"}))


def leaf_at(params, path):
    for name in path.split("/"):
        params = params[name]
    return params


def start(num=3):
    x = jax.random.normal(jax.random.key(1), (num, 4, 4, 4))
    return x, jnp.arange(num), jax.random.split(jax.random.key(2), num)


call = jax.jit(lambda denoise_fn, *args: denoise_fn(*args))


def test_every_step_runs_the_kernels_of_its_bits(full):
    sampler = diffusion.ddim(STEPS)
    small = qdit.quantize(full, "rtn", recipe_at({"0": "w8", "last": "w16"}, "w2a16"))
    whole = {
        bits: qdit.quantize(full, "rtn", Recipe.preset(f"w{bits}a16", group_size=16)).params
        for bits in (8, 2)
    } | {16: full.params}
    x, label, keys = start()
    samples = diffusion.sample(denoiser(small.model, small.params, None), sampler, x, label, keys)
    for step, bits in enumerate((8, 2, 2, 16)):
        row = jax.tree.map(lambda leaf, step=step: jnp.asarray(leaf)[step], sampler.table)
        network = Denoiser(whole[bits], full.model)
        x = sampler.step(lambda *args, network=network: call(network, *args), x, label, row, None)
        x = x.x_next
    assert apart(samples, x) < 1e-5
    for params in whole.values():
        others = diffusion.sample(denoiser(full.model, params, None), sampler, *start())
        assert apart(samples, others) > 1e-3


def apart(a, b):
    return float(np.linalg.norm(np.ravel(a - b)) / np.linalg.norm(np.ravel(b)))


@pytest.mark.parametrize("jitted", [False, True])
def test_samples_of_one_batch_may_have_different_kernels(full, small, jitted):
    x, label, _ = start()
    timesteps = sampler_timesteps(diffusion.ddim(STEPS))
    timestep = jnp.array([timesteps[0], timesteps[1], timesteps[-1]])
    mixed = Denoiser(small.params, small.model)
    found = call(mixed, x, timestep, label) if jitted else mixed(x, timestep, label)
    for i, (weights, acts) in enumerate(((8, None), (None, None), (16, 16))):
        params = with_act_bits(with_weight_bits(small.params, weights), acts)
        alone = call(Denoiser({**params, OVER_TIME: None}, full.model), x, timestep, label)
        np.testing.assert_allclose(found[i], alone[i], rtol=1e-4, atol=1e-4)


def test_what_is_held_is_each_kernel_once_per_bits(full, small):
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))  # noqa: E731
    plain = qdit.quantize(full, "rtn", Recipe.preset("w4a8", group_size=16))
    wide = qdit.quantize(full, "rtn", Recipe.preset("w8a8", group_size=16))
    assert quantized_layers(plain.params) == LINEARS
    more = 8 * STEPS
    for path in LINEARS:
        eight = leaf_at(small.params, f"{path}/kernel_w8")
        assert isinstance(eight, QTensor)
        jax.tree.map(np.testing.assert_array_equal, eight, leaf_at(wide.params, f"{path}/kernel"))
        same = leaf_at(small.params, f"{path}/kernel_w16")
        np.testing.assert_array_equal(same, leaf_at(full.params, f"{path}/kernel"))
        more += eight.nbytes + same.nbytes
    assert size(small.params) == size(plain.params) + more
    rows = {layer.path: layer for layer in qdit.plan(full.params, small.recipe)}
    row = rows["blocks_0/mlp/fc1/kernel_w8"]
    assert (row.bytes_before, row.bytes_after) == (0, leaf_at(small.params, row.path).nbytes)
    total = sum(layer.bytes_after - layer.bytes_before for layer in rows.values())
    assert size(small.params) == size(full.params) + total + 8 * STEPS


def test_kernels_of_the_asked_bits_are_shared(full):
    found = qdit.quantize(full, "rtn", recipe_at({"0": "w4a16"}))
    kernels = [path for path in names(found.params) if "kernel_w" in path]
    assert kernels == []
    assert found.params[OVER_TIME].weight_bits == (4, None)


def names(tree, prefix=""):
    for name, entry in tree.items():
        if isinstance(entry, dict):
            yield from names(entry, f"{prefix}{name}/")
        else:
            yield prefix + name


@pytest.mark.parametrize("method", ["gptq", "smoothquant", "adaround"])
def test_both_kernels_are_rounded_by_the_method(full, method):
    data = qdit.CalibrationData(**DATA)
    recipe = recipe_at({"0": "w6"})
    told = Told()
    found = qdit.quantize(
        full,
        method,
        recipe,
        data=data,
        progress_fn=told.tell,
    )
    once = dataclasses.replace(recipe, over_time=None)
    parts = [
        qdit.quantize(full, method, one, data=data) for one in (once, at_weight_bits(recipe, 6))
    ]
    for path in LINEARS:
        jax.tree.map(
            np.testing.assert_array_equal,
            leaf_at(found.params, f"{path}/kernel"),
            leaf_at(parts[0].params, f"{path}/kernel"),
        )
        six = leaf_at(found.params, f"{path}/kernel_w6")
        assert (six.bits, six.group_size) == (6, 16)
        if method != "smoothquant":  # whose coordinates are chosen for the recipe's own bits
            other = leaf_at(parts[1].params, f"{path}/kernel")
            jax.tree.map(np.testing.assert_array_equal, six, other)
    assert {layer.path for layer in told.layers} == LINEARS | {
        f"{path}/kernel_w6" for path in LINEARS
    }
    if told.counts:
        assert told.total == sum(told.counts)
    assert "blocks_0/mlp/fc1/kernel_w6" in found.metadata["quantization"]["layers"]


def test_from_disk_to_disk_is_the_same(full, small, tmp_path):
    qdit.save(tmp_path / "full", full)
    told = []
    quantize_checkpoint(
        tmp_path / "full",
        tmp_path / "out",
        recipe=small.recipe,
        on_layer=lambda path, kernel, q: told.append(path),
    )
    loaded = qdit.load(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, small.params)
    assert set(told) == LINEARS | {f"{path}/kernel_w8" for path in LINEARS}


@pytest.mark.parametrize("name", ["saved", "saved.safetensors"])
def test_a_saved_checkpoint_samples_the_same(small, tmp_path, name):
    qdit.save(tmp_path / name, small)
    loaded = qdit.load(tmp_path / name)
    assert loaded.recipe == small.recipe
    assert loaded.params[OVER_TIME].levels == [(8, None), (None, None), (16, 16)]
    sampler = diffusion.ddim(STEPS)
    samples = [qdit.generate(c, sampler, np.arange(2)) for c in (small, loaded)]
    np.testing.assert_array_equal(*samples)


def test_a_checkpoint_with_a_kernel_of_another_shape_is_refused(small, tmp_path):
    qdit.save(tmp_path / "saved", small)
    file = tmp_path / "saved" / "model.json"
    described = json.loads(file.read_text())
    entry = described["params"]["blocks_0/mlp/fc1/kernel_w16"]
    entry["shape"] = entry["shape"][::-1]
    file.write_text(json.dumps(described))
    with pytest.raises(
        qdit.UserError, match=r"kernel_w16 has shape .* and blocks_0/mlp/fc1/kernel"
    ):
        qdit.load(tmp_path / "saved")


def test_verify_names_both_kernels(full, small):
    options = {"num_samples": 2, "steps": 2, "batch_size": 2, "timing": False}
    found = qdit.verify(small, against=full, **options)
    assert found.passed, found.failures
    rows = {layer.path: layer for layer in found.layers}
    assert set(rows) == {
        *LINEARS,
        *(f"{path}/{other_kernel(bits)}" for path in LINEARS for bits in (8, 16)),
    }
    own, eight, whole = (
        rows[f"blocks_0/mlp/fc1{end}"] for end in ("", "/kernel_w8", "/kernel_w16")
    )
    assert (own.weights.bits, eight.weights.bits, whole.weights) == (4, 8, None)
    assert own.db + 10 < eight.db
    assert eight.note == "at other timesteps"
    held = sum(row.bytes_after for row in rows.values())
    assert held == sum(
        leaf.nbytes
        for path in LINEARS
        for end in ("kernel", "kernel_w8", "kernel_w16")
        for leaf in jax.tree.leaves(leaf_at(small.params, f"{path}/{end}"))
    )
    params = jax.tree.map(lambda leaf: leaf, small.params)
    del params["blocks_0"]["mlp"]["fc1"]["kernel_w8"]
    broken = qdit.verify(dataclasses.replace(small, params=params), against=full, **options)
    assert "blocks_0/mlp/fc1/kernel_w8: not quantized" in broken.failures


def test_integer_numerics_follow_the_schedule(small):
    sampler = diffusion.ddim(STEPS)
    samples = [
        qdit.generate(small, sampler, np.arange(2), guidance=None, numerics=numerics)
        for numerics in ("simulated", "integer")
    ]
    np.testing.assert_allclose(*samples, rtol=0.05, atol=0.05)


def test_a_schedule_may_leave_kernels_out_but_not_invent_them(full, small):
    fewer = schedule_act_bits(small, OverTime((900.0, 0.0), (None, None), (8, None)))
    assert "kernel_w16" not in fewer.params["blocks_0"]["mlp"]["fc1"]
    assert "kernel_w8" in fewer.params["blocks_0"]["mlp"]["fc1"]
    bare = schedule_act_bits(fewer, None)
    assert not any("kernel_w" in path for path in names(bare.params))
    with pytest.raises(ValueError, match=r"weights 6 bits .* and blocks_0/.*/kernel is held at 4"):
        schedule_act_bits(small, OverTime((900.0,), (None,), (6,)))
    with pytest.raises(ValueError, match="no kernel is quantized"):
        schedule_act_bits(full, OverTime((900.0,), (None,), (6,)))


def test_what_cannot_have_other_bits_is_refused_by_name(full):
    data = qdit.CalibrationData(**DATA)
    for method in ("brecq", "ptq4dit"):
        with pytest.raises(ValueError, match=f"'{method}' cannot do: .* use a method such as gptq"):
            qdit.quantize(full, method, recipe_at({"0": "w8"}), data=data)
    recipe = Recipe.preset("w4a8", group_size=16, weight_format="nf4")
    over_time = OverTime((900.0,), (None,), (8,))
    with pytest.raises(ValueError, match=r"has format 'nf4', which over_time cannot give 8 bits"):
        qdit.quantize(full, "nf4", dataclasses.replace(recipe, over_time=over_time))
    whole = OverTime((900.0, 0.0), (None, None), (16, None))
    found = qdit.quantize(full, "nf4", dataclasses.replace(recipe, over_time=whole))
    assert "kernel_w16" in found.params["blocks_0"]["mlp"]["fc1"]


def test_json_keeps_what_older_releases_wrote():
    over_time = OverTime((900.0, 1.0), (16, None), (None, None))
    assert over_time.weight_bits is None
    assert set(over_time.to_json()) == {"timesteps", "act_bits"}
    assert OverTime.from_json(over_time.to_json()) == over_time
    both = OverTime((900.0, 1.0), (16, None), (8, None))
    assert OverTime.from_json(both.to_json()) == both
    with pytest.raises(ValueError, match="2 timesteps and 1 weight_bits"):
        OverTime((900.0, 1.0), (16, None), (8,))
    with pytest.raises(ValueError, match="weight_bits=9 is not supported"):
        OverTime((900.0,), (16,), (9,))


def test_quantize_takes_steps_by_number(full, tmp_path, capsys):
    qdit.save(tmp_path / "full", full)
    given = ["quantize", str(tmp_path / "full"), str(tmp_path / "out"), "--recipe", "w4a4"]
    given += ["--group-size", "16", "--steps", "4", "--method", "rtn"]
    options = ["--steps-at", "0-1,last=16", "--steps-at", "0=w8a8"]
    assert main([*given, *options]) == 0
    printed = capsys.readouterr().out
    assert "blocks_0/mlp/fc1/kernel_w8" in printed
    found = qdit.load(tmp_path / "out")
    assert found.recipe.over_time == OverTime(
        sampler_timesteps(diffusion.ddim(4)), (8, 16, None, 16), (8, None, None, None)
    )
    assert main(["inspect", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    levels = ("w8a8", "a16", "as the rules say", "a16")
    shown = zip(found.recipe.over_time.timesteps, levels, strict=True)
    text = "; ".join(f"{timestep:g}: {level}" for timestep, level in shown)
    assert f"bits_over_time: timesteps {text}" in printed
    assert f"\nvalues: {sum(leaf.size for leaf in jax.tree.leaves(full.params)):,}\n" in printed
    for wrong, message in (
        (["--steps-at", "4=16"], "'4' is not within the 4 steps 0 to 3"),
        (["--steps-at", "0=9"], "act_bits=9 is not supported"),
        (["--steps-at", "0"], "'0' cannot be read; write STEPS=BITS"),
        (["--steps-at", "first=16"], "'first' is not a step"),
    ):
        assert main([*given, *wrong, "--force"]) == 2
        assert message in capsys.readouterr().err
    given[given.index("w4a4")] = "w4a16"
    assert main([*given, "--force", "--steps-at", "0=16"]) == 2
    assert "--steps-at 0=a16 has no effect on activations" in capsys.readouterr().err
    assert main([*given, "--force"]) == 2
    assert "--steps 4 has no effect" in capsys.readouterr().err
