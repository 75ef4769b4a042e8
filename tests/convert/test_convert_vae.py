"""Autoencoders under their three namings, Inception, and whole pipelines."""

from __future__ import annotations

import re

import numpy as np
import pytest
from convert_samples import (
    VAE_CONFIG,
    check_tree,
    flat,
    vae_arrays,
    write_folder,
    write_pipeline,
    write_safetensors,
)

from qdit_convert import read_model
from qdit_convert.inception import convolutions
from qdit_convert.reading import to_checkpoint
from qdit_jax.errors import UserError


def test_a_vae_becomes_the_tree_of_our_vae(tmp_path):
    arrays = vae_arrays()
    read = read_model(write_folder(tmp_path / "v", arrays, VAE_CONFIG))
    check_tree(read)
    assert read.family == "vae"
    assert read.config["scaling_factor"] == 0.18215
    path = "decoder/mid_block/attentions_0/to_out_0/kernel"
    weight = arrays["decoder.mid_block.attentions.0.to_out.0.weight"]
    np.testing.assert_array_equal(flat(read.params)[path], weight.T)


OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def old_attention(key):
    for new, old in OLD.items():
        key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
    return key


def latent_diffusion(key):
    """Returns the latent-diffusion name of one of diffusers."""
    for pattern, name in (
        (r"decoder\.up_blocks\.(\d)", lambda m: f"decoder.up.{1 - int(m.group(1))}"),
        (r"down_blocks", "down"),
        (r"mid_block\.resnets\.0", "mid.block_1"),
        (r"mid_block\.resnets\.1", "mid.block_2"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"resnets", "block"),
        (r"downsamplers\.0", "downsample"),
        (r"upsamplers\.0", "upsample"),
        (r"conv_shortcut", "nin_shortcut"),
        (r"conv_norm_out", "norm_out"),
    ):
        key = re.sub(pattern, name, key)
    return key


@pytest.mark.parametrize("as_convolution", [False, True])
@pytest.mark.parametrize("rename", [old_attention, latent_diffusion])
def test_older_names_give_the_same_vae(tmp_path, rename, as_convolution):
    arrays = vae_arrays()
    wanted = flat(read_model(write_folder(tmp_path / "new", arrays, VAE_CONFIG)).params)
    if as_convolution:
        arrays = {
            k: v[..., None, None] if "attentions" in k and v.ndim == 2 else v
            for k, v in arrays.items()
        }
    renamed = {rename(key): array for key, array in arrays.items()}
    assert set(renamed) != set(arrays)
    found = flat(read_model(write_folder(tmp_path / "old", renamed, VAE_CONFIG)).params)
    assert set(found) == set(wanted)
    assert all((found[path] == wanted[path]).all() for path in wanted)


def test_the_autoencoder_inside_a_whole_stable_diffusion_file(pt, tmp_path):
    arrays = {f"first_stage_model.{latent_diffusion(k)}": v for k, v in vae_arrays().items()}
    path = pt(
        {
            "state_dict": {
                **arrays,
                "model.diffusion_model.input_blocks.0.0.weight": arrays[next(iter(arrays))],
            }
        }
    )
    with pytest.raises(UserError, match="U-Net"):
        read_model(path)
    with pytest.raises(UserError, match="norm_num_groups=32 does not divide"):
        read_model(path, family="vae")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"no config\.json"),
        ({**VAE_CONFIG, "norm_num_groups": 5}, "norm_num_groups=5 does not divide"),
        ({**VAE_CONFIG, "block_out_channels": [8, 32]}, r"block_out_channels = \[8, 32\]"),
        ({**VAE_CONFIG, "act_fn": "gelu"}, "act_fn='gelu'"),
        ({**VAE_CONFIG, "scaling_factor": "big"}, "is not a number"),
        ({**VAE_CONFIG, "_class_name": "VQModel"}, "is of a VQModel"),
    ],
)
def test_complaints_about_a_vae(tmp_path, config, message):
    with pytest.raises(UserError, match=message):
        read_model(write_folder(tmp_path / "v", vae_arrays(), config))


def test_inception_has_the_names_of_our_network(pt, tmp_path):
    shapes = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for name, (before, after, rows, columns) in convolutions().items():
        shapes |= {f"{name}.conv.weight": (after, before, rows, columns)}
        shapes |= {
            f"{name}.bn.{k}": (after,) for k in ("weight", "bias", "running_mean", "running_var")
        }
    arrays = {name: np.zeros(shape, np.float16) for name, shape in shapes.items()}
    arrays["Mixed_5b.branch1x1.bn.num_batches_tracked"] = np.zeros((), np.int64)
    read = read_model(write_safetensors(tmp_path / "i.safetensors", arrays), dtype="float16")
    assert read.family == "inception"
    check_tree(read)


def test_a_pipeline_brings_its_vae_and_scheduler(tmp_path):
    read = read_model(write_pipeline(tmp_path / "p"))
    check_tree(read)
    check_tree(read.vae)
    assert read.metadata["scheduler"]["_class_name"] == "DDIMScheduler"
    assert read.metadata["id2label"] == {"0": "tench, Tinca tinca"}
    checkpoint = to_checkpoint(read)
    assert checkpoint.vae is not None


def test_complaints_about_pipelines(tmp_path):
    folder = write_pipeline(tmp_path / "p")
    index = (folder / "model_index.json").read_text()
    (folder / "model_index.json").write_text(index.replace("DiTPipeline", "KandinskyPipeline"))
    with pytest.raises(UserError, match="this is a KandinskyPipeline"):
        read_model(folder)
    (folder / "model_index.json").write_text(index)
    (folder / "vae").rename(folder / "elsewhere")
    with pytest.raises(UserError, match="names the part vae, but the folder vae is missing"):
        read_model(folder)
