"""Which network a table of tensors belongs to, recognized by the names alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from qdit_convert import flux, sd3
from qdit_convert.diffusers_dit import CLASS_NAMES, diffusers_example, diffusers_plan
from qdit_convert.diffusers_pixart import CLASS_NAMES as PIXART_NAMES
from qdit_convert.diffusers_pixart import diffusers_pixart_example, diffusers_pixart_plan
from qdit_convert.dit import (
    PROJECTORS,
    Choices,
    facebook_example,
    facebook_plan,
    facebook_written,
    sit_example,
)
from qdit_convert.inception import inception_example, inception_plan
from qdit_convert.pixart import pixart_example, pixart_plan
from qdit_convert.plan import Example, Leaf, Plan
from qdit_convert.tensors import StateDict, listing
from qdit_convert.training_args import read_arguments, says_sit
from qdit_convert.vae import (
    AUTOENCODER_NAME,
    from_latent_diffusion,
    in_latent_diffusion_names,
    latent_diffusion_example,
    vae_example,
    vae_plan,
)
from qdit_jax.errors import UserError

Planner = Callable[[StateDict, Choices, Mapping[str, Any] | None], Plan]


@dataclass(frozen=True)
class Layout:
    """One way in which a family's tensors are named.

    Attributes:
        name: a short name of its own.
        title: what it is called in messages.
        families: the values of `--family` that have this layout, the likeliest first.
        names: pattern of the names; a file has the layout that matches most of its names.
        class_names: diffusers' classes whose config.json describes such a network.
        tells: settings that only its config.json has, if that names no class.
        plan: returns the `Plan` of the conversion.
        wants_config: whether a folder of this layout must hold a config.json.
        parts: the first parts of its names, for files that hold other networks too.
        options: the fields of `Choices` that the plan uses.
        rename: returns the tensors under the names that `plan` knows.
        own_names: returns a message about renamed tensors with the file's own names.
        told: whether the file says that it has this layout, of several with the same names.
        example: a small network in it, for the contract tests.
        written: returns the leaves of a network with these fields, to write it in this layout; None
            where that is not done.
    """

    name: str
    title: str
    families: tuple[str, ...]
    names: re.Pattern[str]
    plan: Planner
    wants_config: bool = False
    parts: frozenset[str] = frozenset()
    options: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    tells: frozenset[str] = frozenset()
    rename: Callable[[StateDict], StateDict] = lambda state: state
    own_names: Callable[[str, StateDict], str] = lambda text, state: text
    told: Callable[[StateDict], bool] = lambda state: False
    example: Callable[[], Example] = lambda: Example(())
    written: Callable[[Mapping[str, Any]], list[Leaf]] | None = None


def _plan_dit(state: StateDict, choices: Choices, _: Mapping[str, Any] | None) -> Plan:
    return facebook_plan(state, choices, velocity=False)


def _plan_sit(state: StateDict, choices: Choices, _: Mapping[str, Any] | None) -> Plan:
    return facebook_plan(state, choices, velocity=True)


def is_sit(state: StateDict) -> bool:
    """Returns whether a file in the layout of DiT says that it is a SiT."""
    projected = any(key.startswith(PROJECTORS) for key in state.tensors)
    return projected or says_sit(read_arguments(state.hints))


VAE_OPTIONS = ("scaling_factor", "shift_factor")
VAE_TELLS = frozenset({"scaling_factor", "shift_factor", "latent_channels", "norm_num_groups"})
DIFFUSERS_OPTIONS = ("model", "num_heads", "num_classes", "input_size")
DIT_OPTIONS = (*DIFFUSERS_OPTIONS, "noise_time")
FACEBOOK = Layout(
    "dit-facebook",
    "DiT in the facebook layout",
    ("dit", "sit"),
    re.compile(
        r"pos_embed$|x_embedder\.proj\.|t_embedder\.mlp\.|y_embedder\.embedding_table\.|"
        r"blocks\.\d+\.(adaLN_modulation\.1|attn\.(qkv|proj)|mlp\.fc[12])\.|"
        r"final_layer\.(adaLN_modulation\.1|linear)\.|projectors\.\d+\."
    ),
    _plan_dit,
    options=DIT_OPTIONS,
    example=facebook_example,
    written=facebook_written,
)
SD3_OPTIONS = ("num_heads", "input_size")
FLUX_OPTIONS = (*SD3_OPTIONS, "rope_axes")
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
    # STDiT's names and those of Latte's text-to-video network hold all of PixArt's, which come first.
    Layout(
        "pixart",
        "PixArt in the authors' layout",
        ("pixart",),
        re.compile(
            r"pos_embed$|x_embedder\.proj\.|(t|csize|ar)_embedder\.mlp\.|t_block\.1\.|"
            r"y_embedder\.(y_embedding$|y_proj\.fc[12]\.)|blocks\.\d+\.(scale_shift_table$|"
            r"attn\.(qkv|proj|q_norm|k_norm|sr|norm)\.|cross_attn\.(q_linear|kv_linear|proj)\.|"
            r"mlp\.fc[12]\.)|final_layer\.(scale_shift_table$|linear\.)"
        ),
        pixart_plan,
        options=("num_heads", "input_size", "interpolation_scale"),
        example=pixart_example,
    ),
    Layout(
        "pixart-diffusers",
        "PixArt in the diffusers layout",
        ("pixart",),
        re.compile(
            r"pos_embed\.proj\.|adaln_single\.(linear\.|emb\.(timestep|resolution|aspect_ratio)_"
            r"embedder\.linear_[12]\.)|caption_projection\.linear_[12]\.|scale_shift_table$|"
            r"proj_out\.|transformer_blocks\.\d+\.(scale_shift_table$|"
            r"attn[12]\.to_(q|k|v|out\.0)\.|ff\.net\.)"
        ),
        diffusers_pixart_plan,
        class_names=PIXART_NAMES,
        example=diffusers_pixart_example,
        tells=frozenset({"attention_head_dim", "caption_channels"}),
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
    ),
    SD3_DIFFUSERS,
    Layout(
        "flux-bfl",
        "FLUX in the Black Forest Labs layout",
        ("flux",),
        re.compile(
            r"(double|single)_blocks\.\d+\.(((img|txt)_(mod|attn|mlp)|modulation|norm)\.|linear[12]\.)|"
            r"(img|txt)_in\.|(time|vector|guidance)_in\.(in|out)_layer\.|"
            r"final_layer\.(adaLN_modulation\.1|linear)\."
        ),
        flux.original_plan,
        options=FLUX_OPTIONS,
        example=flux.original_example,
        written=flux.original_written,
    ),
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
        "vae-diffusers",
        "AutoencoderKL in the diffusers layout",
        ("vae",),
        re.compile(
            r"(post_)?quant_conv\.|(en|de)coder\.(conv_(in|out|norm_out)\.|mid_block\.|"
            r"(down|up)_blocks\.\d+\.(resnets|(down|up)samplers)\.)"
        ),
        vae_plan,
        wants_config=True,
        options=VAE_OPTIONS,
        class_names=(AUTOENCODER_NAME,),
        example=vae_example,
        tells=VAE_TELLS,
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
)
# One row for each set of names.
NAMINGS = tuple({layout.names: layout for layout in reversed(LAYOUTS)}.values())[::-1]
FAMILIES = tuple(dict.fromkeys(name for layout in LAYOUTS for name in layout.families))

# Networks that convert knows by a name that only they have, but does not convert.
UNSUPPORTED = (
    ("Latte (video)", re.compile(r"temp_embed$")),
    ("Latte (video, diffusers)", re.compile(r"temporal_transformer_blocks\.\d+\.")),
    ("STDiT3 (Open-Sora 1.2)", re.compile(r"(spatial|temporal)_blocks\.\d+\.")),
    ("STDiT (Open-Sora 1.0)", re.compile(r"blocks\.\d+\.attn_temp\.")),
    (
        "a U-Net (Stable Diffusion)",
        re.compile(r"(model\.diffusion_model\.)?(input_blocks|middle_block)\."),
    ),
    ("a U-Net (diffusers)", re.compile(r"up_blocks\.\d+\.(attentions|resnets)\.")),
)


def find_layout(state: StateDict, family: str | None = None) -> Layout:
    """Returns the layout of the names in `state`, one that serves `family` if that is given.

    Raises:
        UserError: if the names are of no known network, or of another than `family`.
    """
    if family is not None and family not in FAMILIES:
        raise UserError(f"family={family!r} is not known; use one of {', '.join(FAMILIES)}.")
    keys = list(state.tensors)
    _refuse_unsupported(unsupported_title(keys, depth=0))
    shares = [sum(bool(layout.names.match(key)) for key in keys) / len(keys) for layout in NAMINGS]
    best = max(range(len(NAMINGS)), key=lambda i: shares[i])
    layout = NAMINGS[best]
    if shares[best] < 0.5:
        _refuse_unsupported(unsupported_title(keys))
        raise UserError(
            f"the names of its tensors are of no network that convert knows ({', '.join(FAMILIES)}): "
            f"{listing(keys, 4)}."
        )
    same = [other for other in LAYOUTS if other.names is layout.names]
    told = next((other for other in same if other.told(state)), layout)
    if family is None:
        return told
    serving = [other for other in same if family in other.families]
    if not serving:
        raise UserError(f"the names of its tensors are of a {told.title}, not of family {family}.")
    return min(serving, key=lambda other: other.families.index(family))


def serves(layout: Layout, family: str) -> bool:
    """Returns whether a file with the names of `layout` can be of `family`."""
    return any(family in other.families for other in LAYOUTS if other.names is layout.names)


def check_options(layout: Layout, choices: Choices) -> None:
    """Raises `UserError` for an option that does not apply to the network."""
    for field in fields(choices):
        value = getattr(choices, field.name)
        if value is not None and field.name not in layout.options:
            option = field.name.replace("_", "-")
            raise UserError(
                f"{field.name}={value!r} (--{option}) says nothing about a network of family "
                f"{layout.families[0]} ({layout.title}); leave it out."
            )


def _refuse_unsupported(title: str | None) -> None:
    if title is not None:
        raise UserError(
            f"the names of its tensors are of {title}, which convert does not support yet."
        )


def unsupported_title(keys: Iterable[str], depth: int | None = None) -> str | None:
    """Returns which known but unsupported network has some of the names, or None.

    Args:
        depth: how many dotted parts may stand before the name; None for any number.
    """
    for title, pattern in UNSUPPORTED:
        if any(pattern.match(key, start) for key in keys for start in _starts(key, depth)):
            return title
    return None


def _starts(key: str, depth: int | None) -> list[int]:
    starts = [0, *(i + 1 for i, letter in enumerate(key) if letter == ".")]
    return starts if depth is None else starts[: depth + 1]
