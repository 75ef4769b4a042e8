"""Published networks by name, with the fields that their authors gave them and the size they sample.

A row says all that a checkpoint's `model.json` would, so that bytes and operations of a network can be
counted without its weights.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from flax import linen as nn

from qdit_jax.models.dit import SIZES, published_config
from qdit_jax.models.families import build_model


@dataclasses.dataclass(frozen=True)
class Published:
    """A published network.

    Attributes:
        title: as its authors call it.
        family: its row in the table of families.
        fields: of its network, where they differ from the class's own.
        samples: what it makes by default, in words.
        calls: of the network per sample and step: 2 where its pipeline guides by default.
        aliases: further names, such as those of repositories.
    """

    title: str
    family: str
    fields: Mapping[str, Any]
    samples: str
    calls: int = 2
    aliases: tuple[str, ...] = ()

    def build(self) -> nn.Module:
        """Returns the network."""
        return build_model(self.family, self.fields)


PIXART_TEXT = {"text_length": 300, "sample_size": 128, "interpolation_scale": 2.0}
SD35 = {"qk_norm": True}
SANA_600M = {
    **{"hidden_size": 1152, "depth": 28, "num_heads": 36, "mlp_width": 2880},
    **{"num_cross_heads": 16, "cross_width": 1152},
}
FLUX2_9B = {
    **{"hidden_size": 4096, "depth": 8, "single_depth": 24, "num_heads": 32},
    **{"mlp_width": 12288, "text_width": 12288},
}
FLUX2_DEV = {
    **{"hidden_size": 6144, "depth": 8, "single_depth": 48, "num_heads": 48},
    **{"mlp_width": 18432, "text_width": 15360, "guidance_embed": True},
}
WAN_14B = {"hidden_size": 5120, "depth": 40, "num_heads": 40, "ffn_width": 13824}
WAN_5B = {
    **{"hidden_size": 3072, "depth": 30, "num_heads": 24, "ffn_width": 14336},
    **{"in_channels": 48, "sample_size": [21, 30, 52]},
}
CLIP = "81 x 480 x 832"
IMAGE = "1024 x 1024"


def class_conditional() -> Iterator[Published]:
    """Yields the rows of DiT and SiT of 256 pixels in all sizes, and DiT of 512."""
    for size in SIZES:
        for patch in (2, 4, 8):
            fields = published_config(f"DiT-{size}/{patch}")
            yield Published(f"DiT-{size}/{patch}", "dit", fields, "256 x 256")
        fields = {**published_config(f"SiT-{size}/2"), "velocity": True}
        yield Published(f"SiT-{size}/2", "dit", fields, "256 x 256")
    large = {**published_config("DiT-XL/2"), "input_size": 64}
    yield Published("DiT-XL/2-512", "dit", large, "512 x 512")


PUBLISHED_NETWORKS: tuple[Published, ...] = (
    *class_conditional(),
    Published("LightningDiT-XL/1", "lightningdit", {}, "256 x 256"),
    Published(
        "PixArt-alpha-1024",
        "pixart",
        {**PIXART_TEXT, "text_length": 120, "size_conditions": True},
        IMAGE,
    ),
    Published("PixArt-Sigma-1024", "pixart", PIXART_TEXT, IMAGE, aliases=("pixart-sigma",)),
    Published("SD3-medium", "sd3", {}, IMAGE, aliases=("stable-diffusion-3-medium",)),
    Published(
        "SD3.5-medium",
        "sd3",
        {**SD35, "dual_blocks": list(range(13)), "pos_embed_max_size": 384},
        IMAGE,
        aliases=("stable-diffusion-3.5-medium",),
    ),
    Published(
        "SD3.5-large",
        "sd3",
        {**SD35, "depth": 38, "hidden_size": 2432, "num_heads": 38},
        IMAGE,
        aliases=("stable-diffusion-3.5-large",),
    ),
    Published("FLUX.1-dev", "flux", {}, IMAGE, 1, aliases=("flux-dev",)),
    Published(
        "FLUX.1-schnell",
        "flux",
        {"guidance_embed": False, "text_length": 256},
        IMAGE,
        1,
        aliases=("flux-schnell",),
    ),
    Published("Sana-0.6B", "sana", SANA_600M, IMAGE, aliases=("sana-600m",)),
    Published("Sana-1.6B", "sana", {}, IMAGE, aliases=("sana", "sana-1600m")),
    Published("Sana-1.5-4.8B", "sana", {"depth": 60, "qk_norm": True}, IMAGE),
    Published("Z-Image-Turbo", "z-image", {}, IMAGE, 1, aliases=("z-image",)),
    Published("FLUX.2-klein-4B", "flux2", {}, IMAGE, 1),
    Published("FLUX.2-klein-9B", "flux2", FLUX2_9B, IMAGE, 1),
    Published("FLUX.2-dev", "flux2", FLUX2_DEV, IMAGE, 1, aliases=("flux2-dev",)),
    Published("Latte-XL/2", "latte", {}, "16 x 256 x 256", aliases=("latte-xl",)),
    Published("Latte-1", "latte_t2v", {}, "16 x 512 x 512", aliases=("latte-t2v",)),
    Published("STDiT-16x256x256", "stdit", {}, "16 x 256 x 256", aliases=("open-sora-1.0",)),
    Published("STDiT3-16x256x256", "stdit3", {"sample_size": [4, 32, 32]}, "16 x 256 x 256"),
    Published(
        "STDiT3-51x480p",
        "stdit3",
        {"sample_size": [15, 60, 106]},
        "51 x 480 x 854",
        aliases=("stdit3", "open-sora-1.2"),
    ),
    Published("Wan2.1-T2V-1.3B", "wan", {}, CLIP, aliases=("wan-1.3b",)),
    Published("Wan2.1-T2V-14B", "wan", WAN_14B, CLIP, aliases=("wan-14b",)),
    Published("Wan2.2-TI2V-5B", "wan", WAN_5B, CLIP, aliases=("wan-5b",)),
    Published(
        "Wan2.2-T2V-A14B", "wan", {**WAN_14B, "boundary": 875.0}, CLIP, aliases=("wan-a14b",)
    ),
)


def published_named(name: str) -> Published:
    """Returns the row of a name or an alias, in any case, with any signs between its parts.

    Raises:
        ValueError: if there is none.
    """
    for row in PUBLISHED_NETWORKS:
        if plain(name) in map(plain, (row.title, *row.aliases)):
            return row
    raise ValueError(
        f"model={name!r} is not in the table of published networks; use one of "
        f"{', '.join(row.title for row in PUBLISHED_NETWORKS)}."
    )


def plain(name: str) -> str:
    """Returns a name's letters and digits, small."""
    return re.sub(r"[^a-z0-9]", "", name.lower())
