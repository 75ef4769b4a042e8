"""What files say beside their weights: schedulers, configs, training arguments, times and scales."""

from __future__ import annotations

import argparse
import json
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_samples import (
    CLASSES,
    VAE_CONFIG,
    diffusers_arrays,
    diffusers_config,
    dit_shapes,
    flat,
    random_arrays,
    vae_arrays,
    write_folder,
    write_pipeline,
    write_safetensors,
)
from torch_file import Object

from qdit_convert import convert, describe, description_text, read_model
from qdit_convert.reading import to_checkpoint
from qdit_convert.settings import AUTOENCODER, TRANSFORMER
from qdit_jax import diffusion, sampling
from qdit_jax.calibration import default_sampler
from qdit_jax.checkpoint import load
from qdit_jax.cli import convert as verb
from qdit_jax.errors import UserError


def change(folder, name, **settings):
    """Writes settings into a JSON file; `...` takes one out."""
    file = folder / name
    changed = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({k: v for k, v in changed.items() if v is not ...}))


@pytest.fixture
def pipeline(tmp_path):
    """Returns a function that writes a pipeline with the given scheduler."""

    def write(class_name="DDIMScheduler", **settings):
        folder = tmp_path / "p"
        if not folder.exists():
            write_pipeline(folder)
        change(folder, "model_index.json", scheduler=["diffusers", class_name])
        change(folder / "scheduler", "scheduler_config.json", _class_name=class_name, **settings)
        return folder

    return write


def command(*args):
    parser = argparse.ArgumentParser()
    verb.add_parser(parser.add_subparsers(dest="verb"))
    parsed = parser.parse_args(["convert", *map(str, args)])
    parsed.run(parsed)


# Schedulers and pipelines.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"num_train_timesteps": "1000"},
            "num_train_timesteps='1000', which is not a whole number",
        ),
        ({"prediction_type": "score"}, "prediction_type='score'; only"),
        ({"prediction_type": "x", "trained_betas": [0.1] * 1000}, "prediction_type='x'; only"),
        ({"timestep_spacing": "odd"}, "timestep_spacing='odd'; only"),
        ({"temperature": 3}, "temperature=3, which is not a setting"),
        ({"class_name": "LCMScheduler"}, "_class_name='LCMScheduler', which is not understood"),
        (
            {"class_name": "DDPMScheduler", "variance_type": "learned"},
            "variance_type='learned'; only",
        ),
        (
            {"class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True},
            "invert_sigmas=True; only False is understood",
        ),
    ],
)
def test_a_scheduler_that_is_not_understood_stops_the_conversion(
    pipeline, tmp_path, settings, message
):
    folder = pipeline(**settings)
    with pytest.raises(UserError, match=f"scheduler_config.json says .*({message})"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_convert_says_what_it_understood_of_the_scheduler(pipeline, tmp_path, capsys):
    folder = pipeline(
        prediction_type="v_prediction", timestep_spacing="trailing", variance_type="fixed_large"
    )
    command(folder, tmp_path / "out", "--quiet")
    printed = capsys.readouterr().out
    assert (
        "scheduler: DDIMScheduler: 1000 linear betas from 0.0001 to 0.02; the network predicts "
        "v_prediction; sampler: DDIM, trailing spacing, data clipped to 1"
    ) in printed
    assert "a DDIMScheduler has no variance_type='fixed_large': not read" in printed
    loaded = load(tmp_path / "out")
    sampler = default_sampler(loaded, 5)
    assert sampler.predict_fn is diffusion.v_prediction
    assert sampler.limit_fn is diffusion.data_clip
    assert sampler.table.timestep.tolist() == [999, 799, 599, 399, 199]


def test_describe_says_the_same(pipeline):
    told = describe(pipeline(prediction_type="sample"))
    assert "network predicts sample; DDIM, leading spacing" in description_text(told)
    assert "note: scaling_factor assumed to be 0.18215" in description_text(told)
    told = describe(pipeline(prediction_type="score"))
    assert "prediction_type='score'; only" in told["problem"]
    assert [network["family"] for network in told["networks"]] == ["dit", "vae"]


def test_a_pipeline_without_a_scheduler_says_what_is_taken(pipeline):
    folder = pipeline()
    change(folder, "model_index.json", scheduler=[None, None], feature_extractor=[None, None])
    read = read_model(folder)
    assert "scheduler" not in read.metadata
    assert "no scheduler: sampled as the published DiT" in read.metadata["notes"][0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheduler": ["diffusers", "DDPMScheduler"]}, "names a DDPMScheduler, but .* DDIM"),
        ({"scheduler": ["mine", "DDIMScheduler"]}, "only a class of diffusers is understood"),
        ({"vae": ["diffusers", "AutoencoderKLWan"]}, "vae=.*only AutoencoderKL is understood"),
        ({"transformer": ["diffusers", "PixArtTransformer2DModel"]}, "only DiTTransformer2DModel"),
        ({"safety_checker": ["diffusers", "X"]}, "safety_checker=.*which is not a setting"),
        ({"id2label": ["cat"]}, r"id2label=\['cat'\], which is not a table"),
        ({"vae": "AutoencoderKL"}, "vae='AutoencoderKL', which is not a list"),
    ],
)
def test_an_index_that_is_not_understood_is_refused(pipeline, changes, message):
    folder = pipeline()
    change(folder, "model_index.json", **changes)
    with pytest.raises(UserError, match=message):
        read_model(folder)


