"""`qdit evaluate` on checkpoints: what it measures, and that a killed run loses nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_models import tiny_vae

from qdit_jax import checkpoint as checkpoints
from qdit_jax import diffusion, metrics, sampling
from qdit_jax.checkpoint.fingerprint import digest
from qdit_jax.cli import evaluate
from qdit_jax.cli.options import Parser
from qdit_jax.evaluation import Contender, Protocol, locked, run_evaluation, summarize
from qdit_jax.evaluation.pictures import difference_images
from qdit_jax.ptq import quantize_params
from qdit_jax.recipes import Recipe
from qdit_jax.testing import realistic_dit

PIXELS = {"input_size": 16, "patch_size": 4, "in_channels": 1, "hidden_size": 32, "depth": 1}
NUM_SAMPLES, STEPS = 6, 3


def small(num_heads=2, **config):
    model, params = realistic_dit(0, num_heads=num_heads, **{**PIXELS, **config})
    return checkpoints.Checkpoint(model, params)


def quantized(checkpoint, name="w4a8", **options):
    recipe = Recipe.preset(name, checkpoint.params, group_size=32, **options)
    params = quantize_params(checkpoint.params, recipe=recipe)
    return dataclasses.replace(checkpoint, params=params, recipe=recipe)


def run(*arguments):
    parser = Parser(prog="qdit")
    evaluate.add_parser(parser.add_subparsers())
    args = parser.parse_args(["evaluate", *map(str, arguments)])
    args.run(args)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Returns checkpoints: full precision, two quantized, a broken one, others that do not fit."""
    base = tmp_path_factory.mktemp("checkpoints")
    full = small()
    found = {"full": full, "w4": quantized(full), "w8": quantized(full, "w8a8")}
    found["large"] = small(input_size=32)
    latents = small(input_size=8, in_channels=4)
    found["latents"], found["latents_w4"] = latents, quantized(latents)
    found["schedule"] = dataclasses.replace(full, metadata={"scheduler": {"beta_end": 0.01}})
    found["vae"] = tiny_vae()
    for name, checkpoint in found.items():
        checkpoints.save(base / name, checkpoint)
    return base


COMMON = ("--num-samples", NUM_SAMPLES, "--steps", STEPS, "--batch-size", 4)


@pytest.fixture(scope="module")
def compared(folders, tmp_path_factory):
    """Returns the folder of a run with everything in it."""
    out = tmp_path_factory.mktemp("runs") / "compared"
    against = ("--against", folders / "full", "--compare", folders / "w8")
    reference = ("--reference", "demo", "--min-samples", 2)
    run(folders / "w4", *against, *reference, *COMMON, "--out", out)
    return out


def summary_of(out):
    return json.loads((out / "metrics.json").read_text())


def generated(folder):
    checkpoint = checkpoints.load(folder)
    label = np.arange(NUM_SAMPLES) % 10
    return sampling.generate(checkpoint, diffusion.ddim(STEPS), label, batch_size=4)


def test_paired_measures_are_those_of_generated_samples(folders, compared):
    full, w4 = generated(folders / "full"), generated(folders / "w4")
    paired = summary_of(compared)["paired"]["w4"]
    expected = metrics.signal_to_noise_db(full, w4)
    assert paired["latent_snr_db"]["estimate"] == pytest.approx(expected.mean(), abs=0.05)
    assert paired["latent_snr_db"]["low"] < expected.mean() < paired["latent_snr_db"]["high"]
    psnr = metrics.psnr(np.clip(full, -1, 1), np.clip(w4, -1, 1))
    assert paired["image_psnr_db"]["estimate"] == pytest.approx(psnr.mean(), abs=0.05)
    assert {"image_ssim", "image_cosine", "latent_cosine"} <= set(paired)


def test_finer_codes_are_closer_and_the_test_says_how_surely(compared):
    summary = summary_of(compared)
    w4, w8 = (summary["paired"][name]["latent_snr_db"]["estimate"] for name in ("w4", "w8"))
    assert w8 > w4 + 3
    test = summary["comparison"]["a_minus_b"]["latent_snr_db"]
    assert test["difference"]["estimate"] == pytest.approx(w4 - w8)
    assert test["difference"]["high"] < 0
    assert test["p_value"] == pytest.approx(2 / 2**NUM_SAMPLES)


