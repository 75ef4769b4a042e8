"""Checkpoints and settings that do not fit are refused, by the library and by every verb."""

from __future__ import annotations

import os

import jax
import pytest
from tiny_models import CONFIG, random_params, tiny_checkpoint, tiny_vae

from qdit_jax.allocation import EvolutionSettings, Rollouts, search
from qdit_jax.calibration import calibrate, collect_items
from qdit_jax.checkpoint import Checkpoint, save
from qdit_jax.cli import main
from qdit_jax.diffusion import ddim
from qdit_jax.models import DiT
from qdit_jax.ptq import quantize_params
from qdit_jax.recipes import Recipe
from qdit_jax.sampling import check_numerics, denoiser, generate

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("unfit")
    full = tiny_checkpoint(in_channels=1)
    recipe = Recipe.preset("w4a8", full.params, group_size=16)
    params = quantize_params(full.params, recipe=recipe)
    metadata = {"quantized_from": "full"}
    save(base / "full", full)
    save(base / "small", Checkpoint(full.model, params, recipe, metadata))
    model = DiT(**{**CONFIG, "null_class": False, "in_channels": 1})
    save(base / "no_null", Checkpoint(model, random_params(model)))
    save(base / "vae", tiny_vae())
    return base


VERBS = {
    "calibrate": ["calibrate", "{}", "out.npz", "--num-samples", "1", "--steps", "2"],
    "search": ["search", "{}", "out", "--steps", "2", "--num-batches", "1"],
    "schedule": ["schedule", "{}", "out", "--act-bits", "4", "8", "--mean-bits", "6"],
    "evaluate": ["evaluate", "{}", "--num-samples", "2", "--steps", "2", "--out", "out"],
    "bench": ["bench", "{}", "--batch", "1", "--repeats", "2"],
    "verify": ["verify", "{}", "--against", "{}", "--num-samples", "2"],
    "sample": ["sample", "{}", "--steps", "2", "--num-samples", "1", "--out", "x.npz"],
    "quantize": ["quantize", "{}", "out", "--recipe", "w4a8", "--layers", ".*"],
    "inspect": ["inspect", "{}", "--stats", "--out", "out"],
}