def test_a_learned_variance_must_be_learned(pipeline, dit):
    folder = pipeline("DDPMScheduler", variance_type="learned_range")
    read_model(folder)
    dit["final_layer.linear.weight"] = dit["final_layer.linear.weight"][:16]
    dit["final_layer.linear.bias"] = dit["final_layer.linear.bias"][:16]
    config = diffusers_config(out_channels=4)
    write_folder(folder / "transformer", diffusers_arrays(dit), config)
    with pytest.raises(UserError, match="'learned_range', but the network returns no variance"):
        read_model(folder)


def euler_by_hand(apply, x, label, times):
    """Returns `x` after Euler's rule with the network's own times and velocities."""
    x = np.asarray(x, np.float64)
    for now, following in pairwise(times):
        x = x + (following - now) / abs(times[-1] - times[0]) * apply(x, now, label)
    return x


def raw_velocity(checkpoint):
    """Returns the network as its training saw it: own time, first channels of the output."""
    model = checkpoint.model.clone(velocity=False)

    @jax.jit
    def run(x, timestep, label):
        out = model.apply({"params": checkpoint.params}, x, timestep, label)
        return out[..., : model.in_channels]

    def apply(x, time, label):
        given = jnp.asarray(x, jnp.float32), jnp.full(len(x), time, jnp.float32), label
        return np.asarray(run(*given), np.float64)

    return apply


def start(checkpoint):
    noise = np.random.default_rng(3).standard_normal((2, *checkpoint.model.sample_shape()))
    return jnp.asarray(noise, jnp.float32), jnp.array([1, CLASSES - 1])


def test_a_pipeline_with_flow_matching_samples_as_diffusers_does(pipeline, tmp_path, capsys):
    folder = pipeline("FlowMatchEulerDiscreteScheduler", shift=3.0)
    command(folder, tmp_path / "out", "--quiet")
    assert "Euler's rule, shift 3" in capsys.readouterr().out
    checkpoint = load(tmp_path / "out")
    assert checkpoint.model.velocity
    noise, label = start(checkpoint)
    # sigma runs over linspace(1, s(0.001), 4), shifted once more by s(x) = 3x / (1 + 2x), then 0.
    smallest = 0.003 / 1.002
    sigmas = [3 * x / (1 + 2 * x) for x in np.linspace(1, smallest, 4)] + [0.0]
    times = [1000 * sigma for sigma in sigmas]
    expected = euler_by_hand(raw_velocity(checkpoint), noise, label, times)
    denoise_fn = sampling.denoiser(checkpoint.model, checkpoint.params, None)
    found = diffusion.sample(denoise_fn, default_sampler(checkpoint, 4), noise, label)
    assert np.abs(expected - noise).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheduler",
    [
        {"clip_sample": True},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
        | {"timestep_spacing": "trailing", "clip_sample": False},
        {"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False},
    ],
)
def test_latents_are_those_of_diffusers_own_pipeline(tmp_path, scheduler):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(2)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1
    ).eval()
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    made = diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler(**scheduler))
    made.set_progress_bar_config(disable=True)
    made.save_pretrained(tmp_path / "p")
    kept = []
    vae.decode = lambda z: kept.append(z) or argparse.Namespace(sample=torch.zeros(1, 3, 8, 8))
    label = [3, 7]
    generator = torch.Generator().manual_seed(3)
    made(class_labels=label, generator=generator, num_inference_steps=10, output_type="np")
    expected = kept[0].numpy().transpose(0, 2, 3, 1) * vae.config.scaling_factor

    convert(tmp_path / "p", tmp_path / "ours")
    checkpoint = load(tmp_path / "ours")
    noise = torch.randn((2, 4, 32, 32), generator=torch.Generator().manual_seed(3))
    denoise_fn = sampling.denoiser(checkpoint.model, checkpoint.params, 4.0, None)
    found = diffusion.sample(
        denoise_fn,
        default_sampler(checkpoint, 10),
        jnp.asarray(noise.numpy().transpose(0, 2, 3, 1)),
        jnp.asarray(label),
    )
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


