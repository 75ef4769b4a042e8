"""Wan's networks and its autoencoder against recorded runs of the originals, from the file on."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qdit_jax as qdit
from qdit_convert import convert
from qdit_convert.wan import RENAMED, renamed
from qdit_jax import diffusion
from qdit_jax.sampling import checkpoint_sampler, denoiser

PAIR = "wan/t2v_22_a14b_two_experts"
PER_TOKEN = "wan/ti2v_22_5b"
ALONE = ("wan/t2v_21", "wan/t2v_21_original_layout", "eps_probe/wan")  # of one network
UNIPC = {
    "_class_name": "UniPCMultistepScheduler",
    "num_train_timesteps": 1000,
    "solver_order": 2,
    "solver_type": "bh2",
    "prediction_type": "flow_prediction",
    "predict_x0": True,
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
    "lower_order_final": True,
    "final_sigmas_type": "zero",
}
INDEX = {
    "_class_name": "WanPipeline",
    "boundary_ratio": 0.875,
    "expand_timesteps": False,
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
}


def channels_last(x):
    return np.moveaxis(x, -4, -1)


def assert_close(ours, reference, tolerance=3e-5):
    assert ours.shape == reference.shape
    error = np.abs(np.asarray(ours) - reference).max()
    assert error <= tolerance * (1 + np.abs(reference).max())


def short_texts(checkpoint, length):
    """Returns a network for texts of a length that no diffusers file says; published, it is 512."""
    return dataclasses.replace(checkpoint, model=checkpoint.model.clone(text_length=length))


def outputs(model, params, io):
    x, timestep, text = (jnp.asarray(a) for a in (channels_last(io["x"]), io["t"], io["text"]))
    run = jax.jit(lambda p: model.apply({"params": p}, x, timestep, {"text": text}))
    return run(params)


def trajectory(checkpoint, sampler, guidance, loop):
    condition = {"text": jnp.asarray(loop["text"]), "null_text": jnp.asarray(loop["null_text"])}
    denoise_fn = denoiser(checkpoint.model, checkpoint.params, guidance)
    noise = jnp.asarray(channels_last(loop["noise"]))
    return diffusion.sample_trajectory(denoise_fn, sampler, noise, condition)[1]


@pytest.fixture(scope="module")
def pipeline(golden, tmp_path_factory):
    """Returns a folder of a whole pipeline: both experts, scheduler and autoencoder."""
    folder = tmp_path_factory.mktemp("pipeline") / "wan"
    shutil.copytree(golden(f"families/{PAIR}"), folder)
    shutil.copytree(golden("families/wan/vae"), folder / "vae")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(UNIPC))
    (folder / "model_index.json").write_text(json.dumps(INDEX))
    return folder


@pytest.fixture(scope="module")
def pair(pipeline):
    return short_texts(convert(pipeline, input_size=(2, 4, 6)), 6)


@pytest.mark.parametrize("case", [PER_TOKEN, *ALONE])
def test_a_network_is_the_original(golden, case):
    folder = golden(f"families/{case}")
    checkpoint, io = convert(folder), np.load(folder / "io.npz")
    length = io["text"].shape[1]
    if case == "wan/t2v_21_original_layout":  # its config.json says the length
        assert checkpoint.model.text_length == length
    checkpoint = short_texts(checkpoint, length)
    assert_close(outputs(checkpoint.model, checkpoint.params, io), channels_last(io["out"]))


def test_a_text_is_padded_with_zeros_and_a_mask_sets_zeros(golden):
    folder = golden(f"families/{PER_TOKEN}")
    io = dict(np.load(folder / "io.npz"))
    checkpoint = short_texts(convert(folder), io["text"].shape[1])
    longest = int(np.abs(io["text"]).any(axis=(0, 2)).nonzero()[0].max()) + 1
    short = io | {"text": io["text"][:, :longest]}
    whole = channels_last(io["out"])
    assert_close(outputs(checkpoint.model, checkpoint.params, short), whole)
    cut = short_texts(checkpoint, longest)
    assert_close(outputs(cut.model, cut.params, short), channels_last(io["out_text_cut"]))
    x, timestep = (jnp.asarray(a) for a in (channels_last(io["x"]), io["t"]))
    mask = np.abs(io["text"]).any(axis=2)
    condition = {"text": jnp.where(mask[..., None], io["text"], 7.0), "text_mask": mask}
    checkpoint.model.check_condition(condition)
    apply = jax.jit(lambda p: checkpoint.model.apply({"params": p}, x, timestep, condition))
    assert_close(apply(checkpoint.params), whole)


def test_the_authors_names_make_the_same_network(golden, tmp_path):
    folder = golden(f"families/{PER_TOKEN}")
    given = convert(folder)
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    file = tmp_path / "wan.safetensors"
    save_file({renamed(key, RENAMED): array for key, array in weights.items()}, file)
    ours = convert(file, num_heads=given.model.num_heads)
    assert ours.metadata["layout"] == "Wan in the authors' layout"
    assert ours.model == given.model
    jax.tree.map(np.testing.assert_array_equal, ours.params, given.params)


def test_a_pipeline_with_two_transformers_is_one_network(pair, golden):
    assert pair.model.boundary == 875.0
    assert pair.metadata["scheduler"] == UNIPC
    io = np.load(golden(f"families/{PAIR}") / "io.npz")
    for name, out in (("high", io["out"]), ("low", io["out_2"])):
        alone = pair.model.clone(expert=name)
        assert_close(outputs(alone, pair.params, io), channels_last(out))
    found = np.asarray(outputs(pair.model, pair.params, io))
    for i, timestep in enumerate(io["t"]):
        assert_close(found[i], channels_last(io["out" if timestep >= 875 else "out_2"][i]))


def test_the_loop_of_two_experts_switches_network_and_guidance(pair, golden):
    loop = np.load(golden(f"families/{PAIR}") / "loop.npz")
    guidance = diffusion.SteppedScale(boundary=pair.model.boundary, at_or_above=4.0, below=3.0)
    steps = trajectory(pair, checkpoint_sampler(pair, 6), guidance, loop)
    np.testing.assert_array_equal(steps.timestep, loop["timesteps"])
    for ours, reference in zip(steps.x_next, loop["latents"], strict=True):
        assert_close(ours, channels_last(reference), 1e-4)
    assert set(loop["model_used"]) == {0, 1}  # the recorded loop has used both


@pytest.mark.parametrize(("case", "shift"), [(PER_TOKEN, 5.0), ("wan/t2v_21", 3.0)])
def test_the_published_loop_is_the_same(golden, case, shift):
    folder = golden(f"families/{case}")
    loop = np.load(folder / "loop.npz")
    checkpoint = short_texts(convert(folder), loop["text"].shape[1])
    sampler = checkpoint_sampler(checkpoint, 5, shift=shift)
    steps = trajectory(checkpoint, sampler, 5.0, loop)
    np.testing.assert_array_equal(steps.timestep, loop["timesteps"])
    for ours, reference in zip(steps.x_next, loop["latents"], strict=True):
        assert_close(ours, channels_last(reference), 1e-4)


def test_the_authors_two_folders_are_one_network(golden, tmp_path):
    source = golden(f"families/{PAIR}")
    for ours, theirs in (("high_noise_model", "transformer"), ("low_noise_model", "transformer_2")):
        (tmp_path / "pair" / ours).mkdir(parents=True)
        weights = load_file(source / theirs / "diffusion_pytorch_model.safetensors")
        file = tmp_path / "pair" / ours / "diffusion_pytorch_model.safetensors"
        save_file({renamed(key, RENAMED): array for key, array in weights.items()}, file)
    checkpoint = convert(tmp_path / "pair", num_heads=2)
    assert checkpoint.model.boundary == 875.0
    assert any("no file says it" in note for note in checkpoint.metadata["notes"])
    alone = convert(tmp_path / "pair" / "low_noise_model", num_heads=2)
    assert any("one of two experts" in note for note in alone.metadata["notes"])
    jax.tree.map(np.testing.assert_array_equal, checkpoint.params["low"], alone.params)


def test_what_is_no_pair_is_refused(pipeline, tmp_path):
    folder = tmp_path / "wan"
    shutil.copytree(pipeline, folder)
    for change, told in (
        ({"boundary_ratio": None}, "boundary_ratio=None for two transformers"),
        ({"transformer_2": [None, None]}, "boundary_ratio=0.875 for one transformer"),
        ({"image_encoder": ["transformers", "CLIPVisionModel"]}, "image_encoder=.* not a setting"),
    ):
        (folder / "model_index.json").write_text(json.dumps(INDEX | change))
        with pytest.raises(qdit.UserError, match=told):
            convert(folder)


def test_the_autoencoder_is_the_original(pair, golden):
    model, params, io = pair.vae.model, pair.vae.params, np.load(golden("families/wan/vae/io.npz"))
    latents = jnp.asarray(channels_last(io["z"]))
    clips = np.asarray(qdit.sampling.decode(pair.vae, latents))
    assert_close(clips, channels_last(io["decoded"]))
    assert_close(clips[:, :1], channels_last(io["decoded_one_frame"]))
    encode = jax.jit(lambda p, x: model.apply({"params": p}, x, method="encode"))
    mean, logvar = encode(params, jnp.asarray(channels_last(io["video"])))
    assert_close(mean, channels_last(io["enc_mean"]))
    assert_close(logvar, channels_last(io["enc_logvar"]))


def test_a_pipeline_generates_clips(pair):
    condition = {
        "text": np.zeros((1, 6, 14), np.float32),
        "null_text": np.ones((1, 6, 14), np.float32),
    }
    clips = qdit.generate(pair, checkpoint_sampler(pair, 2), condition, guidance=4.0)
    assert clips.shape == (1, 1 + 4, 4 * 8, 6 * 8, 3)
    assert np.abs(clips).max() <= 1
    assert clips.std() > 0