def test_errors_over_the_trajectory_end_at_the_final_latents(compared):
    summary = summary_of(compared)
    for name in ("w4", "w8"):
        entry = summary["trajectory"][name]
        assert len(entry["timestep"]) == STEPS
        assert entry["timestep"] == sorted(entry["timestep"], reverse=True)
        final = summary["paired"][name]["latent_snr_db"]["estimate"]
        assert entry["drift_db"]["mean"][-1] == pytest.approx(final)
        assert len(entry["output_db"]["mean"]) == STEPS
    # One call on the same noise: the first drift follows from the same error.
    assert summary["trajectory"]["w8"]["output_db"]["mean"][0] > 10


def test_without_probed_samples_everything_else_is_measured(folders, tmp_path):
    contenders = [Contender(n, checkpoints.load(folders / n)) for n in ("full", "w4")]
    protocol = Protocol(diffusion.ddim(2), {"steps": 2}, num_samples=2, batch_size=2, num_probed=0)
    done = run_evaluation(contenders, protocol, tmp_path / "run")
    summary = summarize(done, contenders)
    assert set(summary["trajectory"]["w4"]) == {"timestep", "drift_db"}
    assert {"latent_snr_db", "image_psnr_db"} <= set(summary["paired"]["w4"])


def test_the_archive_is_what_other_evaluators_read(compared):
    stored = np.load(compared / "samples.npz")
    assert stored["arr_0"].shape == (NUM_SAMPLES, 16, 16, 1)
    assert stored["arr_0"].dtype == np.uint8
    np.testing.assert_array_equal(stored["label"], np.arange(NUM_SAMPLES) % 10)
    assert metrics.image_shape(compared / "samples.npz") == (NUM_SAMPLES, 16, 16, 1)
    full = np.load(compared / "reference_samples.npz")["arr_0"]
    assert (full != stored["arr_0"]).any()


def test_what_ran_is_named_with_bytes_and_time(compared):
    summary = summary_of(compared)
    numerics = [model["numerics"] for model in summary["models"]]
    assert numerics == ["full precision", *["quantized, simulated numerics"] * 2]
    used = [list(model["implementations"]) for model in summary["models"]]
    assert used == [[], ["xla_cpu"], ["xla_cpu"]]
    assert all(list(model["attention"]) == ["xla"] for model in summary["models"])
    sizes = [model["bytes"] for model in summary["models"]]
    assert sizes[0] > sizes[2] > sizes[1]
    assert all(model["seconds_per_sample"] > 0 for model in summary["models"])
    assert set(summary["scores"]) == {"full", "w4", "w8"}
    label = summary["scores"]["w4"]["frechet_distance"]["label"]
    assert label == metrics.DEMO_FRECHET_DISTANCE