def test_one_part_of_a_pipeline_says_that_its_scheduler_is_left_out(pipeline):
    folder = pipeline()
    read = read_model(folder / "transformer")
    assert "give the folder of the whole pipeline to use its scheduler" in str(read.metadata)
    assert "notes" not in read_model(folder).metadata


# config.json of networks.


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"attention_bias": False}, "attention_bias=False; only True is understood"),
        ({"norm_type": "ada_norm"}, "norm_type='ada_norm'; only 'ada_norm_zero'"),
        ({"cross_attention_dim": 768}, "cross_attention_dim=768; only None"),
        ({"num_vector_embeds": 8}, "num_vector_embeds=8; only None"),
        ({"double_self_attention": True}, "double_self_attention=True; only False"),
        ({"rope": True}, "rope=True, which is not a setting"),
        ({"num_layers": "2"}, "num_layers='2', which is not a whole number"),
        ({"patch_size": 2.0}, "patch_size=2.0, which is not a whole number"),
        ({"norm_eps": -1.0}, "norm_eps=-1.0, which is not in"),
    ],
)
def test_settings_of_a_transformer_that_are_not_understood(dit, tmp_path, config, message):
    folder = write_folder(tmp_path / "d", diffusers_arrays(dit), diffusers_config(**config))
    with pytest.raises(UserError, match=f"config.json says {message}"):
        read_model(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"latents_mean": [0.1, 0.2, 0.3, 0.4]}, r"latents_mean=\[0.1.*; only None is understood"),
        ({"latents_std": [1.0] * 4}, r"latents_std=.*; only None"),
        ({"scaling_factor": "0.18"}, "scaling_factor='0.18', which is not a number"),
        ({"scaling_factor": 0}, "scaling_factor=0, which is not in"),
        ({"shift_factor": [0.1]}, "shift_factor=.*which is not a number"),
        ({"spatial_compression": 8}, "spatial_compression=8, which is not a setting"),
        ({"up_block_types": ["AttnUpDecoderBlock2D"]}, "convert knows 'UpDecoderBlock2D' only"),
    ],
)
def test_settings_of_an_autoencoder_that_are_not_understood(tmp_path, config, message):
    folder = write_folder(tmp_path / "v", vae_arrays(), VAE_CONFIG | config)
    with pytest.raises(UserError, match=f"config.json says .*{message}"):
        read_model(folder)


def test_every_setting_of_the_installed_diffusers_is_in_the_tables():
    diffusers = pytest.importorskip("diffusers")
    import inspect

    for name, table in (("DiTTransformer2DModel", TRANSFORMER), ("AutoencoderKL", AUTOENCODER)):
        given = inspect.signature(getattr(diffusers, name).__init__).parameters
        assert not set(given) - {"self"} - set(table), name


# Scale and shift of latents.


def wider(channels):
    """Returns the small autoencoder with so many latent channels."""
    arrays = vae_arrays()
    shapes = {name: array.shape for name, array in arrays.items()}
    for key in ("encoder.conv_out", "quant_conv"):
        shapes[f"{key}.weight"] = (2 * channels, *shapes[f"{key}.weight"][1:])
        shapes[f"{key}.bias"] = (2 * channels,)
    shapes["quant_conv.weight"] = (2 * channels, 2 * channels, 1, 1)
    shapes["post_quant_conv.weight"] = (channels, channels, 1, 1)
    shapes["post_quant_conv.bias"] = (channels,)
    shapes["decoder.conv_in.weight"] = (16, channels, 3, 3)
    return random_arrays(shapes)


