"""Files of Sana, Z-Image and FLUX.2: what they leave open, config.json, whole pipelines."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from qdit_convert import flux2, read_model, sana, z_image
from qdit_convert.api import to_checkpoint
from qdit_convert.vae import vae_example
from qdit_jax.errors import UserError
from qdit_jax.sampling import checkpoint_sampler

DPM = {
    "_class_name": "DPMSolverMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}
EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
FLUX2_SCHEDULER = EULER | {"use_dynamic_shifting": True, "shift": 3.0}


def arrays_of(leaves):
    rng = np.random.default_rng(0)
    return {
        key: (0.1 * rng.standard_normal(shapes[0])).astype(np.float32)
        for leaf in leaves
        for key, shapes in leaf.expected.items()
    }


def written(folder, arrays, config=None):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(arrays, folder / "diffusion_pytorch_model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("module", "changes", "told"),
    [
        (sana, {"num_layers": 3}, "num_layers = 3, but the weights have 2"),
        (sana, {"attention_head_dim": 4}, r"attention_head_dim = 12, but the weights have 24"),
        (sana, {"cross_attention_head_dim": 6}, "cross_attention_head_dim = 12, but the weights"),
        (sana, {"cross_attention_dim": 20}, "cross_attention_dim = 20, but the weights have 24"),
        (sana, {"mlp_ratio": 2.0}, r"mlp_ratio \* width = 48, but the weights have 60"),
        (sana, {"attention_bias": True}, "attention_bias = True, but the weights have False"),
        (sana, {"guidance_embeds": True}, "guidance_embeds = True, but the weights have False"),
        (sana, {"qk_norm": None}, "qk_norm = False, but the weights have True"),
        (sana, {"qk_norm": "layer_norm"}, "qk_norm='layer_norm'"),
        (sana, {"norm_elementwise_affine": True}, "norm_elementwise_affine=True"),
        (sana, {"_class_name": "SanaVideoTransformer3DModel"}, "config.json is of a SanaVideo"),
        (z_image, {"dim": 48}, "dim = 48, but the weights have 24"),
        (z_image, {"n_heads": 3}, "num_heads=3 does not fit the width 24"),
        (z_image, {"all_patch_size": [4]}, r"all_patch_size = \[4\], but the weights have \[2\]"),
        (z_image, {"all_f_patch_size": [2]}, r"all_f_patch_size=\[2\]"),
        (z_image, {"siglip_feat_dim": 12}, "siglip_feat_dim=12"),
        (z_image, {"qk_norm": False}, "qk_norm = False, but the weights have True"),
        (z_image, {"axes_dims": [4, 4, 2]}, "make 10 channels, but a head has 12"),
        (z_image, {"axes_lens": [128, 32]}, r"axes_lens=\[128, 32\]"),
        (z_image, {"axes_lens": [32, 32, 32]}, "need 34 positions of the first"),
        (flux2, {"guidance_embeds": False}, "guidance_embeds = False, but the weights have True"),
        (flux2, {"axes_dims_rope": [2, 4, 2]}, "must be four even numbers"),
        (flux2, {"patch_size": 2}, "patch_size=2"),
        (flux2, {"mlp_ratio": 4.0}, "mlp_ratio = 4.0, but the weights have MLPs of 48"),
        (flux2, {"num_single_layers": 1}, "num_single_layers = 1, but the weights have 2"),
        (flux2, {"colour": 1}, "colour"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, module, changes, told):
    example = module.diffusers_example()
    folder = written(tmp_path, arrays_of(example.leaves), {**example.config, **changes})
    with pytest.raises(UserError, match=told):
        read_model(folder, **example.choices)


@pytest.mark.parametrize(
    ("module", "setting", "field", "value"),
    [
        (sana, "norm_eps", "norm_eps", 1e-3),
        (sana, "interpolation_scale", "interpolation_scale", 2.0),
        (sana, "timestep_scale", "timestep_scale", 1000.0),
        (sana, "sample_size", "sample_size", 8),
        (z_image, "norm_eps", "norm_eps", 1e-3),
        (z_image, "rope_theta", "rope_base", 1e4),
        (z_image, "t_scale", "time_unit", 300.0),
        (z_image, "axes_lens", "rope_lengths", [99, 40, 40]),
        (flux2, "eps", "norm_eps", 1e-3),
        (flux2, "rope_theta", "rope_base", 1e4),
    ],
)
def test_what_a_config_says_is_a_field_of_the_network(tmp_path, module, setting, field, value):
    example = module.diffusers_example()
    folder = written(tmp_path, arrays_of(example.leaves), {**example.config, setting: value})
    found = read_model(folder, **example.choices)
    assert json.loads(json.dumps(found.config[field])) == value
    assert found.config["text_length"] == {99: 96, 128: 96}.get(
        found.config.get("rope_lengths", [0])[0], found.config["text_length"]
    )


@pytest.mark.parametrize("module", [sana, z_image, flux2])
def test_a_file_without_a_config_says_what_is_assumed_and_asks_for_the_rest(tmp_path, module):
    example = module.original_example()
    path = tmp_path / "model.safetensors"
    save_file(arrays_of(example.leaves), path)
    found = read_model(path, **{k: v for k, v in example.choices.items() if k != "input_size"})
    assert any("sample_size taken to be" in note for note in found.metadata["notes"])
    asked = {sana: "--num-heads", z_image: "--rope-axes", flux2: "--rope-axes"}[module]
    with pytest.raises(UserError, match=asked):
        read_model(path)


def test_guidance_that_is_embedded_comes_with_a_word_on_its_sampler(tmp_path):
    sizes = sana.Sizes(**{**vars(sana.SMALL), "guidance": True})
    leaves = sana.leaves_of(sizes, sana.in_diffusers(True))
    config = {**sana.diffusers_example().config, "guidance_embeds": True}
    folder = written(tmp_path, arrays_of(leaves), config)
    found = read_model(folder)
    assert sana.GUIDED in found.metadata["notes"]
    assert found.config["guidance_unit"] == 0.1
    assert not to_checkpoint(found).model.has_null


PIPELINES = [
    ("SanaPipeline", sana, "AutoencoderDC", DPM, {}),
    ("ZImagePipeline", z_image, "AutoencoderKL", EULER | {"shift": 3.0}, {}),
    ("Flux2KleinPipeline", flux2, "AutoencoderKLFlux2", FLUX2_SCHEDULER, {"is_distilled": True}),
    ("Flux2KleinPipeline", flux2, "AutoencoderKLFlux2", FLUX2_SCHEDULER, {"is_distilled": False}),
    ("Flux2Pipeline", flux2, "AutoencoderKLFlux2", FLUX2_SCHEDULER, {}),
]


@pytest.mark.parametrize(("pipeline", "module", "vae", "scheduler", "more"), PIPELINES)
def test_a_whole_pipeline_is_read(tmp_path, pipeline, module, vae, scheduler, more):
    example = module.diffusers_example()
    written(tmp_path / "transformer", arrays_of(example.leaves), example.config)
    factors = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
    written(tmp_path / "vae", arrays_of(vae_example().leaves), {**vae_example().config, **factors})
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = {
        "_class_name": pipeline,
        "transformer": ["diffusers", module.CLASS_NAME],
        "vae": ["diffusers", vae],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "Qwen3ForCausalLM"],
        "tokenizer": ["transformers", "Qwen2TokenizerFast"],
        **more,
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    found = read_model(tmp_path, **example.choices)
    notes = found.metadata["notes"]
    told = "text_encoder and tokenizer left out: prompts are given as embeddings"
    assert told in notes
    assert (found.vae is None) == (vae != "AutoencoderKL")
    assert any(f"vae left out: an {vae}" in note for note in notes) == (found.vae is None)
    assert any("distilled" in note for note in notes) == bool(more.get("is_distilled"))
    checkpoint = to_checkpoint(found)
    sampler = checkpoint_sampler(checkpoint, 4)
    first, last = (float(t) for t in (sampler.table.timestep[0], sampler.table.timestep[-1]))
    noise, data = checkpoint.model.flow_times
    assert abs(first - noise) <= 1e-3 * abs(noise - data)
    assert abs(last - data) < 0.8 * abs(noise - data)
    index["vae"] = ["diffusers", "AutoencoderTiny"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=re.escape("'AutoencoderTiny'")):
        read_model(tmp_path, **example.choices)
