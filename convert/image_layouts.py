"""The rows of layouts of FLUX, FLUX.2, Z-Image and Sana."""

from __future__ import annotations

import re
from dataclasses import replace

from qdit_convert import flux, flux2, sana, z_image
from qdit_convert.layout import Layout

SD3_OPTIONS = ("num_heads", "input_size")
FLUX_OPTIONS = (*SD3_OPTIONS, "rope_axes")
SANA_OPTIONS = (*SD3_OPTIONS, "interpolation_scale")
FLUX_BFL = Layout(
    "flux-bfl",
    "FLUX in the Black Forest Labs layout",
    ("flux",),
    # FLUX.2's own names too: most are the same.
    re.compile(
        r"(double|single)_blocks\.\d+\.(((img|txt)_(mod|attn|mlp)|modulation|norm)\.|linear[12]\.)|"
        r"(img|txt)_in\.|(time|vector|guidance)_in\.(in|out)_layer\.|"
        r"(double_stream_modulation_(img|txt)|single_stream_modulation)\.lin\.|"
        r"final_layer\.(adaLN_modulation\.1|linear)\."
    ),
    flux.original_plan,
    options=FLUX_OPTIONS,
    example=flux.original_example,
    writes="flux",
)
Z_BLOCK = r"(noise_refiner|context_refiner|layers)\.\d+\."
Z_NAMES = (
    r"feed_forward\.w[123]\.|(attention|ffn)_norm[12]\.|adaLN_modulation\.0\.)|"
    r"cap_embedder\.[01]\.|t_embedder\.mlp\.[02]\.|(x|cap)_pad_token$|"
)
Z_LAST = r"(linear|adaLN_modulation\.1)\."
IMAGE_LAYOUTS = (
    FLUX_BFL,
    replace(
        FLUX_BFL,
        name="flux2-bfl",
        title="FLUX.2 in the Black Forest Labs layout",
        families=("flux2",),
        plan=flux2.original_plan,
        told=flux2.is_flux2,
        example=flux2.original_example,
        writes="",
    ),
    Layout(
        "flux2-diffusers",
        "FLUX.2 in the diffusers layout",
        ("flux2",),
        re.compile(
            r"transformer_blocks\.\d+\.(attn\.(to_(q|k|v|out\.0|add_out)|add_[qkv]_proj|"
            r"norm_(added_)?[qk])\.|ff(_context)?\.linear_(in|out)\.)|"
            r"single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out|norm_[qk])\.|"
            r"(double_stream_modulation_(img|txt)|single_stream_modulation)\.linear\.|"
            r"(context|x)_embedder\.|time_guidance_embed\.|norm_out\.linear\.|proj_out\."
        ),
        flux2.diffusers_plan,
        options=FLUX_OPTIONS,
        class_names=(flux2.CLASS_NAME,),
        tells=frozenset({"timestep_guidance_channels"}),
        example=flux2.diffusers_example,
    ),
    Layout(
        "z-image",
        "Z-Image in the authors' layout",
        ("z-image",),
        re.compile(
            rf"{Z_BLOCK}(attention\.(qkv|out|[qk]_norm)\.|{Z_NAMES}"
            rf"x_embedder\.(weight|bias)$|final_layer\.{Z_LAST}"
        ),
        z_image.original_plan,
        options=FLUX_OPTIONS,
        example=z_image.original_example,
    ),
    Layout(
        "z-image-diffusers",
        "Z-Image in the diffusers layout",
        ("z-image",),
        re.compile(
            rf"{Z_BLOCK}(attention\.(to_(q|k|v|out\.0)|norm_[qk])\.|{Z_NAMES}"
            rf"all_x_embedder\.\d+-\d+\.|all_final_layer\.\d+-\d+\.{Z_LAST}"
        ),
        z_image.diffusers_plan,
        options=FLUX_OPTIONS,
        class_names=(z_image.CLASS_NAME,),
        tells=frozenset({"cap_feat_dim"}),
        example=z_image.diffusers_example,
    ),
    Layout(
        "sana",
        "Sana in the authors' layout",
        ("sana",),
        re.compile(
            r"x_embedder\.proj\.|t_embedder\.mlp\.|t_block\.1\.|attention_y_norm\.|pos_embed$|"
            r"y_embedder\.(y_embedding$|y_proj\.fc[12]\.)|blocks\.\d+\.(scale_shift_table$|"
            r"attn\.(qkv|proj|q_norm|k_norm)\.|"
            r"cross_attn\.(q_linear|kv_linear|proj|q_norm|k_norm)\.|"
            r"mlp\.(inverted|depth|point)_conv\.conv\.)|final_layer\.(scale_shift_table$|linear\.)"
        ),
        sana.original_plan,
        options=SANA_OPTIONS,
        example=sana.original_example,
    ),
    Layout(
        "sana-diffusers",
        "Sana in the diffusers layout",
        ("sana",),
        re.compile(
            r"patch_embed\.proj\.|time_embed\.(linear\.|(emb\.)?(timestep|guidance)_embedder\.)|"
            r"caption_projection\.linear_[12]\.|caption_norm\.|scale_shift_table$|proj_out\.|"
            r"transformer_blocks\.\d+\.(scale_shift_table$|"
            r"attn[12]\.(to_(q|k|v|out\.0)|norm_[qk])\.|ff\.conv_(inverted|depth|point)\.)"
        ),
        sana.diffusers_plan,
        options=SANA_OPTIONS,
        class_names=(sana.CLASS_NAME,),
        tells=frozenset({"num_cross_attention_heads"}),
        example=sana.diffusers_example,
    ),
)