@pytest.mark.parametrize("name", ["sdxl_vae.safetensors", "diffusion_pytorch_model.safetensors"])
def test_the_config_beside_a_single_file_is_read(tmp_path, name):
    path = write_safetensors(tmp_path / name, vae_arrays())
    config = VAE_CONFIG | {"scaling_factor": 0.13025, "shift_factor": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = read_model(path)
    assert read.config["scaling_factor"] == 0.13025
    assert read.config["shift_factor"] == 0.0
    assert "notes" not in read.metadata


def test_a_config_without_a_class_counts_beside_any_name_if_it_is_of_such_a_network(tmp_path):
    path = write_safetensors(tmp_path / "sdxl_vae.safetensors", vae_arrays())
    (tmp_path / "config.json").write_text(
        json.dumps({"scaling_factor": 0.13025, "norm_num_groups": 4})
    )
    assert read_model(path).config["scaling_factor"] == 0.13025


@pytest.mark.parametrize(
    ("config", "given"), [({"shift_factor": 0.1}, {}), ({}, {"shift_factor": 0.1})]
)
def test_a_shift_without_a_scale_is_asked_for_its_scale(tmp_path, config, given):
    folder = write_folder(tmp_path / "v", vae_arrays(), VAE_CONFIG | config)
    with pytest.raises(UserError, match=r"shifted by 0\.1, but nothing says their scaling_factor"):
        read_model(folder, **given)
    read = read_model(folder, scaling_factor=0.5, **given)
    assert (read.config["scaling_factor"], read.config["shift_factor"]) == (0.5, 0.1)


def test_a_config_of_something_else_beside_a_file_is_not_read(tmp_path, dit):
    path = write_safetensors(tmp_path / "mine.safetensors", diffusers_arrays(dit))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(UserError, match="pass --input-size"):
        read_model(path)
    (tmp_path / "config.json").write_text(json.dumps(diffusers_config()))
    assert read_model(path).config["num_heads"] == 2


def test_a_scale_that_is_assumed_is_said(tmp_path, capsys):
    folder = write_folder(tmp_path / "v", vae_arrays(), VAE_CONFIG)
    command(folder, tmp_path / "out", "--quiet")
    assert "scaling_factor assumed to be 0.18215" in capsys.readouterr().out
    assert "assumed" in load(tmp_path / "out").metadata["notes"][0]
    command(folder, tmp_path / "other", "--quiet", "--scaling-factor", "0.13025")
    assert load(tmp_path / "other").model.scaling_factor == 0.13025


def test_sixteen_channels_must_be_told_their_scale_and_shift(tmp_path):
    folder = write_folder(tmp_path / "v", wider(16), VAE_CONFIG)
    for given in ({}, {"scaling_factor": 0.3611}, {"shift_factor": 0.1159}):
        with pytest.raises(
            UserError, match=r"16-channel latents.*pass --scaling-factor and --shift"
        ):
            read_model(folder, **given)
    read = read_model(folder, scaling_factor=0.3611, shift_factor=0.1159)
    assert (read.config["scaling_factor"], read.config["shift_factor"]) == (0.3611, 0.1159)
    change(folder, "config.json", scaling_factor=1.5305, shift_factor=0.0609)
    read = read_model(folder)
    assert (read.config["scaling_factor"], read.config["shift_factor"]) == (1.5305, 0.0609)
    read = read_model(folder, scaling_factor=2.0)
    assert (read.config["scaling_factor"], read.config["shift_factor"]) == (2.0, 0.0609)
    assert "config.json says scaling_factor=1.5305; 2 taken, as asked" in read.metadata["notes"][0]


@pytest.mark.parametrize("given", [{"scaling_factor": 0.0}, {"scaling_factor": -1.0}])
def test_a_scale_must_be_positive(tmp_path, given):
    folder = write_folder(tmp_path / "v", vae_arrays(), VAE_CONFIG)
    with pytest.raises(UserError, match="the first must be positive"):
        read_model(folder, **given)


def test_factors_of_a_pipeline_are_its_autoencoders(pipeline, pt, dit):
    folder = pipeline()
    read = read_model(folder, scaling_factor=0.5, shift_factor=0.1)
    assert (read.vae.config["scaling_factor"], read.vae.config["shift_factor"]) == (0.5, 0.1)
    with pytest.raises(UserError, match=r"noise_time=1 \(--noise-time\) says nothing about a net"):
        read_model(folder, noise_time=1)
    with pytest.raises(UserError, match=r"scaling_factor=0\.5 \(--sc.* says nothing about"):
        read_model(pt(dit), num_heads=2, scaling_factor=0.5)


# Arguments of a training.


def saved(pt, arrays, entry="args", **arguments):
    return pt({"ema": arrays, entry: Object("argparse.Namespace", (), arguments)})


@pytest.mark.parametrize("entry", ["args", "config", "hparams", "hyper_parameters"])
def test_the_files_heads_come_before_the_table_and_after_the_users(pt, entry):
    arrays = random_arrays(dit_shapes(384, 12))
    path = saved(pt, arrays, entry, num_heads=12)
    assert read_model(path).config["num_heads"] == 12
    read = read_model(path, num_heads=6)
    assert read.config["num_heads"] == 6
    assert "say num_heads=12; 6 taken, as asked" in read.metadata["notes"][0]
    read = read_model(path, model="DiT-S/2")
    assert read.config["num_heads"] == 6
    assert "say num_heads=12; 6 taken, as asked" in read.metadata["notes"][0]


def test_a_table_of_arguments_may_be_nested(pt, dit):
    config = {"model": {"target": "DiT", "params": {"num_heads": 4}}, "vae": {"in_channels": 3}}
    read = read_model(pt({"ema": dit, "config": config}))
    assert read.config["num_heads"] == 4
    note = "args not understood and not used: target='DiT', vae.in_channels=3"
    assert read.metadata["notes"] == [note]


def test_arguments_without_bearing_are_not_mentioned(pt, dit):
    read = read_model(
        saved(pt, dit, num_heads=2, lr=1e-4, global_batch_size=256, vae="ema", results_dir=None)
    )
    assert "notes" not in read.metadata
    read = read_model(saved(pt, dit, num_heads=2, lr=1e-4, attention_window=7))
    assert read.metadata["notes"] == ["args not understood and not used: attention_window=7"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"model": "DiT-B/4"},
            "model='DiT-B/4', which has 12 blocks of width 768 and patches of 4",
        ),
        ({"model": "SiT-S/2"}, "model='SiT-S/2', which has 12 blocks"),
        ({"model": 3}, "model=3, which is not text"),
        ({"depth": 3}, "depth=3, but the weights have 2"),
        ({"num_layers": 3}, "num_layers=3, but the weights have 2"),
        ({"hidden_size": 32}, "hidden_size=32, but the weights have 16"),
        ({"patch_size": 4}, "patch_size=4, but the weights have 2"),
        ({"in_channels": 16}, "in_channels=16, but the weights have 4"),
        ({"mlp_ratio": 2.0}, "mlp_ratio=2.0, but the weights have 64 hidden features"),
        ({"learn_sigma": False}, "learn_sigma=False, but the weights have True"),
        (
            {"image_size": 512},
            "image_size=512, but the weights have 4 positions: a latent of 4 rows",
        ),
        ({"resolution": 256}, "resolution=256, but the weights"),
        ({"input_size": 8}, "input_size=8, but the weights have 4 positions"),
        ({"image_size": "big"}, "image_size='big', which is not a size"),
        ({"num_classes": 7}, "num_classes=7, which the label table of 11 rows does not fit"),
        ({"num_classes": "10"}, "num_classes='10', which is not a whole number"),
        ({"num_classes": 10, "class_dropout_prob": 0.0}, "num_classes=10 and class_dropout_prob=0"),
        (
            {"num_classes": 11, "class_dropout_prob": 0.1},
            "num_classes=11 and class_dropout_prob=0.1",
        ),
        ({"num_heads": 4, "n_heads": 2}, "num_heads=4 and n_heads=2"),
        ({"num_heads": 2.5}, "num_heads=2.5, which is not a whole number"),
        ({"qk_norm": True}, "qk_norm=True; only False is understood"),
        ({"use_rope": True}, "use_rope=True; only False"),
        ({"predict_xstart": True}, "predict_xstart=True; of a DiT, False is understood"),
        ({"noise_schedule": "cosine"}, "noise_schedule='cosine'; of a DiT, 'linear' is understood"),
        ({"diffusion_steps": 4000}, "diffusion_steps=4000; of a DiT, 1000"),
        (
            {"prediction": "noise", "path_type": "Linear"},
            "prediction='noise'; of a SiT, 'velocity'",
        ),
        ({"prediction": "score", "path_type": "VP"}, "prediction='score'; of a SiT"),
        ({"prediction": "score"}, "prediction='score'; of a SiT"),
        ({"prediction": "velocity", "path_type": "GVP"}, "path_type='GVP'; of a SiT, 'Linear'"),
        ({"prediction": "v", "path_type": "cosine"}, "path_type='cosine'; of a SiT"),
    ],
)
def test_arguments_that_contradict_the_weights_or_are_not_understood(pt, dit, arguments, message):
    with pytest.raises(UserError, match=f"saved arguments say .*{message}"):
        read_model(saved(pt, dit, **arguments))


