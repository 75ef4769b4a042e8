"""Whole pipelines of diffusers: a table of their classes, and which parts of a folder are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from qdit_convert.json_file import read_json
from qdit_convert.settings import INDEX, PIPELINE
from qdit_convert.tensors import about
from qdit_jax.diffusion import HARMLESS, Setting, Table, read_scheduler, understood
from qdit_jax.errors import UserError

PIPELINE_INDEX = "model_index.json"
SCHEDULER = "scheduler_config.json"
SECOND = "transformer_2"  # of two experts, the one of little noise
NETWORKS = ("transformer", SECOND, "vae", "scheduler")  # the parts that are read
PROMPTS = ("text_encoder", "tokenizer")  # what makes embeddings of prompts


@dataclass(frozen=True)
class Pipeline:
    """One class of pipelines.

    Attributes:
        transformer, vae: the classes that these parts may have; a scheduler's are checked by its own
            table.
        vae_left: classes of autoencoders that are not supported: a note says that samples are latents.
        left_out: parts that are not read, such as text encoders: a note names those that are there.
        settings: what its index may say beside its parts.
        fields: fields of the network that the class settles.
        notes: setting of its index -> what is said where it is true.
        vae_family: of its autoencoder.
        process: completes "the pipeline has no scheduler: sampled as the published ...".
    """

    transformer: tuple[str, ...]
    vae: tuple[str, ...] = ("AutoencoderKL",)
    vae_left: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    settings: Table = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    process: str = "network, on linear betas"
    notes: Mapping[str, str] = field(default_factory=dict)
    vae_family: str = "vae"

    @property
    def table(self) -> Table:
        """Returns the settings of its index."""
        read = [part for part in NETWORKS if part != SECOND or "boundary_ratio" in self.settings]
        parts = {part: Setting("list", optional=True) for part in (*read, *self.left_out)}
        return {**PIPELINE, **parts, **self.settings}


PIXART = Pipeline(
    ("PixArtTransformer2DModel", "Transformer2DModel"),
    left_out=PROMPTS,
    process="PixArt, on linear betas",
)
# What a pipeline may have beside two prompts' encoders, for prompts of pictures.
OF_PICTURES = ("image_encoder", "feature_extractor")
FLUX2_VAE = ("AutoencoderKLFlux2",)
DISTILLED = "distilled to few steps: the published pipeline samples it without guidance, in 4 steps"
PIPELINES: dict[str, Pipeline] = {
    "DiTPipeline": Pipeline(
        ("DiTTransformer2DModel", "Transformer2DModel"),
        settings={"id2label": Setting("table", optional=True)},
        process="DiT, on linear betas",
    ),
    "PixArtAlphaPipeline": Pipeline(
        PIXART.transformer, left_out=PROMPTS, fields={"text_length": 120}, process=PIXART.process
    ),
    "PixArtSigmaPipeline": Pipeline(
        PIXART.transformer, left_out=PROMPTS, fields={"text_length": 300}, process=PIXART.process
    ),
    "StableDiffusion3Pipeline": Pipeline(
        ("SD3Transformer2DModel",),
        left_out=(*(f"{p}{n}" for p in PROMPTS for n in ("", "_2", "_3")), *OF_PICTURES),
        process="SD3, with a shift of 3",
    ),
    "FluxPipeline": Pipeline(
        ("FluxTransformer2DModel",),
        left_out=(*(f"{p}{n}" for p in PROMPTS for n in ("", "_2")), *OF_PICTURES),
        process="FLUX",
    ),
    "SanaPipeline": Pipeline(
        ("SanaTransformer2DModel",),
        vae_left=("AutoencoderDC",),
        left_out=PROMPTS,
        process="Sana, with a shift of 3",
    ),
    "ZImagePipeline": Pipeline(
        ("ZImageTransformer2DModel",), left_out=PROMPTS, process="Z-Image, with a shift of 3"
    ),
    "Flux2KleinPipeline": Pipeline(
        ("Flux2Transformer2DModel",),
        vae_left=FLUX2_VAE,
        left_out=PROMPTS,
        settings={"is_distilled": Setting("bool", default=False, optional=True)},
        process="FLUX.2",
        notes={"is_distilled": DISTILLED},
    ),
    "Flux2Pipeline": Pipeline(
        ("Flux2Transformer2DModel",), vae_left=FLUX2_VAE, left_out=PROMPTS, process="FLUX.2"
    ),
    "LattePipeline": Pipeline(
        ("LatteTransformer3DModel", "LatteT2V"), left_out=PROMPTS, process="Latte, on linear betas"
    ),
    "WanPipeline": Pipeline(
        ("WanTransformer3DModel",),
        ("AutoencoderKLWan",),
        left_out=PROMPTS,
        settings={
            "boundary_ratio": Setting("number", low=0, high=1, optional=True),
            # A timestep per token where a first frame is given; without one all are equal.
            "expand_timesteps": HARMLESS,
        },
        process="Wan, by UniPC",
        vae_family="wan-vae",
    ),
}


class Parts(NamedTuple):
    """What a pipeline's folder holds: its class, folders of networks, and what else to keep.

    `transformers` are one, or two experts, of which the first runs from the timestep `boundary` on.
    """

    row: Pipeline
    transformers: tuple[Path, ...]
    boundary: float | None
    vae: Path | None
    left_out: tuple[str, ...]
    kept: dict[str, Any]
    notes: tuple[str, ...] = ()


def read_pipeline(path: Path) -> Parts:
    """Returns the parts of the pipeline in a folder.

    Raises:
        UserError: if it is another pipeline, a part that its index names is missing, or a setting
            of the index or of the scheduler is not understood.
    """
    with about(path):
        index = read_json(path / PIPELINE_INDEX)
        name = index.get("_class_name")
        if name not in PIPELINES:
            known = ", ".join(PIPELINES)
            raise UserError(f"this is a {name}; of whole pipelines, convert reads {known} only.")
        row = PIPELINES[name]
        # A part that is left out stands in the index as [null, null].
        listed = {key: value for key, value in index.items() if value != [None, None]}
        settings = understood(INDEX, listed, row.table)
        allowed = {
            "transformer": row.transformer,
            SECOND: row.transformer,
            "vae": (*row.vae, *row.vae_left),
            "scheduler": (),
        }
        parts = {part: folder_of(path, settings, part, allowed[part]) for part in NETWORKS}
        notes = [text for name, text in row.notes.items() if settings[name]]
        if parts["vae"] is not None and settings["vae"][1] in row.vae_left:
            parts["vae"] = None
            notes.append(
                f"vae left out: an {settings['vae'][1]} is not supported, samples are latents"
            )
        transformer = parts["transformer"]
        if transformer is None:
            raise UserError(f"{PIPELINE_INDEX} names no transformer.")
        kept: dict[str, Any] = {"pipeline": name}
        if parts["scheduler"] is not None:
            kept["scheduler"] = scheduler_settings(parts["scheduler"], settings["scheduler"][-1])
        if settings.get("id2label") is not None:
            kept["id2label"] = settings["id2label"]
        second = parts[SECOND]
        boundary = boundary_of(settings, kept, second is not None)
    left_out = tuple(part for part in row.left_out if settings[part] is not None)
    transformers = (transformer,) if second is None else (transformer, second)
    return Parts(row, transformers, boundary, parts["vae"], left_out, kept, tuple(notes))


def boundary_of(
    settings: Mapping[str, Any], kept: Mapping[str, Any], has_two: bool
) -> float | None:
    """Returns the timestep from which on the first of two experts is run; None for one network.

    Raises:
        UserError: if there are two networks and no boundary, or the reverse.
    """
    ratio = settings.get("boundary_ratio")
    if has_two != (ratio is not None):
        parts = "two transformers" if has_two else "one transformer"
        raise UserError(
            f"{PIPELINE_INDEX} says boundary_ratio={ratio!r} for {parts}; two experts need a "
            "boundary, and one network has none."
        )
    if ratio is None:
        return None
    scheduler = kept.get("scheduler")
    count = read_scheduler(scheduler).settings["num_train_timesteps"] if scheduler else 1000
    return float(ratio * count)


def scheduler_settings(folder: Path, class_name: str) -> dict[str, Any]:
    """Returns the scheduler's settings unchanged, after checking that all are understood."""
    if not (folder / SCHEDULER).is_file():
        raise UserError(f"the folder scheduler lacks its {SCHEDULER}.")
    config = {"_class_name": class_name} | read_json(folder / SCHEDULER)
    if config["_class_name"] != class_name:
        raise UserError(
            f"{PIPELINE_INDEX} names a {class_name}, but {SCHEDULER} is of a "
            f"{config['_class_name']}; make them one."
        )
    read_scheduler(config)
    return config


def folder_of(
    path: Path, index: Mapping[str, Any], part: str, classes: tuple[str, ...]
) -> Path | None:
    """Returns the folder of a part of one of `classes` (of any, if empty); None if it has none."""
    entry = index.get(part)
    if entry is None:
        return None
    if len(entry) != 2 or entry[0] != "diffusers" or not isinstance(entry[1], str):
        raise UserError(
            f"{PIPELINE_INDEX} says {part}={entry!r}; only a class of diffusers is understood, "
            f'["diffusers", NAME].'
        )
    if classes and entry[1] not in classes:
        raise UserError(
            f"{PIPELINE_INDEX} says {part}={entry!r}; only {' or '.join(classes)} is understood."
        )
    if not (path / part).is_dir():
        raise UserError(
            f"{PIPELINE_INDEX} names the part {part}, but the folder {part} is missing."
        )
    return path / part
