"""PixArt's two layouts and pipelines: what files say, what options say, and what neither does."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_samples import VAE_CONFIG, flat, random_arrays, vae_arrays, write_folder

from qdit_convert import convert, describe, read_model
from qdit_convert.choices import Choices
from qdit_convert.diffusers_pixart import diffusers_pixart_example
from qdit_convert.pixart import SMALL, pixart_heads, pixart_leaves
from qdit_jax.errors import UserError
from qdit_jax.sampling import sampler_text

SIGMA = replace(SMALL, text_width=6, size_conditions=False, qk_norm=False, compression=(1, 1))
SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "algorithm_type": "dpmsolver++",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "solver_order": 2,
    "timestep_spacing": "linspace",
}


def arrays_of(leaves):
    shapes = {key: leaf.shapes[0] for leaf in leaves for key in leaf.sources}
    return random_arrays(shapes)


def authors(sizes=SIGMA, num_tokens=0, text_length=3):
    return {"state_dict": arrays_of(pixart_leaves(sizes, text_length, num_tokens))}


def nhwc(x):
    return x.transpose(0, 2, 3, 1)


OPTIONS = {"num_heads": 2, "input_size": 8, "interpolation_scale": 1.0}


# The authors' layout.


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"num_heads": None}, "not a published size, and shapes cannot .*pass --num-heads"),
        ({}, {"num_heads": 5}, "the width 24 must be divisible by num_heads=5"),
        ({}, {"input_size": None}, r"no table of positions \(pos_embed\), .*pass --input-size: 32"),
        ({}, {"input_size": (8, 4)}, r"input_size=\(8, 4\) of a PixArt: give one number"),
        ({}, {"input_size": 7}, "input_size=7 of a PixArt: give one number that its patches of 2"),
        (
            {},
            {"interpolation_scale": None},
            "8x8 are of no published PixArt.*--interpolation-scale",
        ),
        ({}, {"interpolation_scale": 0.0}, "interpolation_scale=0.0 is not understood"),
        ({"num_tokens": 9}, {}, "pos_embed has 9 positions.*input_size=8; leave --input-size out"),
        ({"num_tokens": 8}, {"input_size": None}, "8 positions, which are not those of a square"),
        (
            {"sizes": replace(SIGMA, out_channels=6)},
            {},
            "6 output channels for 4 input channels; 4 or 8 are known",
        ),
    ],
)
def test_what_the_file_does_not_say_is_asked_for(pt, changes, options, message):
    with pytest.raises(UserError, match=message):
        read_model(pt(authors(**changes)), **{**OPTIONS, **options})


@pytest.mark.parametrize(("size", "scale"), [(32, 0.5), (64, 1.0), (128, 2.0), (256, 4.0)])
def test_the_published_scale_of_positions_is_said_in_a_note(pt, size, scale):
    read = read_model(pt(authors()), num_heads=2, input_size=size)
    assert (read.config["sample_size"], read.config["interpolation_scale"]) == (size, scale)
    assert f"interpolation scale {scale:g}, as published for {size}x{size}" in str(read.metadata)
    assert not read.config["stored_positions"]


def test_published_heads_are_said_in_a_note():
    notes = []
    assert pixart_heads(replace(SIGMA, depth=28, width=1152), Choices(), notes) == 16
    assert notes == ["16 attention heads, as published for this width and depth"]
    assert pixart_heads(replace(SIGMA, depth=28, width=1152), Choices(num_heads=8), []) == 8


def test_size_conditions_are_of_the_published_network_of_1024_pixels(pt):
    sized = replace(SIGMA, size_conditions=True)
    read = read_model(pt(authors(sized)), num_heads=2)
    assert read.config["size_conditions"]
    assert (read.config["sample_size"], read.config["interpolation_scale"]) == (128, 2.0)
    assert "latents of 128x128, as the published network with size conditions" in str(read.metadata)
    assert read.params["csize_embedder"]["mlp_2"]["kernel"].shape == (8, 8)
    broken = authors(sized)
    del broken["state_dict"]["ar_embedder.mlp.2.weight"]
    with pytest.raises(UserError, match=r"missing: ar_embedder\.mlp\.2\.weight"):
        read_model(pt(broken), num_heads=2)


def test_a_stored_table_settles_the_size(pt):
    read = read_model(pt(authors(num_tokens=16)), num_heads=2, interpolation_scale=1.0)
    assert (read.config["sample_size"], read.config["stored_positions"]) == (8, True)
    assert "positions of 8x8 latents as stored; those of other sizes" in str(read.metadata["notes"])


def test_key_value_compression_is_read_block_by_block(pt):
    sizes = replace(SIGMA, depth=3, compression=(1, 2, 4), qk_norm=True)
    saved = authors(sizes)
    read = read_model(pt(saved), **{**OPTIONS, "input_size": 16})
    assert tuple(read.config["kv_compression"]) == (1, 2, 4)
    assert read.config["qk_norm"]
    leaf = flat(read.params)["blocks_2/attn_sr/sr/filter"]
    assert leaf.shape == (4, 4, 1, 24)
    stored = saved["state_dict"]["blocks.2.attn.sr.weight"]
    np.testing.assert_array_equal(leaf[1, 3, 0], stored[:, 0, 1, 3])
    assert "blocks_0/attn/q_norm/scale" in flat(read.params)
    none = read_model(pt(authors()), **OPTIONS)
    assert tuple(none.config["kv_compression"]) == ()


def test_averaged_weights_of_a_training_checkpoint_come_first(pt):
    raw, averaged = authors()["state_dict"], authors()["state_dict"]
    averaged = {key: array + 1 for key, array in averaged.items()}
    read = read_model(pt({"state_dict": raw, "state_dict_ema": averaged}), **OPTIONS)
    np.testing.assert_array_equal(read.params["t_block"]["bias"], averaged["t_block.1.bias"])


# diffusers' layout.


def diffusers(**changes):
    example = diffusers_pixart_example()
    config = {
        key: value for key, value in {**example.config, **changes}.items() if value is not ...
    }
    return arrays_of(example.leaves), config


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [(128, None, 2.0), (32, None, 1.0), (256, None, 4.0), (32, 0.5, 0.5)],
)
def test_null_is_the_scale_of_the_sample_size(tmp_path, size, scale, expected):
    arrays, config = diffusers(
        sample_size=size, interpolation_scale=scale, use_additional_conditions=True
    )
    read = read_model(write_folder(tmp_path / "d", arrays, config))
    assert read.config["interpolation_scale"] == expected
    assert not read.config["null_caption"]
    assert "no null caption: give null_text and null_text_mask" in read.metadata["notes"][0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_size": 64}, "use_additional_conditions = False, but the weights have True"),
        ({"use_additional_conditions": False}, "use_additional_conditions = False"),
        ({"num_attention_heads": 4}, r"num_attention_heads \* attention_head_dim = 48, .* have 24"),
        ({"num_layers": ...}, "num_layers = 28, but the weights have 2"),
        ({"cross_attention_dim": 12}, "cross_attention_dim = 12, but the weights have 24"),
        ({"out_channels": None}, "out_channels = 4, but the weights have 8"),
        ({"caption_channels": None}, "says nothing of caption_channels"),
        ({"activation_fn": "geglu"}, "activation_fn='geglu'; only 'gelu-approximate'"),
        ({"norm_type": "ada_norm_zero"}, "norm_type='ada_norm_zero'; only 'ada_norm_single'"),
        ({"norm_eps": 1e-5}, "norm_eps=1e-05; only 1e-06"),
        ({"colour": 1}, "colour=1, which is not a setting"),
        ({"_class_name": "SanaTransformer2DModel"}, "config.json is of a SanaTransformer2DModel"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, changes, message):
    arrays, config = diffusers(**changes)
    with pytest.raises(UserError, match=message):
        read_model(write_folder(tmp_path / "d", arrays, config))


def test_a_config_is_needed(tmp_path):
    arrays, _ = diffusers()
    with pytest.raises(UserError, match=r"in the diffusers layout needs its config\.json"):
        read_model(write_folder(tmp_path / "d", arrays, None))


# Whole pipelines.


def pipeline(folder, name="PixArtSigmaPipeline", scheduler=SCHEDULER, **parts):
    """Writes a whole pipeline, its text encoder an empty folder."""
    arrays, config = diffusers()
    write_folder(folder / "transformer", arrays, config)
    write_folder(folder / "vae", vae_arrays(), {**VAE_CONFIG, "scaling_factor": 0.13025})
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (folder / "text_encoder").mkdir()
    index = {
        "_class_name": name,
        "_diffusers_version": "0.27.0",
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "PixArtTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps({**index, **parts}))
    return folder


@pytest.mark.parametrize(
    ("name", "rows"), [("PixArtAlphaPipeline", 120), ("PixArtSigmaPipeline", 300)]
)
def test_a_whole_pipeline(tmp_path, name, rows):
    folder = pipeline(tmp_path / "p", name)
    checkpoint = convert(folder)
    assert checkpoint.model.text_length == rows
    assert checkpoint.metadata["pipeline"] == name
    assert checkpoint.metadata["scheduler"] == SCHEDULER
    assert sampler_text(checkpoint).startswith("DPMSolverMultistepScheduler: 1000 linear betas")
    assert checkpoint.vae.model.scaling_factor == 0.13025
    notes = str(checkpoint.metadata["notes"])
    assert "text_encoder and tokenizer left out: prompts are given as embeddings" in notes
    told = describe(folder)
    assert told["problem"] is None
    assert [network["family"] for network in told["networks"]] == ["pixart", "vae"]
    part = read_model(folder / "transformer")
    assert "one part of a pipeline: give the folder of the whole" in str(part.metadata["notes"])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"_class_name": "FooPipeline"},
            "this is a FooPipeline; .* DiTPipeline, PixArtAlphaPipeline",
        ),
        (
            {"transformer": ["diffusers", "DiTTransformer2DModel"]},
            "only PixArtTransformer2DModel or",
        ),
        ({"safety_checker": ["diffusers", "X"]}, "safety_checker=.*which is not a setting"),
        ({"id2label": {"0": "cat"}}, "id2label=.*which is not a setting"),
    ],
)
def test_a_pipeline_that_is_not_understood_is_refused(tmp_path, parts, message):
    folder = pipeline(tmp_path / "p", **parts)
    with pytest.raises(UserError, match=message):
        read_model(folder)


def test_a_scheduler_must_read_what_the_network_predicts(tmp_path):
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    with pytest.raises(UserError, match=r"predicts noise, but a FlowMatchEuler.* reads a velocity"):
        read_model(pipeline(tmp_path / "p", scheduler=flow))


def test_a_pipeline_without_a_scheduler_says_what_is_taken(tmp_path):
    folder = pipeline(tmp_path / "p", text_encoder=[None, None], tokenizer=[None, None])
    index = json.loads((folder / "model_index.json").read_text()) | {"scheduler": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    notes = str(read_model(folder).metadata["notes"])
    assert "no scheduler: sampled as the published PixArt, on linear betas" in notes
    assert "left out" not in notes


# Against diffusers itself, where it is installed.


@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        ({"sample_size": 32, "use_additional_conditions": True}, (10, 6)),
        ({"sample_size": 256, "use_additional_conditions": False}, (4, 12)),
        (
            {"sample_size": 16, "interpolation_scale": 0.5, "out_channels": 4, "patch_size": 4},
            (16, 8),
        ),
    ],
)
def test_outputs_are_those_of_diffusers(tmp_path, fields, shape):
    torch, peers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2}
    original = peers.PixArtTransformer2DModel(
        **sizes, **fields, caption_channels=5, cross_attention_dim=24
    ).eval()
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    original.save_pretrained(tmp_path / "d")
    checkpoint = convert(tmp_path / "d")
    x, text = torch.randn(2, 4, *shape), torch.randn(2, 6, 5)
    mask, timestep = torch.arange(6) < torch.tensor([[2], [6]]), torch.tensor([3, 999])
    sizes = {"resolution": torch.tensor([[512.0, 384], [700, 300]])}
    sizes["aspect_ratio"] = torch.tensor([[1.3], [2.3]])
    with torch.no_grad():
        out = original(
            x,
            text,
            timestep=timestep,
            added_cond_kwargs=sizes,
            encoder_attention_mask=mask,
            return_dict=False,
        )[0].numpy()
    given = {"text": text.numpy(), "text_mask": mask.numpy()}
    if fields.get("use_additional_conditions"):
        given |= {
            "size": sizes["resolution"].numpy(),
            "aspect_ratio": sizes["aspect_ratio"].numpy(),
        }
    inputs = jax.tree.map(jnp.asarray, (nhwc(x.numpy()), timestep.numpy(), given))
    found = jax.jit(lambda p, *a: checkpoint.model.apply({"params": p}, *a))(
        checkpoint.params, *inputs
    )
    error = np.abs(np.asarray(found) - nhwc(out)).max()
    assert error < 3e-5 * (1 + np.abs(out).max())
