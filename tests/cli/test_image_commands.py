"""Small Sana, Z-Image and FLUX.2 go the road of commands, from a diffusers folder to an exported file."""

from __future__ import annotations

import json

import numpy as np
import pytest
from roads import relative
from safetensors.numpy import save_file

import qdit_jax as qdit
from qdit_convert import flux2, sana, z_image
from qdit_jax.cli import main

EXAMPLES = {"sana": sana, "z-image": z_image, "flux2": flux2}
LENGTH = 5


def run(*arguments):
    assert main([str(one) for one in arguments]) == 0, arguments


def written(folder, family):
    """Writes a small network as diffusers does; returns the options of `qdit convert` that it needs."""
    example = EXAMPLES[family].diffusers_example()
    rng = np.random.default_rng(0)
    arrays = {}
    for leaf in example.leaves:
        for key, shapes in leaf.expected.items():
            drawn = rng.standard_normal(shapes[0]) / np.sqrt(shapes[0][-1])
            around = 1 if "norm" in key and len(shapes[0]) == 1 and key.endswith("weight") else 0
            arrays[key] = (around + drawn).astype(np.float32)
    folder.mkdir()
    save_file(arrays, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(example.config))
    return [("--" + name.replace("_", "-"), value) for name, value in example.choices.items()]


def conditions(checkpoint, family, count=4):
    """Returns prompts, of different lengths and with a null one where the network takes these."""
    width = checkpoint.model.example_condition(1)["text"].shape[-1]
    rng = np.random.default_rng(1)
    found = {"text": rng.standard_normal((count, LENGTH, width)).astype(np.float32)}
    if family == "flux2":  # guided by a number that the network takes
        return found
    found["text_mask"] = np.arange(LENGTH) < 2 + np.arange(count)[:, None]
    return {**found, **{f"null_{name}": entry[:1] for name, entry in found.items()}}


@pytest.mark.slow
@pytest.mark.parametrize("family", EXAMPLES)
def test_from_a_folder_to_a_file(family, tmp_path):
    def at(name):
        return tmp_path / name

    options = written(at("in"), family)
    run("convert", at("in"), at("full"), *(part for option in options for part in option))
    full = qdit.load(at("full"))
    qdit.write_conditions(at("p.npz"), conditions(full, family), list("abcd"))
    prompts = ("--embeds", at("p.npz"))
    steps = ("--steps", 2, "--batch-size", 2)
    collect = ("--collect", "spread", "--num-samples", 4)
    run("calibrate", at("full"), at("items.npz"), *collect, *prompts, *steps)
    # Measuring assignments takes half the time of a road: once is enough.
    objective = ("--objective", "paired" if family == "sana" else "predicted")
    space = ("--weight-bits", 4, "--group-sizes", 4, 8, "--num-batches", 1, *objective)
    run("search", at("full"), at("search"), *prompts, *steps, *space, "--budget", "bytes=1.1x-g8")
    recipe = at("search") / "recipe.json"
    smooth = ("--method", "smoothquant", "--items", at("items.npz"))
    run("quantize", at("full"), at("small"), "--recipe", recipe, *smooth)
    compared = ("--against", at("full"), *prompts, *steps, "--num-samples", 2)
    run("evaluate", at("small"), *compared, "--out", at("evaluated"))
    found = json.loads((at("evaluated") / "metrics.json").read_text())
    assert found
    run("verify", at("small"), *compared, "--no-timing")
    run("export", at("small"), at("small.safetensors"))
    run("export", at("small.safetensors"), at("back"))
    samples = []
    for name in ("small", "back"):
        more = ("--num-samples", 2, "--numerics", "integer", "--out", at(f"{name}.npz"))
        run("sample", at(name), *prompts, *steps, *more)
        samples.append(np.load(at(f"{name}.npz"))["latents"])
    assert samples[0].shape == (2, *full.model.sample_shape())
    assert np.isfinite(samples[0]).all()
    np.testing.assert_array_equal(*samples)


@pytest.mark.slow
@pytest.mark.parametrize("family", EXAMPLES)
def test_static_scales_at_every_timestep(family, tmp_path):
    options = written(tmp_path / "in", family)
    full, stats, small = (tmp_path / name for name in ("full", "stats.npz", "small"))
    run("convert", tmp_path / "in", full, *(part for option in options for part in option))
    qdit.write_conditions(tmp_path / "p.npz", conditions(qdit.load(full), family), list("abcd"))
    prompts = ("--embeds", tmp_path / "p.npz", "--steps", 2, "--batch-size", 2, "--num-samples", 2)
    run("calibrate", full, stats, *prompts)
    static = (
        "--act-mode",
        "static-per-timestep",
        "--stats",
        stats,
        "--group-size",
        8,
        "--method",
        "rtn",
    )
    run("quantize", full, small, "--recipe", "w8a8", *static)
    found = []
    for checkpoint in (small, full):
        out = tmp_path / f"{checkpoint.name}.npz"
        run("sample", checkpoint, *prompts, "--out", out)
        found.append(np.load(out)["latents"])
    assert 0 < relative(*found) < 0.1