@pytest.mark.parametrize(
    "entry", ["opt", "options", "train_args", "model_kwargs", "network_config", "Hyper-Parameters"]
)
def test_tables_of_arguments_by_other_names_are_read(pt, dit, entry):
    assert read_model(saved(pt, dit, entry, num_heads=4)).config["num_heads"] == 4
    with pytest.raises(UserError, match="prediction='noise'; of a SiT"):
        read_model(saved(pt, dit, entry, prediction="noise", num_heads=4), family="sit")


@pytest.mark.parametrize(
    "arguments", [{"num-heads": 4}, {"NUM_HEADS": 4}, {"heads": 4}, {"n_head": 4}, {"head_dim": 4}]
)
def test_arguments_in_other_spellings_are_read(pt, dit, arguments):
    assert read_model(saved(pt, dit, **arguments)).config["num_heads"] == 4


def test_settings_beside_the_weights_are_read(pt, dit):
    assert read_model(pt({"ema": dit, "num_heads": 4})).config["num_heads"] == 4
    with pytest.raises(UserError, match="num_heads=4 and num_heads=2"):
        read_model(pt({"ema": dit, "num_heads": 2, "args": {"num_heads": 4}}))
    read = read_model(
        pt({"ema": dit, "epoch": 3, "optimizer_config": {"num_heads": 4}}), num_heads=2
    )
    assert "notes" not in read.metadata


