"""Wan's network beside its goldens: what it takes and refuses, and the whole road on a tiny one."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_models import output, quantized_layers, random_params

import qdit_jax as qdit
from qdit_convert import convert
from qdit_convert.layouts import LAYOUTS
from qdit_jax.calibration import collect_items
from qdit_jax.models import Wan
from qdit_jax.models.wan import rope_axes
from qdit_jax.sampling import checkpoint_sampler

CONFIG = {
    "sample_size": (2, 4, 4),
    "in_channels": 4,
    "hidden_size": 32,
    "depth": 1,
    "num_heads": 2,
    "ffn_width": 48,
    "freq_width": 32,
    "text_width": 12,
    "text_length": 6,
}
BLOCK = ("self_attn/qkv", "self_attn/o", "cross_attn/q", "cross_attn/kv", "cross_attn/o")


@pytest.fixture(scope="module")
def full():
    model = Wan(**CONFIG)
    return qdit.Checkpoint(model, random_params(model))


@pytest.fixture(scope="module")
def prompts():
    text = np.random.default_rng(5).standard_normal((3, 6, 12)).astype(np.float32)
    return {"text": text, "null_text": 0.1 * text[:1]}


@pytest.fixture(scope="module")
def data(full, prompts):
    sampler = checkpoint_sampler(full, 2)
    items = collect_items(
        full, jax.random.key(2), 4, conditions=prompts, sampler=sampler, batch_size=4
    )
    return qdit.CalibrationData(items=items, batch_size=4)


def call(model, params, x, timestep, condition):
    return output(model, params, x, timestep, condition)


def latents(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_head_channels_are_shared_between_the_axes_as_published():
    assert rope_axes(128) == (44, 42, 42)
    assert rope_axes(14) == (6, 4, 4)


def test_a_timestep_per_token_is_that_of_the_sample_where_all_are_equal(full):
    x, text = latents((2, 3, 4, 6, 4)), {"text": latents((2, 6, 12))}
    whole = call(full.model, full.params, x, jnp.array([900.0, 100.0]), text)
    tokens = jnp.repeat(jnp.array([[900.0], [100.0]]), 3 * 2 * 3, axis=1)
    np.testing.assert_allclose(call(full.model, full.params, x, tokens, text), whole, atol=1e-5)
    first = tokens.at[:, :6].set(0.0)
    moved = call(full.model, full.params, x, first, text)
    assert np.abs(moved - whole).max() > 1e-2


def test_a_clip_may_have_another_size_and_what_does_not_fit_is_refused(full):
    text = {"text": latents((1, 6, 12))}
    shape = (1, 1, 2, 8, 4)
    found = call(full.model, full.params, latents(shape), jnp.ones(1), text)
    assert found.shape == shape
    for x, timestep, condition, told in (
        ((1, 2, 4, 4, 3), 1, text, r"takes \[B, T, H, W, 4\]"),
        ((1, 2, 5, 4, 4), 1, text, r"patches of \(1, 2, 2\) do not divide"),
        ((1, 2, 4, 4, 4), (1, 7), text, "one per sample, or 8 of each"),
        (shape, 1, {"text": latents((1, 7, 12))}, "at most 6 rows"),
        (shape, 1, {"text": latents((1, 6, 11))}, r"\[B, L, 12\]"),
    ):
        with pytest.raises(ValueError, match=told):
            full.model.apply({"params": full.params}, latents(x), jnp.ones(timestep), condition)


def test_a_mask_must_be_of_its_text(full):
    text = np.zeros((2, 5, 12), np.float32)
    full.model.check_condition({"text": text, "text_mask": np.ones((2, 5), bool)})
    with pytest.raises(ValueError, match=r"text_mask has shape \(2, 6\); give \(2, 5\)"):
        full.model.check_condition({"text": text, "text_mask": np.ones((2, 6), bool)})
    with pytest.raises(ValueError, match="text has shape"):
        full.model.check_condition({"text": text[:, :0]})


def test_guidance_without_a_null_text_is_refused(full, prompts):
    with pytest.raises(ValueError, match="give null_text"):
        qdit.generate(full, checkpoint_sampler(full, 1), {"text": prompts["text"]}, guidance=5.0)


def test_bfloat16_stays_close(full):
    x, text = latents((1, 2, 4, 4, 4)), {"text": latents((1, 6, 12))}
    exact = call(full.model, full.params, x, jnp.full(1, 500.0), text)
    narrow = call(full.model.clone(dtype="bfloat16"), full.params, x, jnp.full(1, 500.0), text)
    assert narrow.dtype == jnp.float32
    assert 0 < np.linalg.norm(narrow - exact) / np.linalg.norm(exact) < 0.05


@pytest.mark.parametrize("method", ["rtn", "gptq", "smoothquant", "svdquant", "best"])
def test_every_method_quantizes_its_blocks(full, data, method):
    recipe = qdit.Recipe.preset("w4a8", full, group_size=16)
    found = qdit.quantize(full, method, recipe, data=data)
    assert quantized_layers(found.params) == {
        f"blocks_0/{name}" for name in (*BLOCK, "ffn_0", "ffn_2")
    }
    given = data.items.taken(slice(0, 4))
    exact, coarse = (
        np.asarray(call(c.model, c.params, *jax.tree.map(jnp.asarray, given)))
        for c in (full, found)
    )
    assert 0 < np.linalg.norm(coarse - exact) / np.linalg.norm(exact) < 0.3


def test_the_road_from_calibration_to_a_file(full, prompts, tmp_path):
    sampler = checkpoint_sampler(full, 2)
    stats = qdit.calibrate(full, jax.random.key(0), 2, conditions=prompts, sampler=sampler)
    recipe = qdit.Recipe.preset("w4a8", full, group_size=16, act_mode="static")
    quantized = qdit.quantize(full, "rtn", recipe, data=qdit.CalibrationData(stats=stats))
    qdit.save(tmp_path / "wan.safetensors", quantized)
    read = qdit.load(tmp_path / "wan.safetensors")
    assert read.model == full.model
    clips = [
        qdit.generate(c, sampler, prompts, guidance=5.0, batch_size=3) for c in (quantized, read)
    ]
    assert clips[0].shape == (3, 2, 4, 4, 4)
    np.testing.assert_array_equal(*clips)


def image_to_video(layout, channels, key, shape):
    """Returns the tensors of an example, with more input channels and a tensor of images."""
    rng = np.random.default_rng(0)
    found = {
        key: rng.standard_normal(leaf.shapes[0]).astype(np.float32)
        for leaf in layout.example().leaves
        for key in leaf.sources
    }
    patches = list(found["patch_embedding.weight"].shape)
    patches[1] = channels
    found["patch_embedding.weight"] = np.zeros(patches, np.float32)
    return found | ({} if key is None else {key: np.zeros(shape, np.float32)})


@pytest.mark.parametrize("name", ["wan", "wan-diffusers"])
def test_networks_of_images_and_controls_are_refused(name, tmp_path):
    layout = next(row for row in LAYOUTS if row.name == name)
    image = {
        "wan": "blocks.0.cross_attn.k_img.weight",
        "wan-diffusers": "blocks.0.attn2.add_k_proj.weight",
    }[name]
    for channels, key, told in (
        (9, None, "takes 9 channels and returns 4, as image-to-video networks do"),
        (4, image, rf"conditioned on images .*{image}"),
    ):
        file = tmp_path / "diffusion_pytorch_model.safetensors"
        save_file(image_to_video(layout, channels, key, (24, 24)), file)
        with pytest.raises(qdit.UserError, match=told):
            convert(file, num_heads=2)


def test_settings_that_contradict_the_weights_are_refused(tmp_path):
    layout = next(row for row in LAYOUTS if row.name == "wan-diffusers")
    example = layout.example()
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(image_to_video(layout, 4, None, ()), file)
    for change, told in (
        ({"num_layers": 3}, "num_layers = 3, but the weights have 2"),
        ({"qk_norm": "rms_norm"}, "qk_norm='rms_norm'"),
        ({"cross_attn_norm": False}, "cross_attn_norm=False"),
        ({"image_dim": 8}, "image_dim=8"),
        ({"patch_size": [2, 2]}, r"patch_size=\[2, 2\]"),
        ({"num_attention_heads": 5}, r"num_attention_heads \* attention_head_dim = 60"),
    ):
        config = {**example.config, **change}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(qdit.UserError, match=told):
            convert(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(qdit.UserError, match=r"not a published size.*--num-heads"):
        convert(file)
    checkpoint = convert(file, num_heads=2, input_size=(4, 8))
    assert checkpoint.model.sample_size == (21, 4, 8)
    assert dataclasses.asdict(checkpoint.model)["text_length"] == 512
