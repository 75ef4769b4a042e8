"""The table of layouts: a new one is one file and one row here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qdit_convert import flux, sd3
from qdit_convert.choices import Choices
from qdit_convert.diffusers_dit import CLASS_NAMES, diffusers_example, diffusers_plan
from qdit_convert.diffusers_pixart import CLASS_NAMES as PIXART_NAMES
from qdit_convert.diffusers_pixart import diffusers_pixart_example, diffusers_pixart_plan
from qdit_convert.dit import (
    PROJECTORS,
    facebook_example,
    facebook_plan,
    sit_example,
)
from qdit_convert.image_layouts import FLUX_OPTIONS, IMAGE_LAYOUTS, SD3_OPTIONS
from qdit_convert.latte import is_latte, latte_example, latte_plan
from qdit_convert.latte_t2v import LATTE_CLASSES, is_latte_t2v, latte_t2v_example, latte_t2v_plan
from qdit_convert.layout import Layout
from qdit_convert.lightningdit import is_lightning, lightning_example, lightning_plan
from qdit_convert.other_layouts import OTHER_LAYOUTS
from qdit_convert.pixart import pixart_example, pixart_plan
from qdit_convert.plan import Plan
from qdit_convert.stdit import (
    STDIT3_CLASS,
    is_stdit,
    stdit3_example,
    stdit3_plan,
    stdit_example,
    stdit_plan,
)
from qdit_convert.tensors import StateDict
from qdit_convert.training_args import read_arguments, says_sit
from qdit_convert.wan import (
    AUTHORS_NAME,
    DIFFUSERS_NAME,
    diffusers_wan_example,
    from_diffusers,
    in_diffusers_names,
    wan_example,
    wan_plan,
)


def _plan_dit(state: StateDict, choices: Choices, _: Mapping[str, Any] | None) -> Plan:
    return facebook_plan(state, choices, velocity=False)


def _plan_sit(state: StateDict, choices: Choices, _: Mapping[str, Any] | None) -> Plan:
    return facebook_plan(state, choices, velocity=True)


def is_sit(state: StateDict) -> bool:
    """Returns whether a file in the layout of DiT says that it is a SiT."""
    projected = any(key.startswith(PROJECTORS) for key in state.tensors)
    return projected or says_sit(read_arguments(state.hints))


WAN_OPTIONS = ("num_heads", "input_size")
DIFFUSERS_OPTIONS = ("model", "num_heads", "num_classes", "input_size")
DIT_OPTIONS = (*DIFFUSERS_OPTIONS, "noise_time")
FACEBOOK = Layout(
    "dit-facebook",
    "DiT in the facebook layout",
    ("dit", "sit"),
    re.compile(
        r"(pos|temp)_embed$|x_embedder\.proj\.|t_embedder\.mlp\.|y_embedder\.embedding_table\.|"
        r"blocks\.\d+\.(adaLN_modulation\.1|norm[12]|attn\.(qkv|proj|[qk]_norm)|mlp\.(fc[12]|w12|w3))\.|"
        r"final_layer\.(adaLN_modulation\.1|linear|norm_final)\.|projectors\.\d+\.|feat_rope\."
    ),
    _plan_dit,
    options=DIT_OPTIONS,
    example=facebook_example,
    writes="dit",
)
SD3_DIFFUSERS = Layout(
    "sd3-diffusers",
    "SD3 in the diffusers layout",
    ("sd3",),
    # FLUX's own names too: most are the same.
    re.compile(
        r"(single_)?transformer_blocks\.\d+\.(norm(1|1_context)?\.linear\.|"
        r"attn2?\.(to_(q|k|v|out\.0|add_out)|add_[qkv]_proj|norm_(added_)?[qk])\.|"
        r"ff(_context)?\.net\.|proj_(mlp|out)\.)|pos_embed\.(proj\.|pos_embed$)|"
        r"(context|x)_embedder\.|time_text_embed\.|norm_out\.linear\.|proj_out\."
    ),
    sd3.diffusers_plan,
    options=SD3_OPTIONS,
    class_names=(sd3.CLASS_NAME,),
    tells=frozenset({"joint_attention_dim"}),
    example=sd3.diffusers_example,
)
# The names of the authors' PixArt and STDiT, of which both have nearly all.
AUTHORS_NAMES = re.compile(
    r"pos_embed(_temporal)?$|x_embedder\.proj\.|(t|csize|ar)_embedder\.mlp\.|t_block\.1\.|"
    r"y_embedder\.(y_embedding$|y_proj\.fc[12]\.)|blocks\.\d+\.(scale_shift_table$|"
    r"(attn|attn_temp)\.(qkv|proj|q_norm|k_norm|sr|norm)\.|"
    r"cross_attn\.(q_linear|kv_linear|proj)\.|mlp\.fc[12]\.)|"
    r"final_layer\.(scale_shift_table$|linear\.)"
)
# Those of diffusers' PixArt and Latte-T2V.
DIFFUSERS_NAMES = re.compile(
    r"pos_embed\.proj\.|adaln_single\.(linear\.|emb\.(timestep|resolution|aspect_ratio)_"
    r"embedder\.linear_[12]\.)|caption_projection\.linear_[12]\.|scale_shift_table$|"
    r"proj_out\.|(temporal_)?transformer_blocks\.\d+\.(scale_shift_table$|"
    r"attn[12]\.to_(q|k|v|out\.0)\.|ff\.net\.)"
)
# Of rows with the same names the first is taken, unless a file tells or the user says another.
LAYOUTS = (
    FACEBOOK,
    replace(
        FACEBOOK,
        name="sit-facebook",
        title="SiT in the facebook layout",
        families=("sit",),
        plan=_plan_sit,
        told=is_sit,
        example=sit_example,
    ),
    replace(
        FACEBOOK,
        name="latte",
        title="Latte in the authors' layout",
        families=("latte",),
        plan=latte_plan,
        options=("num_heads", "num_classes", "input_size"),
        told=is_latte,
        example=latte_example,
        writes="latte",
    ),
    Layout(
        "pixart",
        "PixArt in the authors' layout",
        ("pixart",),
        AUTHORS_NAMES,
        pixart_plan,
        options=("num_heads", "input_size", "interpolation_scale"),
        example=pixart_example,
        writes="pixart",
    ),
    Layout(
        "pixart-diffusers",
        "PixArt in the diffusers layout",
        ("pixart",),
        DIFFUSERS_NAMES,
        diffusers_pixart_plan,
        class_names=PIXART_NAMES,
        example=diffusers_pixart_example,
        tells=frozenset({"attention_head_dim", "caption_channels"}),
    ),
    Layout(
        "stdit",
        "STDiT of Open-Sora 1.0",
        ("stdit",),
        AUTHORS_NAMES,
        stdit_plan,
        options=("num_heads", "input_size", "space_scale", "time_scale"),
        told=is_stdit,
        example=stdit_example,
        writes="stdit",
    ),
    Layout(
        "latte-t2v-diffusers",
        "Latte-T2V in the diffusers layout",
        ("latte_t2v",),
        DIFFUSERS_NAMES,
        latte_t2v_plan,
        options=("num_heads", "input_size"),
        class_names=LATTE_CLASSES,
        told=is_latte_t2v,
        example=latte_t2v_example,
        tells=frozenset({"attention_head_dim", "video_length"}),
    ),
    Layout(
        "stdit3",
        "STDiT3 of Open-Sora 1.2",
        ("stdit3",),
        re.compile(
            r"x_embedder\.proj\.|(t|fps)_embedder\.mlp\.|t_block\.1\.|rope\.freqs$|"
            r"y_embedder\.(y_embedding$|y_proj\.fc[12]\.)|"
            r"(spatial|temporal)_blocks\.\d+\.(scale_shift_table$|"
            r"attn\.(qkv|proj|q_norm|k_norm)\.|cross_attn\.(q_linear|kv_linear|proj)\.|"
            r"mlp\.fc[12]\.)|final_layer\.(scale_shift_table$|linear\.)"
        ),
        stdit3_plan,
        options=("num_heads", "input_size"),
        class_names=(STDIT3_CLASS,),
        example=stdit3_example,
        writes="stdit3",
        tells=frozenset({"input_sq_size", "model_max_length"}),
    ),
    replace(
        FACEBOOK,
        name="lightningdit",
        title="LightningDiT in the authors' layout",
        families=("lightningdit",),
        plan=lightning_plan,
        options=("num_heads", "num_classes", "input_size"),
        told=is_lightning,
        example=lightning_example,
        writes="lightningdit",
    ),
    Layout(
        "dit-diffusers",
        "DiT in the diffusers layout",
        ("dit",),
        re.compile(
            r"pos_embed\.(proj\.|pos_embed$)|proj_out_[12]\.|transformer_blocks\.\d+\."
            r"(norm1\.(emb|linear)\.|attn1\.to_(q|k|v|out\.0)\.|ff\.net\.)"
        ),
        diffusers_plan,
        wants_config=True,
        options=DIFFUSERS_OPTIONS,
        class_names=CLASS_NAMES,
        example=diffusers_example,
        tells=frozenset({"attention_head_dim", "num_embeds_ada_norm"}),
    ),
    Layout(
        "sd3-stability",
        "SD3 in the Stability layout",
        ("sd3",),
        re.compile(
            r"joint_blocks\.\d+\.(x|context)_block\.|context_embedder\.|pos_embed$|"
            r"x_embedder\.proj\.|[ty]_embedder\.mlp\.|final_layer\.(adaLN_modulation\.1|linear)\."
        ),
        sd3.original_plan,
        options=SD3_OPTIONS,
        example=sd3.original_example,
        writes="sd3",
    ),
    SD3_DIFFUSERS,
    *IMAGE_LAYOUTS,
    replace(
        SD3_DIFFUSERS,
        name="flux-diffusers",
        title="FLUX in the diffusers layout",
        families=("flux",),
        plan=flux.diffusers_plan,
        options=FLUX_OPTIONS,
        class_names=(flux.CLASS_NAME,),
        told=flux.is_flux,
        example=flux.diffusers_example,
    ),
    Layout(
        "wan",
        "Wan in the authors' layout",
        ("wan",),
        re.compile(
            r"patch_embedding\.|(time|text)_embedding\.[02]\.|time_projection\.1\.|"
            r"blocks\.\d+\.((self|cross)_attn\.(q|k|v|o|norm_q|norm_k)\.|ffn\.[02]\.|norm3\.|"
            r"modulation$)|head\.(head\.|modulation$)"
        ),
        wan_plan,
        options=WAN_OPTIONS,
        class_names=(AUTHORS_NAME,),
        example=wan_example,
        writes="wan",
        tells=frozenset({"text_len", "num_heads"}),
    ),
    Layout(
        "wan-diffusers",
        "Wan in the diffusers layout",
        ("wan",),
        re.compile(
            r"patch_embedding\.|condition_embedder\.((time|text)_embedder\.|time_proj\.)|"
            r"blocks\.\d+\.(attn[12]\.(to_(q|k|v|out\.0)|norm_[qk])\.|ffn\.net\.|norm2\.|"
            r"scale_shift_table$)|proj_out\.|scale_shift_table$"
        ),
        wan_plan,
        options=WAN_OPTIONS,
        class_names=(DIFFUSERS_NAME,),
        rename=from_diffusers,
        own_names=in_diffusers_names,
        example=diffusers_wan_example,
        tells=frozenset({"attention_head_dim", "text_dim"}),
    ),
    *OTHER_LAYOUTS,
)
# One row for each set of names.
NAMINGS = tuple({layout.names: layout for layout in reversed(LAYOUTS)}.values())[::-1]
FAMILIES = tuple(dict.fromkeys(name for layout in LAYOUTS for name in layout.families))