@pytest.mark.parametrize(
    ("arguments", "family", "message"),
    [
        ({"prediction_type": "v_prediction"}, None, "prediction_type='v_prediction'; of a DiT"),
        ({"parameterization": "x0"}, None, "parameterization='x0'; of a DiT"),
        ({"objective": "pred_x0"}, None, "objective='pred_x0'; of a DiT"),
        ({"beta_schedule": "cosine"}, None, "beta_schedule='cosine'; of a DiT"),
        ({"num_timesteps": 4000}, None, "num_timesteps=4000; of a DiT"),
        ({"path-type": "GVP"}, "sit", "path-type='GVP'; of a SiT"),
        ({"interpolant": "GVP"}, "sit", "interpolant='GVP'; of a SiT"),
        ({"head_dim": 5}, None, "head_dim=5, which the width 16"),
        ({"head_dim": 8, "num_heads": 4}, None, "head_dim=8 and num_heads=4, which the width 16"),
    ],
)
def test_a_process_in_other_spellings_is_understood_or_refused(pt, dit, arguments, family, message):
    with pytest.raises(UserError, match=f"saved arguments say .*{message}"):
        read_model(saved(pt, dit, **arguments), family=family)


def test_heads_that_contradict_the_model_are_refused(pt):
    arrays = random_arrays(dit_shapes(384, 12))
    path = saved(pt, arrays, model="DiT-S/2", num_heads=12)
    with pytest.raises(UserError, match="num_heads=12 and model='DiT-S/2', which has 6; pass"):
        read_model(path)
    assert read_model(path, num_heads=12).config["num_heads"] == 12


def test_what_the_user_says_settles_contradictions(pt, dit):
    path = saved(pt, dit, num_classes=7, image_size=512)
    read = read_model(path, num_heads=2, num_classes=10, input_size=4)
    assert read.config["num_classes"] == 10
    assert "say num_classes=7; 10 taken, as asked" in read.metadata["notes"][0]


def test_training_without_dropout_leaves_no_null_class(pt, dit):
    config = read_model(saved(pt, dit, num_heads=2, class_dropout_prob=0.0)).config
    assert (config["num_classes"], config["null_class"]) == (11, False)
    config = read_model(saved(pt, dit, num_heads=2, class_dropout_prob=0.1)).config
    assert (config["num_classes"], config["null_class"]) == (10, True)


