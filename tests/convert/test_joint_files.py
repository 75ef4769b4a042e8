"""Files of SD3 and FLUX: other networks beside them, heads and axes, config.json, whole pipelines."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_models import output

from qdit_convert import convert, flux, flux2, read_model, sd3
from qdit_convert.joint import swapped
from qdit_convert.sizes import mlp_ratio
from qdit_convert.vae import latent_diffusion_example, vae_example
from qdit_jax.errors import UserError

SIZE = {"input_size": 4}
AXES = {"rope_axes": (2, 4, 2)}
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}


def arrays_of(leaves, prefix=""):
    rng = np.random.default_rng(0)
    return {
        f"{prefix}{key}": (0.1 * rng.standard_normal(shapes[0])).astype(np.float32)
        for leaf in leaves
        for key, shapes in leaf.expected.items()
    }


def written(folder, arrays, config=None, name="diffusion_pytorch_model.safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(arrays, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def read(path, file="model.safetensors", **choices):
    return read_model(path / file, **choices)


def test_encoders_and_an_autoencoder_in_the_file_are_named_and_left(tmp_path):
    own = arrays_of(sd3.original_example().leaves, "model.diffusion_model.")
    vae = arrays_of(latent_diffusion_example().leaves, "first_stage_model.")
    text = {
        f"text_encoders.clip_l.layers.{i}.mlp.fc1.weight": np.ones(2, np.float32) for i in range(9)
    }
    written(tmp_path, {**own, **vae, **text}, name="model.safetensors")
    found = read(tmp_path, **SIZE)
    assert found.family == "sd3"
    assert found.metadata["names"] == [
        'stripped "model.diffusion_model."',
        f"left out {len(vae) + 9} tensors: first_stage_model.* ({len(vae)}), text_encoders.* (9)",
        "the AutoencoderKL in the latent-diffusion layout in the file is read with --family vae",
    ]


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_flux_with_and_without_the_prefix_of_other_programs(tmp_path, prefix):
    own = arrays_of(flux.original_example().leaves, prefix)
    extra = {"text_encoders.t5xxl.shared.weight": np.ones(2, np.float32)} if prefix else {}
    written(tmp_path, {**own, **extra}, name="model.safetensors")
    found = read(tmp_path, **SIZE, **AXES)
    assert found.family == "flux"
    kernel = own[f"{prefix}single_blocks.1.linear1.weight"].T
    np.testing.assert_array_equal(found.params["single_blocks_1"]["linear1"]["kernel"], kernel)


@pytest.mark.parametrize("family", [flux, flux2], ids=["flux", "flux2"])
@pytest.mark.parametrize("counts", [(2, 0), (0, 1)])
@pytest.mark.parametrize("names", ["in_original", "in_diffusers"])
def test_a_flux_of_one_kind_of_blocks(family, counts, names, tmp_path):
    sizes = dataclasses.replace(family.SMALL, depth=counts[0], single_depth=counts[1])
    arrays = arrays_of(family.leaves_of(sizes, getattr(family, names)))
    example = family.diffusers_example()
    if names == "in_diffusers":
        counted = {"num_layers": counts[0], "num_single_layers": counts[1]}
        found = convert(written(tmp_path / "in", arrays, {**example.config, **counted}), **SIZE)
    else:
        written(tmp_path, arrays, name="model.safetensors")
        axes = family.original_example().choices["rope_axes"]
        found = convert(tmp_path / "model.safetensors", **SIZE, rope_axes=axes)
    assert (found.model.depth, found.model.single_depth) == counts
    model = found.model
    width = model.mlp_width if family is flux2 else model.mlp_ratio * model.hidden_size
    assert width == sizes.mlp_width
    inputs = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), model.example_inputs())
    assert np.isfinite(output(model, found.params, *inputs)).all()


def test_diffusers_halves_of_the_last_modulations_are_swapped(tmp_path):
    example = sd3.diffusers_example()
    arrays = arrays_of(example.leaves)
    params = read_model(written(tmp_path, arrays, example.config)).params
    final = arrays["norm_out.linear.weight"]
    last = arrays["transformer_blocks.1.norm1_context.linear.bias"]
    first = arrays["transformer_blocks.0.norm1_context.linear.bias"]
    found = params["final_layer"]["adaLN_modulation"]["kernel"]
    np.testing.assert_array_equal(found, np.concatenate([final[16:], final[:16]]).T)
    blocks = [params[f"joint_blocks_{i}"]["context_block"]["adaLN_modulation"] for i in (0, 1)]
    np.testing.assert_array_equal(blocks[0]["bias"], first)
    np.testing.assert_array_equal(blocks[1]["bias"], swapped(last))


def test_four_tensors_make_the_first_layer_of_a_single_block(tmp_path):
    example = flux.diffusers_example()
    arrays = arrays_of(example.leaves)
    params = read_model(written(tmp_path, arrays, example.config), **SIZE).params
    block = "single_transformer_blocks.0"
    names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    whole = np.concatenate([arrays[f"{block}.{name}.weight"] for name in names])
    np.testing.assert_array_equal(params["single_blocks_0"]["linear1"]["kernel"], whole.T)


def without_norms(leaves, width):
    """Returns the tensors of an SD3 without norms of queries, as SD3-medium."""
    sizes = {**vars(sd3.SMALL), "head_dim": None, "width": width, "mlp_width": 4 * width}
    return arrays_of(leaves(sd3.Sizes(**sizes), sd3.in_original))


def test_heads_are_of_the_norms_or_as_published_or_asked_for(tmp_path):
    written(tmp_path, without_norms(sd3.leaves_of, 128), name="model.safetensors")
    found = read(tmp_path, **SIZE)
    assert found.config["num_heads"] == 2
    assert "num_heads taken to be 2: heads of 64 channels, as published" in found.metadata["notes"]
    assert read(tmp_path, num_heads=8, **SIZE).config["num_heads"] == 8
    with pytest.raises(UserError, match="128 must be divisible by num_heads=3"):
        read(tmp_path, num_heads=3, **SIZE)
    written(tmp_path, without_norms(sd3.leaves_of, 16), name="model.safetensors")
    with pytest.raises(UserError, match=r"16 is not a multiple of 64.*pass --num-heads"):
        read(tmp_path, **SIZE)
    written(tmp_path, arrays_of(sd3.original_example().leaves), name="model.safetensors")
    assert read(tmp_path, **SIZE).config["num_heads"] == 2
    with pytest.raises(UserError, match=r"num_heads=4 does not fit .* 8 channels a head"):
        read(tmp_path, num_heads=4, **SIZE)


def test_sizes_that_nothing_says_are_assumed_with_a_note_or_refused(tmp_path):
    written(tmp_path, arrays_of(sd3.original_example().leaves), name="model.safetensors")
    found = read(tmp_path)
    assert found.config["sample_size"] == 6
    assert "sample_size taken to be 6" in found.metadata["notes"][0]
    assert read(tmp_path, input_size=(2, 6)).config["sample_size"] == (2, 6)
    for size in (8, 3, (4, 5)):
        with pytest.raises(UserError, match="multiples of 2 up to 6"):
            read(tmp_path, input_size=size)


@pytest.mark.parametrize(
    ("axes", "told"),
    [
        (None, r"heads of 8 channels are not those of a published size.*pass --rope-axes"),
        ((2, 2, 2), r"rope_axes=\[2, 2, 2\] make 6 channels, but a head has 8"),
        ((3, 3, 2), "three even numbers"),
        ((4, 4), "three even numbers"),
    ],
)
def test_axes_that_nothing_says_or_that_make_no_head_are_refused(tmp_path, axes, told):
    written(tmp_path, arrays_of(flux.original_example().leaves), name="model.safetensors")
    with pytest.raises(UserError, match=told):
        read(tmp_path, rope_axes=axes, **SIZE)


def test_published_axes_of_published_heads_are_taken_with_a_note(tmp_path):
    sizes = flux.Sizes(**{**vars(flux.SMALL), "width": 128, "head_dim": 128, "guidance": False})
    arrays = arrays_of(flux.leaves_of(sizes, flux.in_original))
    written(tmp_path, arrays, name="model.safetensors")
    found = read(tmp_path, **SIZE)
    assert found.config["rope_axes"] == (16, 56, 56)
    assert found.config["num_heads"] == 1
    assert not found.config["guidance_embed"]
    assert found.metadata["notes"] == [
        "rope_axes taken to be (16, 56, 56), as published",
        "examples and costs count 256 rows of text, as published; texts of any length are taken",
    ]


def test_a_network_for_filling_is_refused_by_its_channels(tmp_path):
    arrays = arrays_of(flux.original_example().leaves)
    arrays["img_in.weight"] = np.ones((16, 96), np.float32)
    written(tmp_path, arrays, name="model.safetensors")
    with pytest.raises(UserError, match="96 channels on the way in and 16 on the way out"):
        read(tmp_path, **SIZE, **AXES)


@pytest.mark.parametrize(
    ("module", "changes", "told"),
    [
        (sd3, {"pos_embed_max_size": 4}, "pos_embed_max_size = 4, but the weights have 3"),
        (sd3, {"dual_attention_layers": []}, r"dual_attention_layers = \[\], but the weights"),
        (sd3, {"qk_norm": None}, "qk_norm = None, but the weights have some"),
        (sd3, {"qk_norm": "layer_norm"}, "qk_norm='layer_norm'"),
        (sd3, {"attention_head_dim": 4}, r"attention_head_dim = 8, but the weights have 16"),
        (sd3, {"_class_name": "FluxTransformer2DModel"}, "config.json is of a Flux"),
        (sd3, {"colour": 1}, "colour"),
        (flux, {"guidance_embeds": False}, "guidance_embeds = False, but the weights have True"),
        (flux, {"axes_dims_rope": [2, 2, 2]}, "make 6 channels, but a head has 8"),
        (flux, {"patch_size": 2}, "patch_size=2"),
        (flux, {"in_channels": 64}, "in_channels = 64, but the weights have 16"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, module, changes, told):
    example = module.diffusers_example()
    folder = written(tmp_path, arrays_of(example.leaves), {**example.config, **changes})
    with pytest.raises(UserError, match=told):
        read_model(folder, **example.choices)


@pytest.mark.parametrize(
    ("module", "pipeline", "scheduler", "left"),
    [
        (sd3, "StableDiffusion3Pipeline", {"shift": 3.0}, "text_encoder and text_encoder_3"),
        (flux, "FluxPipeline", {"use_dynamic_shifting": True}, "text_encoder and text_encoder_2"),
    ],
)
def test_a_whole_pipeline_is_read(tmp_path, module, pipeline, scheduler, left):
    example, vae = module.diffusers_example(), vae_example()
    written(tmp_path / "transformer", arrays_of(example.leaves), example.config)
    factors = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
    written(tmp_path / "vae", arrays_of(vae.leaves), {**vae.config, **factors})
    written(tmp_path / "scheduler", {})
    settings = json.dumps({**SCHEDULER, **scheduler})
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(settings)
    index = {
        "_class_name": pipeline,
        "transformer": ["diffusers", module.CLASS_NAME],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "image_encoder": [None, None],
        **{name: ["transformers", "CLIPTextModel"] for name in left.split(" and ")},
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    found = read_model(tmp_path, **example.choices)
    assert found.family == module.__name__.rpartition(".")[2]
    assert found.vae is not None
    assert found.vae.config["shift_factor"] == 0.1159
    assert found.metadata["scheduler"] == {**SCHEDULER, **scheduler}
    assert f"{left} left out: prompts are given as embeddings" in found.metadata["notes"]


def test_a_ratio_makes_exactly_the_width_of_the_mlp():
    for width in range(1, 60):
        for mlp in range(width, 5 * width, 3):
            assert int(width * mlp_ratio(mlp, width)) == mlp