def refused(folder, monkeypatch, capsys, verb, name, *options):
    """Returns the one line that a verb refuses with, having written nothing."""
    monkeypatch.chdir(folder)
    before = sorted(os.listdir(folder))
    assert main([*(word.format(name) for word in VERBS[verb]), *options]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert sorted(os.listdir(folder)) == before
    return printed


@pytest.mark.parametrize("verb", VERBS)
def test_an_autoencoder_is_no_diffusion_model(folder, monkeypatch, capsys, verb):
    line = refused(folder, monkeypatch, capsys, verb, "vae")
    assert "vae holds an AutoencoderKL (family vae), which is not a diffusion model" in line


@pytest.mark.parametrize("verb", ["calibrate", "search"])
def test_a_quantized_checkpoint_is_refused_where_full_precision_is_needed(
    folder, monkeypatch, capsys, verb
):
    line = refused(folder, monkeypatch, capsys, verb, "small")
    assert "small is quantized already (w4a8-g16)" in line
    assert "give the full-precision checkpoint (it was quantized from full)" in line


@pytest.mark.parametrize("verb", ["calibrate", "search", "inspect"])
def test_guidance_needs_a_null_class(folder, monkeypatch, capsys, verb):
    line = refused(folder, monkeypatch, capsys, verb, "no_null", "--guidance", "2")
    assert "--guidance 2.0 needs a null class" in line
    assert "use --guidance 1." in line


@pytest.mark.parametrize("verb", ["sample", "evaluate"])
def test_the_way_out_is_the_command_lines(folder, monkeypatch, capsys, verb):
    line = refused(folder, monkeypatch, capsys, verb, "no_null", "--guidance", "2")
    assert "use --guidance 1." in line


def test_a_network_without_null_class_calibrates_by_default(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main([word.format("no_null") for word in VERBS["calibrate"]]) == 0
    (folder / "out.npz").unlink()


@pytest.mark.parametrize(("verb", "name"), [("calibrate", "--hessians"), ("quantize", "--layers")])
def test_a_pattern_that_matches_nothing_is_named(folder, monkeypatch, capsys, verb, name):
    line = refused(folder, monkeypatch, capsys, verb, "full", name, "nothing")
    assert "nothing" in line
    assert "matches no layer" in line


@pytest.mark.parametrize("name", ["num_batches", "batch_size", "num_steps", "num_calibration",
                                  "num_probes", "per_device"])  # fmt: skip
def test_a_search_names_the_count_that_is_wrong(name):
    with pytest.raises(ValueError, match=f"^{name}=0 is not supported"):
        Rollouts(**{name: 0})


@pytest.mark.parametrize("name", ["population", "num_kept"])
def test_an_evolution_names_the_count_that_is_wrong(name):
    with pytest.raises(ValueError, match=f"^{name}=0 is not supported"):
        EvolutionSettings(**{name: 0})
    with pytest.raises(ValueError, match=r"^num_generations=-1 is not supported"):
        EvolutionSettings(num_generations=-1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_samples": 0}, ValueError, "num_samples=0 is not supported"),
        ({"batch_size": 0}, ValueError, "batch_size=0 is not supported"),
        ({"guidance": float("nan")}, ValueError, "guidance=nan is not supported"),
    ],
)
def test_calibration_names_what_is_wrong(options, error, message):
    for fn in (calibrate, collect_items):
        with pytest.raises(error, match=message):
            fn(tiny_checkpoint(), KEY, sampler=ddim(2), **options)


def test_calibration_checks_patterns_and_tokens():
    for options, message in (
        ({"hessians": "("}, r"hessians='\(' is not a regular expression"),
        ({"hessians": "nothing"}, "hessians='nothing' matches no layer"),
        ({"num_tokens": -1}, "num_tokens=-1 is not supported"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(tiny_checkpoint(), KEY, 1, sampler=ddim(2), **options)


def test_the_library_refuses_an_autoencoder_too():
    vae = tiny_vae()
    for fn in (
        lambda: calibrate(vae, KEY),
        lambda: collect_items(vae, KEY),
        lambda: generate(vae, ddim(2), [0]),
        lambda: search(vae, KEY),
    ):
        with pytest.raises(ValueError, match="which is not a diffusion model"):
            fn()


def test_integer_numerics_need_weights_and_inputs(folder):
    full = tiny_checkpoint()
    for name, message in (("w4a16", "no layer quantizes its inputs"), ("w16a8", "nothing is quan")):
        recipe = Recipe.preset(name, full.params, group_size=16)
        params = quantize_params(full.params, recipe=recipe)
        check_numerics(params, "simulated")
        with pytest.raises(ValueError, match=message):
            check_numerics(params, "integer")
        with pytest.raises(ValueError, match=message):
            generate(Checkpoint(full.model, params, recipe), ddim(2), [0], numerics="integer")
    recipe = Recipe.preset("w4a8", full.params, group_size=16)
    check_numerics(quantize_params(full.params, recipe=recipe), "integer")
    with pytest.raises(ValueError, match="numerics='fast' is not known"):
        check_numerics(full.params, "fast")


def test_guided_channels_are_at_most_those_there_are():
    full = tiny_checkpoint()  # 4 channels
    for channels in (None, 1, 3, 4):
        denoiser(full.model, full.params, 1.5, channels)
    with pytest.raises(ValueError, match="guidance_channels=5 is more than the 4 channels"):
        denoiser(full.model, full.params, 1.5, 5)
    with pytest.raises(ValueError, match="guidance_channels=0 is not supported"):
        denoiser(full.model, full.params, 1.5, 0)
    gray = tiny_checkpoint(in_channels=1)
    denoiser(gray.model, gray.params)  # 3 as published, at most all
