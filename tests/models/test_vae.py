"""The image autoencoder: the original's outputs and activations, sizes, names, errors."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qdit_convert import read_model
from qdit_convert.vae import latent_diffusion_names
from qdit_jax import checkpoint
from qdit_jax.errors import UserError
from qdit_jax.models import AutoencoderKL, build_model

TOLERANCE = 2e-5


def small_model(**changes) -> AutoencoderKL:
    settings = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
    return AutoencoderKL(**settings | changes)


def from_folder(folder) -> tuple[AutoencoderKL, dict]:
    read = read_model(folder)
    return build_model(read.family, read.config), read.params


def nhwc(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, 1, -1)


@pytest.fixture(scope="module")
def published(golden):
    return *from_folder(golden("vae")), np.load(golden("vae_io.npz"))


def test_older_names_give_the_same_model(published, golden):
    model, params, _ = published
    older_model, older_params = from_folder(golden("vae_legacy_keys"))
    assert older_model == model
    jax.tree.map(np.testing.assert_array_equal, older_params, params)


def test_decoder_equals_the_original_at_every_stage(published):
    model, params, io = published
    out, state = model.apply(
        {"params": params}, nhwc(io["z"]), method="decode", capture_intermediates=True
    )
    seen = state["intermediates"]
    decoder = seen["decoder"]
    stages = {
        "post_quant": seen["post_quant_conv"],
        "dec_mid_attn": decoder["mid_block"]["attentions_0"],
        "dec_mid": decoder["mid_block"],
        "dec_up0": decoder["up_blocks_0"],
        "dec_up1": decoder["up_blocks_1"],
    }
    for name, stage in stages.items():
        np.testing.assert_allclose(
            stage["__call__"][0], nhwc(io[name]), atol=TOLERANCE, err_msg=name
        )
    np.testing.assert_allclose(out, nhwc(io["decoded"]), atol=TOLERANCE)


def test_decoder_takes_sizes_that_are_not_square(published):
    model, params, io = published
    out = model.apply({"params": params}, nhwc(io["z_nonsquare"]), method="decode")
    np.testing.assert_allclose(out, nhwc(io["decoded_nonsquare"]), atol=TOLERANCE)


def test_decoded_pixels_of_scaled_latents_equal_the_original(published):
    model, params, io = published
    latents = nhwc(io["z"]) / model.scaling_factor
    out = model.apply({"params": params}, latents, method="decode")
    pixels = np.uint8(np.clip(127.5 * np.asarray(out) + 128, 0, 255))
    differ = np.abs(pixels.astype(int) - io["decoded_uint8_of_z_over_scale"])
    assert differ.max() <= 1
    assert (differ > 0).mean() < 1e-3


def test_encoder_equals_the_original_at_every_stage(published):
    model, params, io = published
    (mean, logvar), state = model.apply(
        {"params": params}, nhwc(io["image"]), method="encode", capture_intermediates=True
    )
    encoder = state["intermediates"]["encoder"]
    for i in range(2):
        block = encoder[f"down_blocks_{i}"]["__call__"][0]
        np.testing.assert_allclose(block, nhwc(io[f"enc_down{i}"]), atol=TOLERANCE)
    np.testing.assert_allclose(mean, nhwc(io["enc_mean"]), atol=TOLERANCE)
    np.testing.assert_allclose(mean, nhwc(io["enc_mode"]), atol=TOLERANCE)
    np.testing.assert_allclose(logvar, nhwc(io["enc_logvar"]), atol=TOLERANCE)
    np.testing.assert_allclose(jnp.exp(0.5 * logvar), nhwc(io["enc_std"]), atol=TOLERANCE)


def test_initialized_names_and_shapes_equal_the_published_ones(published):
    model, params, _ = published
    fresh = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs())["params"]
    shapes = jax.tree.map(lambda leaf: leaf.shape, fresh)
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, params)


def test_published_size_has_the_published_number_of_values():
    shapes = jax.eval_shape(AutoencoderKL().init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    leaves = jax.tree.leaves(shapes)
    assert len(leaves) == 248
    assert sum(leaf.size for leaf in leaves) == 83_653_863


def test_checkpoint_comes_back(published, tmp_path):
    model, params, _ = published
    checkpoint.save(tmp_path / "vae", checkpoint.Checkpoint(model, params))
    again = checkpoint.load(tmp_path / "vae")
    assert again.model == model
    jax.tree.map(np.testing.assert_array_equal, again.params, params)


def test_logvar_is_clamped(published):
    model, params, _ = published
    bias = np.repeat([0, 1e3], 4).astype(np.float32)
    params = {**params, "quant_conv": {**params["quant_conv"], "bias": bias}}
    encode = jax.jit(lambda p, x: model.apply({"params": p}, x, method="encode"))
    _, logvar = encode(params, jnp.zeros((1, 8, 8, 3)))
    assert (np.asarray(logvar) == 20).all()


def test_config_survives_json():
    model = small_model(use_quant_conv=False, mid_block_add_attention=False)
    fields = [f for f in AutoencoderKL.__dataclass_fields__ if f not in ("name", "parent")]
    config = json.loads(json.dumps({f: getattr(model, f) for f in fields}))
    again = AutoencoderKL(**config)
    x = jnp.zeros((1, 8, 8, 3))
    shapes = [jax.eval_shape(m.init, jax.random.key(0), x)["params"] for m in (model, again)]
    assert shapes[0] == shapes[1]
    assert "quant_conv" not in shapes[0]
    assert "attentions_0" not in shapes[0]["decoder"]["mid_block"]
    hash(again)  # a jitted function may take the model as a static argument


def test_wrong_sizes_are_named():
    model, key = small_model(), jax.random.key(0)
    good = jnp.zeros((1, 8, 8, 3))
    params = jax.eval_shape(model.init, key, good)
    with pytest.raises(ValueError, match="divisible by 2"):
        jax.eval_shape(lambda p: model.apply(p, good[:, :7], method="encode"), params)
    with pytest.raises(ValueError, match=r"\[B, h, w, 4\]"):
        jax.eval_shape(lambda p: model.apply(p, good, method="decode"), params)
    with pytest.raises(ValueError, match="norm_num_groups=7"):
        jax.eval_shape(small_model(norm_num_groups=7).init, key, good)


@pytest.mark.parametrize(
    "changes",
    [
        {"block_out_channels": (8, 8, 16), "layers_per_block": 2, "norm_num_groups": 4},
        {"latent_channels": 3, "use_quant_conv": False, "use_post_quant_conv": False},
        {"mid_block_add_attention": False},
    ],
)
def test_random_models_equal_the_torch_peer(tmp_path, changes):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    model = small_model(**changes)
    levels = len(model.block_out_channels)
    torch.manual_seed(3)
    peer = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        **{k: list(v) if isinstance(v, tuple) else v for k, v in settings_of(model).items()},
    ).eval()
    with torch.no_grad():
        for p in peer.parameters():
            p.add_(0.1 * torch.randn_like(p))
        x = torch.randn(2, 3, 16, 24)
        posterior = peer.encode(x).latent_dist
        decoded = peer.decode(posterior.mean).sample.numpy()
    peer.save_pretrained(tmp_path)
    converted, params = from_folder(tmp_path)
    assert converted == model
    params = {"params": params}
    mean, logvar = model.apply(params, nhwc(x.numpy()), method="encode")
    out = model.apply(params, nhwc(posterior.mean.numpy()), method="decode")
    for ours, theirs in [
        (mean, posterior.mean.numpy()),
        (logvar, posterior.logvar.numpy()),
        (out, decoded),
    ]:
        scale = 1 + np.abs(theirs).max()
        np.testing.assert_allclose(ours, nhwc(theirs), atol=TOLERANCE * scale)


def settings_of(model: AutoencoderKL) -> dict:
    names = set(AutoencoderKL.__dataclass_fields__) - {"name", "parent", "shift_factor"}
    return {name: getattr(model, name) for name in names}


@pytest.fixture(scope="module")
def sixteen(golden):
    folder = golden("families/flux/vae_16_channels")
    return folder, np.load(folder / "io.npz")


def check_sixteen(read, io):
    model, params = build_model(read.family, read.config), read.params
    assert (model.latent_channels, model.use_quant_conv, model.use_post_quant_conv) == (16, 0, 0)
    assert (model.scaling_factor, model.shift_factor) == (0.3611, 0.1159)
    decoded = model.apply({"params": params}, nhwc(io["z"]), method="decode")
    moments = model.apply({"params": params}, nhwc(io["image"]), method="encode")
    for found, name in zip((decoded, *moments), ("decoded", "mean", "logvar"), strict=True):
        np.testing.assert_allclose(found, nhwc(io[name]), atol=TOLERANCE)


def test_sixteen_channels_without_quant_convolutions(sixteen):
    folder, io = sixteen
    check_sixteen(read_model(folder), io)


def test_sixteen_channels_under_the_names_of_latent_diffusion(sixteen, tmp_path):
    folder, io = sixteen
    arrays = load_file(folder / "diffusion_pytorch_model.safetensors")
    named = {latent_diffusion_names(key, 2): array for key, array in arrays.items()}
    factors = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
    (tmp_path / "config.json").write_text(json.dumps({"norm_num_groups": 4, **factors}))
    save_file(named, tmp_path / "ae.safetensors")
    check_sixteen(read_model(tmp_path / "ae.safetensors"), io)
    (tmp_path / "config.json").write_text(json.dumps({"norm_num_groups": 4, "latent_channels": 16}))
    with pytest.raises(UserError, match=r"1\.5305 and 0\.0609 of Stable Diffusion 3, 0\.3611 and"):
        read_model(tmp_path / "ae.safetensors")
    whole = {f"first_stage_model.{key}": array for key, array in named.items()}
    save_file(whole, tmp_path / "sd3.safetensors")
    check_sixteen(read_model(tmp_path / "sd3.safetensors", **factors), io)