def test_the_report_stands_alone(compared):
    page = (compared / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert page.count("data:image/png") == 4
    for text in ("quantized, simulated numerics", "Error over timesteps", "Ranges by layer"):
        assert text in page
    assert Image.open(compared / "pictures.png").width > 5 * 3 * 48


def test_a_run_goes_on_bit_for_bit_with_what_is_there(folders, compared, tmp_path):
    out = tmp_path / "again"
    shutil.copytree(compared, out)
    second = out / "shards" / "00000004.npz"
    second.write_bytes(second.read_bytes()[:900])
    (out / "shards" / ".00000004.npz.x").write_bytes(b"half")
    for name in ("samples.npz", "metrics.json", "report.html"):
        (out / name).unlink()
    first = (out / "shards" / "00000000.npz").stat().st_mtime_ns
    against = ("--against", folders / "full", "--compare", folders / "w8")
    # The batch is that of the run, whatever this machine's default is.
    run(folders / "w4", *against, *COMMON[:4], "--out", out)
    assert (out / "shards" / "00000000.npz").stat().st_mtime_ns == first
    assert sorted(os.listdir(out / "shards")) == ["00000000.npz", "00000004.npz"]
    assert (out / "samples.npz").read_bytes() == (compared / "samples.npz").read_bytes()
    for part in ("paired", "trajectory", "comparison"):
        assert summary_of(out)[part] == summary_of(compared)[part]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("w4", ("--guidance", 2), "guidance 1.5, not 2.0"),
        ("w4", ("--seed", 1), "seed 0, not 1"),
        ("w4", ("--steps", 4), "steps 3, not 4"),
        ("w4", ("--num-samples", 8), "num_samples 6, not 8"),
        ("w4", ("--batch-size", 2), "batch_size 4, not 2"),
        ("w4", ("--numerics", "integer"), "numerics simulated, not integer"),
        ("w8", (), "models .* not"),
    ],
)
def test_a_run_with_other_settings_is_not_continued(folders, compared, model, options, message):
    before = (compared / "metrics.json").read_bytes()
    against = ("--against", folders / "full", "--compare", folders / "w8")
    with pytest.raises(ValueError, match=message):
        run(folders / model, *against, *COMMON, *options, "--out", compared)
    assert (compared / "metrics.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("w4", "--against", "large"), "large has sample shape \\(32, 32, 1\\) and w4 has"),
        (("w4", "--against", "schedule"), "trained on different schedules"),
        (("w4", "--against", "absent"), "does not exist"),
        (("vae",), "generates no images by itself"),
        (("w4", "--compare", "w8"), "needs --against"),
        (("w4", "--num-samples", "1"), "use a whole number from 2"),
        (("w4", "--batch-size", "0"), "use a whole number from 1"),
        (("w4", "--range-samples", "-1"), "use a whole number from 0"),
        (("w4", "--guidance-channels", "none"), "neither a positive number nor 'all'"),
        (("w4", "--features", "inception", "x"), "--features needs --reference"),
        (("w4", "--vae", "full"), "is not an autoencoder"),
        (("full", "--numerics", "integer"), "nothing is quantized"),
        (("w4", "--split-size", "9"), "--split-size 9 has no effect: scores compare with a --ref"),
        (("w4", "--kernel-samples", "9"), "--kernel-samples 9 has no effect"),
        (("w4", "--min-samples", "9"), "--min-samples 9 has no effect"),
        (("w4", "--preprocessing", "port"), "--preprocessing port has no effect"),
        (("w4", "--guidance-channels", "2"), "guidance_channels=2 is more than the 1 channels"),
        (("w4", "--reference", "demo", "--num-samples", "64"), "64 samples are too few"),
        (("large", "--reference", "demo"), "take digits of 16x16"),
        (("latents", "--reference", "demo"), "no autoencoder is known"),
        (("w4", "--samples", "a.npz"), "give a checkpoint to sample, or --samples"),
        ((), "give a checkpoint to sample, or --samples"),
        (("w4", "--pictures", "p.png"), "--pictures is an option of evaluating ready-made files"),
        (
            ("--samples", "a.npz", "--guidance", "2"),
            "--guidance is an option of evaluating checkpoints",
        ),
        (("--samples", "a.npz"), "--samples needs --reference"),
        (("w4", "--sampler", "flow"), "predicts noise"),
        (("w4", "--out", "full"), "holds .* and no evaluation"),
        (("w4", "--out", "metrics.json"), "it is a folder for all results"),
    ],
)
def test_bad_input_gets_a_sentence(folders, monkeypatch, arguments, message):
    monkeypatch.chdir(folders)
    before = sorted(os.listdir(folders))
    with pytest.raises(ValueError, match=message):
        run(*arguments)
    assert sorted(os.listdir(folders)) == before
    assert "lock" not in os.listdir("full")


