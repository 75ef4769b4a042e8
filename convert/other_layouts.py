"""The rows of networks that do not denoise in the table of layouts: autoencoders, and those of features."""

from __future__ import annotations

import re
from dataclasses import replace

from qdit_convert.i3d import i3d_example, i3d_plan
from qdit_convert.inception import inception_example, inception_plan
from qdit_convert.layout import Layout
from qdit_convert.vae import (
    AUTOENCODER_NAME,
    from_latent_diffusion,
    in_latent_diffusion_names,
    latent_diffusion_example,
    vae_example,
    vae_plan,
)
from qdit_convert.wan_vae import (
    CLASS_NAME,
    authors_vae_example,
    from_authors,
    in_authors_names,
    residual_vae_example,
    wan_vae_example,
    wan_vae_plan,
)

VAE_OPTIONS = ("scaling_factor", "shift_factor")
VAE_TELLS = frozenset({"scaling_factor", "shift_factor", "latent_channels", "norm_num_groups"})
# The convolutions of both autoencoders have the same names; Wan's norms have a gamma.
VAE_NAMES = re.compile(
    r"(post_)?quant_conv\.|(en|de)coder\.(conv_(in|out|norm_out)\.|norm_out\.gamma$|mid_block\.|"
    r"down_blocks\.\d+\.(conv\d|conv_shortcut|norm\d|resample\.1|time_conv)\.|"
    r"(down|up)_blocks\.\d+\.(resnets|(down|up)samplers?)\.)"
)
WAN_VAE = Layout(
    "wan-vae",
    "Wan's autoencoder in the diffusers layout",
    ("wan-vae",),
    VAE_NAMES,
    wan_vae_plan,
    class_names=(CLASS_NAME,),
    told=lambda state: any(key.endswith(".gamma") for key in state.tensors),
    example=wan_vae_example,
    tells=frozenset({"latents_mean", "temperal_downsample"}),
)
OTHER_LAYOUTS = (
    Layout(
        "vae-diffusers",
        "AutoencoderKL in the diffusers layout",
        ("vae",),
        VAE_NAMES,
        vae_plan,
        wants_config=True,
        options=VAE_OPTIONS,
        class_names=(AUTOENCODER_NAME,),
        example=vae_example,
        tells=VAE_TELLS,
    ),
    replace(
        WAN_VAE,
        name="wan-vae-residual",
        title="Wan's 5B autoencoder in the diffusers layout",
        told=lambda state: any(".downsampler." in key for key in state.tensors),
        example=residual_vae_example,
    ),
    WAN_VAE,
    Layout(
        "wan-vae-authors",
        "Wan 2.1's autoencoder in the authors' layout",
        ("wan-vae",),
        re.compile(
            r"conv[12]\.|(en|de)coder\.(conv1\.|head\.[02]\.|middle\.[012]\.|"
            r"(down|up)samples\.\d+\.)"
        ),
        wan_vae_plan,
        rename=from_authors,
        own_names=in_authors_names,
        example=authors_vae_example,
    ),
    Layout(
        "vae-latent-diffusion",
        "AutoencoderKL in the latent-diffusion layout",
        ("vae",),
        re.compile(
            r"(post_)?quant_conv\.|(en|de)coder\.(conv_(in|out)\.|norm_out\.|mid\.|(down|up)\.\d+\.)"
        ),
        vae_plan,
        parts=frozenset({"encoder", "decoder", "quant_conv", "post_quant_conv"}),
        options=VAE_OPTIONS,
        class_names=(AUTOENCODER_NAME,),
        tells=VAE_TELLS,
        rename=from_latent_diffusion,
        own_names=in_latent_diffusion_names,
        example=latent_diffusion_example,
    ),
    Layout(
        "inception",
        "InceptionV3 for FID",
        ("inception",),
        re.compile(r"fc\.|(Conv2d_\d\w_\dx\d|Mixed_\d\w\.branch\w+)\.(conv|bn)\."),
        lambda state, *_: inception_plan(state),
        example=inception_example,
    ),
    Layout(
        "i3d",
        "I3D for FVD",
        ("i3d",),
        re.compile(r"logits\.conv3d\.|(Conv3d_\d\w_\dx\d|Mixed_\d\w\.b\d\w?)\.(conv3d|bn)\."),
        lambda state, *_: i3d_plan(state),
        example=i3d_example,
    ),
)