@pytest.mark.parametrize(
    "arguments",
    [
        {"path_type": "Linear", "prediction": "velocity", "loss_weight": None, "train_eps": None},
        {"prediction": "velocity"},
        {"path_type": "Linear", "prediction": "velocity", "learn_sigma": True, "cfg_scale": 4.0},
    ],
)
def test_arguments_of_sit_make_it_a_sit(pt, dit, arguments):
    read = read_model(saved(pt, dit, num_heads=2, **arguments))
    assert read.config["velocity"]
    assert read.metadata["source_family"] == "sit"
    assert read.metadata["notes"] == ["time taken to be 0 at noise, 1 at data (as SiT trains)"]
    with pytest.raises(UserError, match="prediction='velocity'; of a DiT"):
        read_model(saved(pt, dit, num_heads=2, **arguments), family="dit")


# REPA, whose time runs the other way.


@pytest.fixture
def repa():
    """Returns a small REPA checkpoint: no learned sigma, two projectors."""
    shapes = dit_shapes()
    shapes |= {"final_layer.linear.weight": (16, 16), "final_layer.linear.bias": (16,)}
    for i in range(2):
        for layer, (out, inner) in {0: (24, 16), 2: (24, 24), 4: (40, 24)}.items():
            shapes |= {f"projectors.{i}.{layer}.weight": (out, inner)}
            shapes |= {f"projectors.{i}.{layer}.bias": (out,)}
    return random_arrays(shapes, seed=5)


def test_repa_runs_from_one_at_noise_to_zero_at_data(pt, repa, tmp_path, capsys):
    command(pt({"ema": repa}), tmp_path / "out", "--num-heads", 2, "--quiet")
    printed = capsys.readouterr().out
    assert "12 tensors (projectors.*) are of training only: left out" in printed
    assert "time taken to be 1 at noise, 0 at data (as REPA trains)" in printed
    assert "--family sit" not in printed
    checkpoint = load(tmp_path / "out")
    assert not any("projectors" in path for path in flat(checkpoint.params))
    noise, label = start(checkpoint)
    # As REPA's own sampler: x += (t' - t) v, t from 1 to 0.
    expected = euler_by_hand(raw_velocity(checkpoint), noise, label, np.linspace(1, 0, 7))
    denoise_fn = sampling.denoiser(checkpoint.model, checkpoint.params, None)
    found = diffusion.sample(denoise_fn, default_sampler(checkpoint, 6), noise, label)
    assert np.abs(expected - noise).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4)
    other = euler_by_hand(raw_velocity(checkpoint), noise, label, np.linspace(0, 1, 7))
    assert np.abs(found - other).max() > 0.05


def test_repa_without_its_projectors_is_told_by_arguments_or_the_user(pt, repa):
    bare = {name: array for name, array in repa.items() if not name.startswith("projectors.")}

    def times(path, **options):
        config = read_model(path, num_heads=2, **options).config
        return config["noise_time"], config["data_time"]

    for arguments in ({"prediction": "v"}, {"path_type": "linear", "enc_type": "dinov2-vit-b"}):
        assert times(saved(pt, bare, **arguments)) == (1.0, 0.0)
        assert times(saved(pt, bare, **arguments), noise_time=0) == (0.0, 1.0)
    assert times(pt(bare), family="sit", noise_time=1) == (1.0, 0.0)
    read = read_model(pt(bare), family="sit", num_heads=2)
    assert (read.config["noise_time"], read.config["data_time"]) == (0.0, 1.0)
    assert "the file cannot tell: REPA's runs the other way, --noise-time 1" in str(read.metadata)
    with pytest.raises(UserError, match="noise_time=1 is of a network that predicts a velocity"):
        read_model(pt(bare), num_heads=2, noise_time=1)
    with pytest.raises(UserError, match="noise_time=2 is not understood; use 0 or 1"):
        read_model(pt(bare), family="sit", num_heads=2, noise_time=2)


def test_a_sit_keeps_its_own_time(pt, dit):
    checkpoint = to_checkpoint(read_model(pt(dit), family="sit", num_heads=2))
    noise, label = start(checkpoint)
    expected = euler_by_hand(raw_velocity(checkpoint), noise, label, np.linspace(0, 1, 5))
    denoise_fn = sampling.denoiser(checkpoint.model, checkpoint.params, None)
    found = diffusion.sample(denoise_fn, diffusion.flow(4), noise, label)
    np.testing.assert_allclose(found, expected, atol=1e-4)