def test_a_file_in_the_place_of_the_folder(folders, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="out is a file"):
        run(folders / "w4", *COMMON, "--out", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_one_process_at_a_time(folders, tmp_path):
    with locked(tmp_path), pytest.raises(ValueError, match="another process writes"):
        run(folders / "w4", *COMMON, "--out", tmp_path)


def test_samples_that_are_not_finite_are_named(folders, tmp_path):
    full = checkpoints.load(folders / "full")
    params = jax.tree.map(lambda leaf: leaf, full.params)
    params["final_layer"]["linear"]["bias"] = params["final_layer"]["linear"]["bias"] * np.nan
    broken = Contender("broken", dataclasses.replace(full, params=params))
    protocol = Protocol(diffusion.ddim(2), {"sampler": "DDIM"}, 2, batch_size=2)
    with pytest.raises(ValueError, match="broken: sample 0 is not finite"):
        run_evaluation([broken], protocol, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_latents_without_an_autoencoder_are_compared_as_they_are(folders, tmp_path):
    out = tmp_path / "out"
    options = ("--num-samples", 2, "--steps", 2, "--range-samples", 0, "--out", out)
    run(folders / "latents_w4", "--against", folders / "latents", *options)
    assert np.load(out / "samples.npz")["latents"].shape == (2, 8, 8, 4)
    assert set(summary_of(out)["paired"]["latents_w4"]) == {"latent_snr_db", "latent_cosine"}
    assert "pictures.png" not in os.listdir(out)


def test_a_fingerprint_follows_every_parameter(folders):
    full = checkpoints.load(folders / "full")
    assert digest(full) == digest(checkpoints.load(folders / "full"))
    params = jax.tree.map(lambda leaf: leaf, full.params)
    table = params["y_embedder"]["embedding_table"]
    params["y_embedder"]["embedding_table"] = table.at[0, 0].add(1e-6)
    assert digest(dataclasses.replace(full, params=params)) != digest(full)


def test_differences_are_enlarged_within_the_range():
    a = np.full((2, 4, 4, 1), 100, np.uint8)
    found, gain = difference_images(a, a + np.uint8(20))
    assert gain == 8
    assert (found == 160).all()
    assert difference_images(a, a)[1] == 16


@pytest.mark.slow
def test_decoded_images_and_one_model_alone(folders, tmp_path):
    out = tmp_path / "out"
    options = ("--num-samples", 3, "--steps", 2, "--batch-size", 2, "--out", out)
    vae = ("--vae", folders / "vae")
    run(folders / "latents_w4", "--against", folders / "latents", *vae, *options)
    assert np.load(out / "samples.npz")["arr_0"].shape == (3, 16, 16, 3)
    assert "image_ssim" in summary_of(out)["paired"]["latents_w4"]
    alone = ("--num-samples", 70, "--steps", 2, "--batch-size", 35, "--reference", "demo")
    run(folders / "w4", *alone, "--out", tmp_path / "alone")
    summary = summary_of(tmp_path / "alone")
    assert summary["paired"] == {}
    assert np.isfinite(summary["scores"]["w4"]["frechet_distance"]["value"])


COMMAND = "import sys; from qdit_jax.cli import main; sys.exit(main(sys.argv[1:]))"


def environment(tmp_path, **extra):
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
    return {**os.environ, **cache, **extra}


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(folders, tmp_path):
    def command(out):
        return [
            *(sys.executable, "-c", COMMAND, "evaluate", str(folders / "w4")),
            *("--against", str(folders / "full"), "--num-samples", "400", "--steps", "3"),
            *("--batch-size", "2", "--range-samples", "0", "--out", str(out)),
        ]

    env = environment(tmp_path)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(command(killed), env=env)
    while process.poll() is None and len(list(killed.glob("shards/0*.npz"))) < 5:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = {p: p.stat().st_mtime_ns for p in killed.glob("shards/0*.npz")}
    assert 5 <= len(kept) < 200
    assert not (killed / "metrics.json").exists()
    subprocess.run(command(killed), env=env, check=True)
    assert all(p.stat().st_mtime_ns == at for p, at in kept.items())
    subprocess.run(command(whole), env=env, check=True)
    assert len(np.load(killed / "samples.npz")["arr_0"]) == 400
    for name in ("samples.npz", "reference_samples.npz"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    for part in ("paired", "trajectory"):
        assert summary_of(killed)[part] == summary_of(whole)[part]


@pytest.mark.slow
def test_many_devices_make_the_same_samples(folders, compared, tmp_path):
    out = tmp_path / "split"
    command = [
        *(sys.executable, "-c", COMMAND, "evaluate", str(folders / "w4")),
        *("--against", str(folders / "full"), *map(str, COMMON), "--out", str(out)),
    ]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    subprocess.run(command, env=environment(tmp_path, **flags), check=True)
    assert summary_of(out)["settings"]["device"] == ["4 x cpu (cpu)"]
    ours, split = (np.load(f / "samples.npz")["arr_0"].astype(int) for f in (compared, out))
    assert np.abs(ours - split).max() <= 1
